"""The configuration of each stage: flat dataclasses with the names of Hugging Face's trainers.

`transformers.HfArgumentParser` turns them into command-line options, and a YAML file may hold the
same names. Every field's help text is its documentation.
"""

import math
from dataclasses import dataclass, field

from rlhf.errors import UserError

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
REPORTERS = ("tensorboard", "none")


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


def _required(text: str):
    return field(metadata={"help": text})


@dataclass(kw_only=True)
class TrainConfig:
    """What the three stages share."""

    model_name_or_path: str = _required("Folder or hub id of the model to start from.")
    dataset_name: str = _required("Training data: a .jsonl or .json file, or a saved data set.")
    output_dir: str = _required("Folder for the trained model, its metrics and plots.")
    overwrite_output_dir: bool = _option(
        False, "Replace an earlier run of the same stage in output_dir."
    )
    learning_rate: float = _option(1e-4, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = _option(
        "linear", f"Learning-rate schedule after the warm-up: {', '.join(SCHEDULERS)}."
    )
    warmup_ratio: float = _option(0.0, "Share of the steps over which the rate rises from 0.")
    weight_decay: float = _option(0.0, "Weight decay of AdamW, on matrices only.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm.")
    per_device_train_batch_size: int = _option(
        8, "Rows of data (PPO: responses) in one forward and backward pass."
    )
    per_device_eval_batch_size: int = _option(64, "Sequences in one pass without gradient.")
    gradient_accumulation_steps: int = _option(1, "Passes that one optimizer step sums over.")
    bf16: bool = _option(False, "Run the models in bfloat16 autocast (the weights stay fp32).")
    seed: int = _option(0, "Seed of every random choice.")
    logging_steps: int = _option(10, "Steps between two lines of metrics.")
    report_to: str = _option(
        "tensorboard", f"Where metrics go besides metrics.jsonl: {', '.join(REPORTERS)}."
    )

    def __post_init__(self):
        self._check("must be > 0", lambda x: 0 < x < math.inf, "max_grad_norm")
        self._check(
            "must be >= 0 and finite",
            lambda x: 0 <= x < math.inf,
            *("learning_rate", "weight_decay"),
        )
        self._check("must be in [0, 1]", lambda x: 0 <= x <= 1, "warmup_ratio")
        self._check("must be in [0, 2**63)", lambda x: 0 <= x < 2**63, "seed")
        self._check(
            "must be >= 1",
            lambda x: x >= 1,
            *("per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "logging_steps"),
        )
        self._check(f"must be one of {SCHEDULERS}", SCHEDULERS.__contains__, "lr_scheduler_type")
        self._check(f"must be one of {REPORTERS}", REPORTERS.__contains__, "report_to")

    def _check(self, rule: str, holds, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not holds(value):
                raise UserError(f"{name} {rule}, got {value!r}")


@dataclass(kw_only=True)
class SupervisedConfig(TrainConfig):
    """What the stages that learn from a fixed data set share."""

    eval_dataset_name: str | None = _option(None, "Held-out data, measured when training ends.")
    num_train_epochs: float = _option(1.0, "Passes over the training data.")
    max_steps: int = _option(-1, "Optimizer steps; if > 0 it replaces num_train_epochs.")
    max_length: int = _option(1024, "Longer sequences are cut to this many tokens.")

    def __post_init__(self):
        super().__post_init__()
        self._check("must be > 0", lambda x: 0 < x < math.inf, "num_train_epochs")
        self._check("must be >= 2", lambda x: x >= 2, "max_length")


@dataclass(kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on `text`, or on `completion` given `prompt`."""


@dataclass(kw_only=True)
class RewardConfig(SupervisedConfig):
    """A reward model from `prompt`, `chosen`, `rejected`, or from `prompt` and a `ranking`."""

    append_eos: bool = _option(
        True,
        "End every answer with EOS, where the score is then read. Turn it off when the policy's "
        "responses are cut at a length and do not end with EOS.",
    )


@dataclass(kw_only=True)
class PPOConfig(TrainConfig):
    """PPO with a critic against a reward model. One iteration collects
    per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches responses and takes
    num_ppo_epochs * num_mini_batches optimizer steps."""

    reward_model_path: str = _required("Folder of the reward model.")
    critic_model_path: str | None = _option(
        None, "Folder that the critic starts from (default: the reward model)."
    )
    critic_learning_rate: float | None = _option(
        None, "Peak learning rate of the critic (default: learning_rate)."
    )
    learning_rate: float = _option(1e-5, "Peak learning rate of the policy.")
    logging_steps: int = _option(1, "Iterations between two lines of metrics.")
    total_episodes: int = _option(10_000, "Responses to collect in all, rounded up to iterations.")
    num_ppo_epochs: int = _option(4, "Passes over each iteration's responses.")
    num_mini_batches: int = _option(1, "Optimizer steps in each of these passes.")
    kl_coef: float = _option(0.05, "Weight of the KL penalty in the reward.")
    cliprange: float = _option(0.2, "The ratio is clipped from below at 1 - cliprange.")
    cliprange_high: float | None = _option(
        None, "The ratio is clipped from above at 1 + cliprange_high (default: cliprange)."
    )
    cliprange_value: float = _option(0.2, "Clip range of the critic's values.")
    vf_coef: float = _option(0.5, "Weight of the value loss.")
    entropy_coef: float = _option(0.0, "Weight of the entropy bonus.")
    gamma: float = _option(1.0, "Discount factor.")
    lam: float = _option(0.95, "Lambda of generalised advantage estimation.")
    whiten_advantages: bool = _option(True, "Centre and scale the advantages of an iteration.")
    score_clip: float | None = _option(
        None, "Normalised scores are clipped to +-score_clip (default: not clipped)."
    )
    missing_eos_penalty: float = _option(
        0.0, "Subtracted from the score of a response without EOS."
    )
    temperature: float = _option(1.0, "Divides the logits everywhere: sampling, update, reference.")
    response_length: int = _option(64, "Longest response, in tokens.")
    min_response_length: int = _option(0, "EOS cannot be sampled before this many tokens.")
    sample_response_length: bool = _option(
        False, "Draw each response's longest length from [min_response_length, response_length]."
    )
    max_prompt_length: int = _option(512, "Of longer prompts the last tokens are kept.")

    def __post_init__(self):
        super().__post_init__()
        if self.cliprange_high is None:
            self.cliprange_high = self.cliprange
        if self.critic_learning_rate is None:
            self.critic_learning_rate = self.learning_rate
        self._check(
            "must be >= 1",
            lambda x: x >= 1,
            *("total_episodes", "num_ppo_epochs", "num_mini_batches", "response_length"),
            "max_prompt_length",
        )
        self._check(
            "must be >= 0 and finite",
            lambda x: 0 <= x < math.inf,
            *("kl_coef", "cliprange_high", "vf_coef", "entropy_coef", "missing_eos_penalty"),
            "critic_learning_rate",
        )
        self._check("must be in [0, 1)", lambda x: 0 <= x < 1, "cliprange")
        self._check("must be in [0, 1]", lambda x: 0 <= x <= 1, "gamma", "lam")
        self._check("must be > 0", lambda x: 0 < x < math.inf, "temperature", "cliprange_value")
        self._check("must be > 0", lambda x: x is None or x > 0, "score_clip")
        self._check(
            f"must be in [0, response_length = {self.response_length}]",
            lambda x: 0 <= x <= self.response_length,
            "min_response_length",
        )
