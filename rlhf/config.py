"""The configuration of each stage: flat dataclasses with the names of Hugging Face's trainers.

`transformers.HfArgumentParser` turns them into command-line options, and a YAML file may hold the
same names. Every field's help text is its documentation, its section the heading it stands under.
"""

import math
import os
from dataclasses import dataclass, field
from functools import partial

from rlhf.errors import UserError

SCHEDULERS = ("linear", "cosine", "inverse_sqrt", "constant", "constant_with_warmup")
REPORTERS = ("tensorboard", "none")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
ADAPTIVE_KL = ("none", "sequence", "token")
SCORE_SCALINGS = ("none", "running", "reference")


def _option(section: str, default, text: str):
    metadata = {"help": text, "section": section}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _required(section: str, text: str):
    return field(metadata={"help": text, "section": section})


_data = partial(_option, "Models and data")
_run = partial(_option, "Output and checkpoints")
_learning = partial(_option, "Learning")
_hardware = partial(_option, "Batches and precision")
_rewards = partial(_option, "Rewards")
_kl = partial(_option, "KL penalty")
_ppo = partial(_option, "PPO")
_responses = partial(_option, "Responses")


def _path_as_text(value: object) -> object:
    if isinstance(value, list):
        return [_path_as_text(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@dataclass(kw_only=True)
class TrainConfig:
    """What the three stages share."""

    model_name_or_path: str = _required(
        "Models and data", "Folder or hub id of the model to start from."
    )
    dataset_name: str = _required(
        "Models and data",
        "Training data: a .jsonl, .json, .csv or .parquet file, a folder that datasets saved, or a "
        "hub id.",
    )
    dataset_config_name: str | None = _data(None, "Configuration of a data set from the hub.")
    dataset_split: str = _data("train", "Split of a data set that has several.")
    eval_dataset_name: str | None = _data(None, "Held-out data, in the same formats.")
    eval_dataset_split: str = _data("test", "Split of held-out data that has several.")

    output_dir: str = _required(
        "Output and checkpoints", "Folder for the trained model, its metrics and plots."
    )
    overwrite_output_dir: bool = _run(
        False, "Replace an earlier run of the same stage in output_dir."
    )
    logging_steps: int = _run(10, "Steps between two lines of metrics.")
    report_to: str = _run(
        "tensorboard", f"Where metrics go besides metrics.jsonl: {', '.join(REPORTERS)}."
    )
    eval_steps: int = _run(0, "Steps between two measurements on held-out data; 0: at the end.")
    save_steps: int = _run(100, "Steps between two checkpoints; 0: none.")
    save_total_limit: int = _run(2, "Checkpoints to keep, the best one not counted; 0: all.")
    resume_from_checkpoint: str | None = _run(
        None,
        "Checkpoint folder to go on from; 'auto': the newest whole one in output_dir, or the "
        "beginning if there is none.",
    )
    metric_for_best_model: str | None = _run(
        None,
        "Metric by which the best checkpoint is known; it is kept whatever save_total_limit. Each "
        "must be measured where it is saved: save_steps is a multiple of eval_steps for a metric "
        "eval/..., and else of logging_steps.",
    )
    greater_is_better: bool | None = _run(
        None,
        "Whether more of metric_for_best_model is better, true or false (default: false for a name "
        "that ends in loss, perplexity or kl, else true).",
    )
    load_best_model_at_end: bool = _run(
        False, "Leave the best checkpoint's model in output_dir rather than the last."
    )

    learning_rate: float = _learning(1e-4, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = _learning(
        "linear", f"Learning-rate schedule after the warm-up: {', '.join(SCHEDULERS)}."
    )
    warmup_ratio: float = _learning(0.0, "Share of the steps over which the rate rises from 0.")
    weight_decay: float = _learning(0.0, "Weight decay of AdamW, on matrices only.")
    adam_beta1: float = _learning(0.9, "AdamW's decay of the mean of gradients.")
    adam_beta2: float = _learning(0.999, "AdamW's decay of the mean of squared gradients.")
    adam_epsilon: float = _learning(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _learning(1.0, "Gradients are clipped to this norm.")
    seed: int = _learning(0, "Seed of every random choice.")

    per_device_train_batch_size: int = _hardware(
        8, "Rows of data (PPO: responses) in one forward and backward pass of one process."
    )
    per_device_eval_batch_size: int = _hardware(64, "Sequences in one pass without gradient.")
    gradient_accumulation_steps: int = _hardware(
        1, "Passes of each process that one optimizer step sums over."
    )
    bf16: bool = _hardware(False, "Run the models in bfloat16 autocast (the weights stay fp32).")
    gradient_checkpointing: bool = _hardware(
        False, "Compute activations again in the backward pass rather than keep them."
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            setattr(self, name, _path_as_text(value))
        self._check("must be > 0", lambda x: 0 < x < math.inf, "max_grad_norm", "adam_epsilon")
        self._check(
            "must be >= 0 and finite",
            lambda x: 0 <= x < math.inf,
            *("learning_rate", "weight_decay"),
        )
        self._check("must be in [0, 1]", lambda x: 0 <= x <= 1, "warmup_ratio")
        self._check("must be in [0, 1)", lambda x: 0 <= x < 1, "adam_beta1", "adam_beta2")
        self._check("must be in [0, 2**32)", lambda x: 0 <= x < 2**32, "seed")
        self._check(
            "must be >= 1",
            lambda x: x >= 1,
            *("per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "logging_steps"),
        )
        self._check(
            "must be >= 0", lambda x: x >= 0, "eval_steps", "save_steps", "save_total_limit"
        )
        self._check(f"must be one of {SCHEDULERS}", SCHEDULERS.__contains__, "lr_scheduler_type")
        self._check(f"must be one of {REPORTERS}", REPORTERS.__contains__, "report_to")
        if self.warmup_ratio and self.lr_scheduler_type == "constant":
            raise UserError(
                "lr_scheduler_type constant has no warm-up: take constant_with_warmup, or leave "
                "warmup_ratio at 0"
            )
        if self.load_best_model_at_end and not (self.metric_for_best_model and self.save_steps):
            raise UserError("load_best_model_at_end needs metric_for_best_model and save_steps > 0")
        if self.metric_for_best_model is not None:
            self._check_metric_for_best_model()

    def _check_metric_for_best_model(self) -> None:
        """The value by which a checkpoint is judged must be that of its own step."""
        metric = self.metric_for_best_model
        if self.greater_is_better is None:
            self.greater_is_better = not metric.endswith(("loss", "perplexity", "kl"))
        every = "logging_steps"
        if metric.startswith("eval/"):
            every = "eval_steps"
            if self.eval_dataset_name is None or not self.eval_steps:
                raise UserError(
                    f"metric_for_best_model {metric} needs eval_dataset_name and eval_steps > 0"
                )
        if self.save_steps % getattr(self, every):
            raise UserError(
                f"save_steps {self.save_steps} must be a multiple of {every} "
                f"{getattr(self, every)}, for metric_for_best_model {metric} to be measured where "
                "a checkpoint is saved"
            )

    def _check(self, rule: str, holds, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not holds(value):
                raise UserError(f"{name} {rule}, got {value!r}")


@dataclass(kw_only=True)
class SupervisedConfig(TrainConfig):
    """What the stages that learn from a fixed data set share."""

    num_train_epochs: float = _learning(1.0, "Passes over the training data.")
    max_steps: int = _learning(-1, "Optimizer steps; if > 0 it replaces num_train_epochs.")
    max_length: int = _data(1024, "Longer sequences are cut to this many tokens.")

    def __post_init__(self):
        super().__post_init__()
        self._check("must be > 0", lambda x: 0 < x < math.inf, "num_train_epochs")
        self._check("must be >= 2", lambda x: x >= 2, "max_length")


@dataclass(kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on `text`, on `messages`, or on `completion` given `prompt`."""


@dataclass(kw_only=True)
class RewardConfig(SupervisedConfig):
    """A reward model from `prompt`, `chosen`, `rejected`, or from `prompt` and a `ranking`."""

    append_eos: bool = _data(
        True,
        "End every answer with EOS, where the score is then read. Turn it off when the policy's "
        "responses are cut at a length and do not end with EOS.",
    )


@dataclass(kw_only=True)
class PPOConfig(TrainConfig):
    """PPO with a critic. One iteration collects rollout_batch_size responses and takes
    num_ppo_epochs * num_mini_batches optimizer steps; every 'step' of logging_steps, save_steps and
    eval_steps is an iteration."""

    logging_steps: int = _run(1, "Iterations between two lines of metrics.")
    learning_rate: float = _learning(1e-5, "Peak learning rate of the policy.")
    critic_learning_rate: float | None = _learning(
        None, "Peak learning rate of the critic (default: learning_rate)."
    )
    critic_warmup: int = _learning(0, "Iterations at the start in which only the critic learns.")
    critic_model_path: str | None = _data(
        None,
        "Folder or hub id that the critic starts from (default: the first reward model with the "
        "policy's tokenizer, else model_name_or_path with a new head).",
    )
    share_trunk: bool = _data(
        False, "Make the critic a value head on the policy's own trunk, not a model of its own."
    )
    rollout_batch_size: int | None = _hardware(
        None,
        "Responses of one iteration over all processes, which sets gradient_accumulation_steps "
        "(default: per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches * "
        "the number of processes).",
    )

    reward_funcs: list[str] = _rewards(
        [],
        "What scores a response; several are weighted and summed. Each is the folder or hub id of "
        "a reward model, module:function, or file.py:function, called as f(prompts, completions, "
        "**columns) -> one score (or None, or a list with one for each token) per completion.",
    )
    reward_weights: list[float] | None = _rewards(
        None, "Weight of each of reward_funcs (default: 1 each)."
    )
    score_scaling: str = _rewards(
        "none",
        "Scores of responses (not of tokens) become (score - mean) / std, with the moments of all "
        "scores so far (running) or of the first iteration, when the policy still is the reference "
        "(reference); or none.",
    )
    score_clip: float | None = _rewards(
        None, "Scores are then clipped to +-score_clip (default: not clipped)."
    )
    missing_eos_penalty: float = _rewards(
        0.0, "Subtracted, last of all, from the score of a response that did not end by itself."
    )
    missing_eos_score: float | None = _rewards(
        None, "Replaces the score of a response that did not end by itself (default: it is kept)."
    )
    whiten_rewards: bool = _rewards(
        False, "Centre and scale the rewards of an iteration's tokens, before GAE."
    )

    kl_coef: float = _kl(0.05, "Weight of the KL penalty in the reward (adaptive_kl: at first).")
    kl_estimator: str = _kl(
        "k1", f"Estimate of the KL divergence in the penalty: {', '.join(KL_ESTIMATORS)}."
    )
    adaptive_kl: str = _kl(
        "none",
        "Adapt kl_coef until the KL of an iteration is target_kl: that of a whole response "
        "(sequence), of a token on average (token), or none.",
    )
    target_kl: float | None = _kl(
        None,
        "KL, in nats, that adaptive_kl aims at (default for sequence: 6; to stop updates see "
        "early_stop_kl).",
    )
    kl_horizon: int = _kl(10_000, "Responses over which adaptive_kl changes kl_coef.")
    early_stop_kl: float | None = _kl(
        None,
        "End an iteration's update once a minibatch's approxkl is above this (default: never).",
    )

    total_episodes: int = _ppo(10_000, "Responses to collect in all, rounded up to iterations.")
    num_ppo_epochs: int = _ppo(4, "Passes over each iteration's responses.")
    num_mini_batches: int = _ppo(1, "Optimizer steps in each of these passes.")
    cliprange: float = _ppo(0.2, "The ratio is clipped from below at 1 - cliprange.")
    cliprange_high: float | None = _ppo(
        None, "The ratio is clipped from above at 1 + cliprange_high (default: cliprange)."
    )
    dual_clip: float | None = _ppo(
        None,
        "Where the advantage is negative the loss is at most dual_clip * |advantage| (> 1; "
        "default: unbounded).",
    )
    cliprange_value: float = _ppo(0.2, "Clip range of the critic's values.")
    vf_coef: float = _ppo(0.5, "Weight of the value loss.")
    entropy_coef: float = _ppo(0.0, "Weight of the entropy bonus.")
    gamma: float = _ppo(1.0, "Discount factor.")
    lam: float = _ppo(0.95, "Lambda of generalised advantage estimation.")
    whiten_advantages: bool = _ppo(True, "Centre and scale the advantages of an iteration.")

    temperature: float = _responses(
        1.0, "Divides the logits everywhere: sampling, update, reference."
    )
    response_length: int = _responses(64, "Longest response, in tokens.")
    min_response_length: int = _responses(
        0,
        "Neither EOS nor a stop_token is sampled before this many tokens, and no stop_strings "
        "end a response.",
    )
    sample_response_length: bool = _responses(
        False, "Draw each response's longest length from [min_response_length, response_length]."
    )
    stop_token: list[str] | None = _responses(
        None, "Tokens that end a response as EOS does (the last token is kept)."
    )
    stop_strings: list[str] | None = _responses(
        None, "Texts that end a response, with the token that completes one."
    )
    max_prompt_length: int = _responses(512, "Of longer prompts the last tokens are kept.")
    text_prompt_length: list[int] = _responses(
        [2, 8],
        "Where the data has text rather than prompt: the first tokens of each text are a prompt, "
        "so many at least and at most.",
    )

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
            *("max_prompt_length", "kl_horizon"),
        )
        self._check("must be >= 1", lambda x: x is None or x >= 1, "rollout_batch_size")
        self._check("must be >= 0", lambda x: x >= 0, "critic_warmup")
        self._check(
            "must be >= 0 and finite",
            lambda x: 0 <= x < math.inf,
            *("kl_coef", "cliprange_high", "vf_coef", "entropy_coef", "missing_eos_penalty"),
            "critic_learning_rate",
        )
        self._check("must be in [0, 1)", lambda x: 0 <= x < 1, "cliprange")
        self._check("must be in [0, 1]", lambda x: 0 <= x <= 1, "gamma", "lam")
        self._check(
            "must be > 0",
            lambda x: 0 < x < math.inf,
            *("temperature", "cliprange_value"),
        )
        self._check(
            "must be > 0",
            lambda x: x is None or x > 0,
            *("score_clip", "early_stop_kl", "target_kl"),
        )
        for name in ("stop_token", "stop_strings"):
            self._check("must not hold empty strings", lambda x: all(x or []), name)
        self._check("must be > 1", lambda x: x is None or x > 1, "dual_clip")
        self._check("must be finite", lambda x: x is None or math.isfinite(x), "missing_eos_score")
        self._check(f"must be one of {KL_ESTIMATORS}", KL_ESTIMATORS.__contains__, "kl_estimator")
        self._check(f"must be one of {ADAPTIVE_KL}", ADAPTIVE_KL.__contains__, "adaptive_kl")
        self._check(
            f"must be one of {SCORE_SCALINGS}", SCORE_SCALINGS.__contains__, "score_scaling"
        )
        self._check(
            "must be finite numbers",
            lambda x: x is None or all(map(math.isfinite, x)),
            "reward_weights",
        )
        self._check(
            f"must be in [0, response_length = {self.response_length}]",
            lambda x: 0 <= x <= self.response_length,
            "min_response_length",
        )
        self._check(
            "must be two numbers of tokens, the least (>= 1) and the most",
            lambda x: len(x) == 2 and 1 <= x[0] <= x[1],
            "text_prompt_length",
        )
        if self.missing_eos_penalty and self.missing_eos_score is not None:
            raise UserError(
                "missing_eos_penalty subtracts from a score that missing_eos_score replaces: "
                "give one of them"
            )
        if self.adaptive_kl == "sequence" and self.target_kl is None:
            self.target_kl = 6.0
        if self.adaptive_kl == "token" and self.target_kl is None:
            raise UserError("adaptive_kl token needs target_kl: the nats per token to aim at")
        if self.adaptive_kl != "none" and self.kl_coef == 0:
            raise UserError("kl_coef must be > 0 for adaptive_kl to change it, got 0")
        if self.share_trunk and self.critic_model_path is not None:
            raise UserError("share_trunk leaves no room for critic_model_path: give one of them")
        if self.rollout_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise UserError("rollout_batch_size sets gradient_accumulation_steps: give one of them")

    def responses_per_iteration(self, num_processes: int) -> int:
        """Responses of one iteration, over all processes."""
        step = self.per_device_train_batch_size * self.num_mini_batches * num_processes
        if self.rollout_batch_size is None:
            return step * self.gradient_accumulation_steps
        if self.rollout_batch_size % step:
            raise UserError(
                f"rollout_batch_size {self.rollout_batch_size} must be a multiple of "
                f"per_device_train_batch_size * num_mini_batches * processes = "
                f"{self.per_device_train_batch_size} * {self.num_mini_batches} * {num_processes} = "
                f"{step}: try {math.ceil(self.rollout_batch_size / step) * step}"
            )
        return self.rollout_batch_size
