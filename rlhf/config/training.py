"""The configuration of SFT and of the reward model, and what all stages share: flat dataclasses.

The names are those of Hugging Face's trainers. `rlhf.config.parser` turns them into command-line
options, as `transformers.HfArgumentParser` would, and a YAML file may hold the same names. Every
field's help text is its documentation, its section the heading it stands under.
"""

import math
from dataclasses import dataclass

from rlhf.config.fields import (
    SECTIONS,
    DataOptions,
    ModelOptions,
    data,
    hardware,
    learning,
    output,
    required,
)
from rlhf.errors import UserError

SCHEDULERS = ("linear", "cosine", "inverse_sqrt", "constant", "constant_with_warmup")
REPORTERS = ("tensorboard", "none")
OPTIMIZERS = ("adamw", "adamw_tensorflow")


@dataclass(kw_only=True)
class TrainConfig(DataOptions, ModelOptions):
    """What the three stages share."""

    eval_dataset_name: str | None = data(None, "Held-out data, in the same formats.")
    eval_dataset_split: str = data("test", "Split of held-out data that has several.")

    output_dir: str = required(SECTIONS[1], "Folder for the trained model, its metrics and plots.")
    overwrite_output_dir: bool = output(
        False, "Replace an earlier run of the same stage in output_dir."
    )
    logging_steps: int = output(10, "Steps between two lines of metrics.")
    report_to: str = output(
        "tensorboard", "What shows metrics: tensorboard (PPO: and report.html at the end), or none."
    )
    eval_steps: int = output(0, "Steps between two measurements on held-out data; 0: at the end.")
    save_steps: int = output(100, "Steps between two checkpoints; 0: none.")
    save_total_limit: int = output(2, "Checkpoints to keep, the best one not counted; 0: all.")
    resume_from_checkpoint: str | None = output(
        None,
        "Checkpoint folder to go on from; 'auto': the newest whole one in output_dir, or the "
        "beginning if there is none.",
    )
    resume_loosely: bool = output(
        False,
        "Go on also with other batch sizes, another length of the run, another logging, evaluation "
        "or gradient_checkpointing, or another number of processes; weights and metrics are then "
        "not, bit for bit, those of a run that never stopped.",
    )
    metric_for_best_model: str | None = output(
        None,
        "Metric by which the best checkpoint is known; it is kept whatever save_total_limit. Each "
        "must be measured where it is saved: save_steps is a multiple of eval_steps for a metric "
        "eval/..., and else of logging_steps.",
    )
    greater_is_better: bool | None = output(
        None,
        "Whether more of metric_for_best_model is better, true or false (default: false for a name "
        "that ends in loss, perplexity or kl, else true).",
    )
    load_best_model_at_end: bool = output(
        False, "Leave the best checkpoint's model in output_dir rather than the last."
    )

    learning_rate: float = learning(1e-4, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = learning(
        "linear", f"Learning-rate schedule after the warm-up: {', '.join(SCHEDULERS)}."
    )
    warmup_ratio: float = learning(0.0, "Share of the steps over which the rate rises from 0.")
    optim: str = learning(
        "adamw",
        "AdamW as PyTorch has it, or with TensorFlow's epsilon, which the bias correction does not "
        "scale: gradients below some 30 adam_epsilon then move their weights less in the first "
        f"steps (so with 1e-5, hardly with 1e-8): {', '.join(OPTIMIZERS)}.",
    )
    weight_decay: float = learning(0.0, "Weight decay of AdamW, on matrices only.")
    adam_beta1: float = learning(0.9, "AdamW's decay of the mean of gradients.")
    adam_beta2: float = learning(0.999, "AdamW's decay of the mean of squared gradients.")
    adam_epsilon: float = learning(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = learning(1.0, "Gradients are clipped to this norm.")

    per_device_train_batch_size: int = hardware(
        8, "Rows of data (PPO: responses) in one forward and backward pass of one process."
    )
    gradient_accumulation_steps: int = hardware(
        1, "Passes of each process that one optimizer step sums over."
    )
    gradient_checkpointing: bool = hardware(
        False, "Compute activations again in the backward pass rather than keep them."
    )

    def __post_init__(self):
        super().__post_init__()
        self._check("must be > 0", lambda x: 0 < x < math.inf, "max_grad_norm", "adam_epsilon")
        self._check(
            "must be >= 0 and finite", lambda x: 0 <= x < math.inf, "learning_rate", "weight_decay"
        )
        self._check("must be in [0, 1]", lambda x: 0 <= x <= 1, "warmup_ratio")
        self._check("must be in [0, 1)", lambda x: 0 <= x < 1, "adam_beta1", "adam_beta2")
        self._check(
            "must be >= 1",
            lambda x: x >= 1,
            *("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"),
        )
        self._check(
            "must be >= 0", lambda x: x >= 0, "eval_steps", "save_steps", "save_total_limit"
        )
        self._check_choices(lr_scheduler_type=SCHEDULERS, report_to=REPORTERS, optim=OPTIMIZERS)
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


@dataclass(kw_only=True)
class SupervisedConfig(TrainConfig):
    """What the stages that learn from a fixed data set share."""

    num_train_epochs: float = learning(1.0, "Passes over the training data.")
    max_steps: int = learning(-1, "Optimizer steps; if > 0 it replaces num_train_epochs.")
    max_length: int = data(1024, "Longer sequences are cut to this many tokens.")

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

    append_eos: bool = data(
        True,
        "End every answer with EOS, where the score is then read. Turn it off when the policy's "
        "responses are cut at a length and do not end with EOS.",
    )
    center_rewards_coefficient: float = learning(
        0.0, "Weight of (score_chosen + score_rejected)^2 in the loss, which keeps scores near 0."
    )

    def __post_init__(self):
        super().__post_init__()
        rule = "must be >= 0 and finite"
        self._check(rule, lambda x: 0 <= x < math.inf, "center_rewards_coefficient")
