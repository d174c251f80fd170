"""The configuration of the classic trainer, and the sampler of lengths that its scripts use."""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf.errors import UserError

TRACKERS = (None, "tensorboard", "wandb")
# The estimators of ppo_kernels.kl_estimate by the names that the KL penalty has here.
KL_ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2"}
KL_PENALTIES = (*KL_ESTIMATORS, "full")


def _number(holds: Callable[[Real], bool]) -> Callable[[Any], bool]:
    """Tells whether something is a number for which the rule holds."""
    return lambda x: isinstance(x, Real) and holds(x)


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class PPOConfig:
    """The fields of TRL 0.11.4 with its defaults, and `temperature`. Raises UserError."""

    exp_name: str = _option(Path(sys.argv[0]).stem, "Name of the experiment; only recorded.")
    seed: int = _option(0, "Seed of Python, NumPy and torch, set when the trainer is made.")
    log_with: Literal["wandb", "tensorboard"] | None = _option(None, "Where log_stats writes.")
    task_name: str | None = _option(None, "Name of the task; only recorded.")
    model_name: str = _option("gpt2", "Name of the model; only recorded.")
    query_dataset: str = _option("stanfordnlp/imdb", "Name of the data; only recorded.")
    reward_model: str = _option(
        "sentiment-analysis:lvwerra/distilbert-imdb", "Name of the reward model; only recorded."
    )
    remove_unused_columns: bool = _option(
        True, "Keep only the data's columns input_ids, attention_mask, query, response and label."
    )
    tracker_kwargs: dict = field(
        default_factory=dict, metadata={"help": "Arguments of log_with's writer, under its name."}
    )
    accelerator_kwargs: dict = field(default_factory=dict, metadata={"help": "Must be empty."})
    project_kwargs: dict = field(
        default_factory=dict,
        metadata={"help": "logging_dir or project_dir: TensorBoard's folder (default: runs)."},
    )
    tracker_project_name: str = _option("trl", "Folder in that, or wandb project, of the logs.")
    push_to_hub_if_best_kwargs: dict = field(
        default_factory=dict,
        metadata={"help": "Arguments of push_to_hub, for a push when scores are best; repo_id."},
    )
    steps: int = _option(20000, "Samples of the whole run; only total_ppo_epochs follows from it.")
    learning_rate: float = _option(1.41e-5, "Learning rate of Adam.")
    adap_kl_ctrl: bool = _option(True, "Adapt the KL coefficient to target; else it is fixed.")
    init_kl_coef: float = _option(0.2, "Weight of the KL penalty, at first.")
    kl_penalty: Literal["kl", "abs", "mse", "full"] = _option(
        "kl",
        "log π - log π_ref, its absolute value, half its square, or the KL of the whole "
        "distributions.",
    )
    target: float = _option(
        6.0, "KL of a response, in nats, that the adaptive coefficient aims at."
    )
    horizon: float = _option(10000.0, "Responses over which the coefficient adapts.")
    gamma: float = _option(1.0, "Discount factor.")
    lam: float = _option(0.95, "Lambda of generalised advantage estimation.")
    cliprange: float = _option(0.2, "The ratio is clipped to 1 +- cliprange.")
    cliprange_value: float = _option(0.2, "Values are clipped to the old ones +- cliprange_value.")
    vf_coef: float = _option(0.1, "Weight of the value loss.")
    batch_size: int = _option(128, "Responses of one step().")
    forward_batch_size: int | None = _option(None, "The old name of mini_batch_size.")
    mini_batch_size: int = _option(128, "Responses of one forward and backward pass.")
    gradient_accumulation_steps: int = _option(1, "Passes of one optimizer step.")
    world_size: int | None = _option(None, "Processes; set to 1 by the trainer.")
    ppo_epochs: int = _option(4, "Passes over the batch in one step().")
    temperature: float = _option(1.0, "Divides the logits in generate() and in step().")
    max_grad_norm: float | None = _option(None, "Gradients are clipped to this norm.")
    optimize_cuda_cache: bool | None = _option(None, "The old name of optimize_device_cache.")
    optimize_device_cache: bool = _option(False, "Empty the GPU's cache after each step().")
    early_stopping: bool = _option(False, "End the passes once policykl is above 1.5 target_kl.")
    target_kl: float = _option(1.0, "Bound of early_stopping.")
    compare_steps: int = _option(1, "Steps between two looks whether the model is the best.")
    ratio_threshold: float = _option(10.0, "Minibatches of a greater mean ratio are skipped.")
    use_score_scaling: bool = _option(False, "Divide scores by their running deviation.")
    use_score_norm: bool = _option(
        False, "With use_score_scaling: subtract the running mean of the scores first."
    )
    score_clip: float | None = _option(None, "Scores are then clipped to +-score_clip.")
    whiten_rewards: bool = _option(
        False, "Scale the tokens' rewards to deviation 1 around their mean."
    )
    gradient_checkpointing: bool = _option(
        False, "Compute activations again in the backward pass rather than keep them."
    )
    is_encoder_decoder: bool | None = _option(None, "Set to False by the trainer.")
    is_peft_model: bool | None = _option(None, "Set to False by the trainer.")
    backward_batch_size: int | None = _option(None, "Responses of one optimizer step; computed.")
    global_backward_batch_size: int | None = _option(None, "The same; computed.")
    global_batch_size: int | None = _option(None, "batch_size; computed.")
    dataset_num_proc: int | None = _option(None, "For scripts that prepare data; only recorded.")

    def __post_init__(self):
        if self.forward_batch_size is not None:
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            self.optimize_device_cache = self.optimize_cuda_cache
        self._check(
            "must be an integer >= 1",
            lambda x: isinstance(x, Integral) and x >= 1,
            *("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs"),
            *("compare_steps", "steps"),
        )
        self._check(
            "must be a number >= 0 and finite",
            _number(lambda x: 0 <= x < math.inf),
            *("learning_rate", "init_kl_coef", "vf_coef", "cliprange_value"),
        )
        self._check(
            "must be a number > 0",
            _number(lambda x: x > 0),
            *("target", "horizon", "temperature", "ratio_threshold", "target_kl"),
        )
        self._check(
            "must be a number > 0 or None",
            lambda x: x is None or _number(lambda x: x > 0)(x),
            *("max_grad_norm", "score_clip"),
        )
        self._check("must be a number in [0, 1]", _number(lambda x: 0 <= x <= 1), "gamma", "lam")
        self._check("must be a number in [0, 1)", _number(lambda x: 0 <= x < 1), "cliprange")
        self._check(f"must be one of {KL_PENALTIES}", KL_PENALTIES.__contains__, "kl_penalty")
        self._check(f"must be one of {TRACKERS}", TRACKERS.__contains__, "log_with")
        self._check(
            "must be left out: this trainer runs in one process, without accelerate",
            lambda x: x in (None, 1, {}),
            *("world_size", "accelerator_kwargs"),
        )
        self._check(
            "must be left out: this trainer takes a whole causal language model",
            lambda x: not x,
            *("is_encoder_decoder", "is_peft_model"),
        )
        self._check(
            "must hold repo_id", lambda x: not x or "repo_id" in x, "push_to_hub_if_best_kwargs"
        )
        if self.adap_kl_ctrl and self.batch_size >= 5 * self.horizon:
            raise UserError(
                f"horizon must be more than a fifth of batch_size {self.batch_size}, or the KL "
                f"coefficient could become negative, got {self.horizon}"
            )
        if self.log_with == "wandb" and importlib.util.find_spec("wandb") is None:
            raise UserError("log_with 'wandb' needs wandb: pip install wandb, or take tensorboard")
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise UserError(
                "batch_size must be a multiple of mini_batch_size * gradient_accumulation_steps = "
                f"{self.mini_batch_size} * {self.gradient_accumulation_steps}, got "
                f"{self.batch_size}"
            )
        self.global_backward_batch_size = self.backward_batch_size
        self.global_batch_size = self.batch_size
        self.world_size, self.is_encoder_decoder, self.is_peft_model = 1, False, False
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)

    def _check(self, rule: str, holds: Callable[[Any], bool], *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not holds(value):
                raise UserError(f"{name} {rule}, got {value!r}")

    def to_dict(self) -> dict:
        """The fields by name, and those of a dict under `name/key`."""
        flat = {}
        for name, value in vars(self).items():
            inner = value if isinstance(value, dict) else None
            flat |= {name: value} if inner is None else {f"{name}/{k}": v for k, v in inner.items()}
        return flat


class LengthSampler:
    """Draws lengths from `min_value` up to, but not including, `max_value`; NumPy's seed counts."""

    def __init__(self, min_value: int, max_value: int):
        if not min_value < max_value:
            raise UserError(
                f"max_value must be greater than min_value {min_value}, got {max_value}"
            )
        self.values = range(min_value, max_value)

    def __call__(self) -> int:
        return int(np.random.choice(self.values))
