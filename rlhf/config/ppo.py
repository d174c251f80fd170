"""The configuration of PPO, see `training.py`."""

import math
from dataclasses import dataclass

from rlhf.config.fields import (
    ResponseOptions,
    RewardOptions,
    data,
    hardware,
    kl,
    learning,
    output,
    ppo,
    rewards,
)
from rlhf.config.training import TrainConfig
from rlhf.errors import UserError

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
ADAPTIVE_KL = ("none", "sequence", "token")
LOGITS_FROM = ("auto", "hidden", "logits")
SCORE_SCALINGS = ("none", "running", "reference")


@dataclass(kw_only=True)
class PPOConfig(ResponseOptions, RewardOptions, TrainConfig):
    """PPO with a critic. One iteration collects rollout_batch_size responses and takes
    num_ppo_epochs * num_mini_batches optimizer steps; every 'step' of logging_steps, save_steps and
    eval_steps is an iteration."""

    logging_steps: int = output(1, "Iterations between two lines of metrics.")
    learning_rate: float = learning(1e-5, "Peak learning rate of the policy.")
    critic_learning_rate: float | None = learning(
        None, "Peak learning rate of the critic (default: learning_rate)."
    )
    critic_warmup: int = learning(0, "Iterations at the start in which only the critic learns.")
    critic_model_path: str | None = data(
        None,
        "Folder or hub id that the critic starts from (default: the first reward model with the "
        "policy's tokenizer, else model_name_or_path with a new head).",
    )
    share_trunk: bool = data(
        False, "Make the critic a value head on the policy's own trunk, not a model of its own."
    )
    rollout_batch_size: int | None = hardware(
        None,
        "Responses of one iteration over all processes, which sets gradient_accumulation_steps "
        "(default: per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches * "
        "the number of processes).",
    )

    logits_from: str = hardware(
        "auto",
        "What log-probs and the loss are made of: last hidden states, so that no pass holds logits "
        "of all tokens, or logits; auto: hidden for a vocabulary of 32,000 and more, if the head "
        f"allows it: {', '.join(LOGITS_FROM)}.",
    )

    reward_weights: list[float] | None = rewards(
        None, "Weight of each of reward_funcs (default: 1 each)."
    )
    score_scaling: str = rewards(
        "none",
        "Scores of responses (not of tokens) become (score - mean) / std, with the moments of all "
        "scores so far (running) or of the first iteration, when the policy still is the reference "
        "(reference); or none.",
    )
    score_clip: float | None = rewards(
        None, "Scores are then clipped to +-score_clip (default: not clipped)."
    )
    missing_eos_penalty: float = rewards(
        0.0, "Subtracted, last of all, from the score of a response that did not end by itself."
    )
    missing_eos_score: float | None = rewards(
        None, "Replaces the score of a response that did not end by itself (default: it is kept)."
    )
    whiten_rewards: bool = rewards(
        False, "Centre and scale the rewards of an iteration's tokens, before GAE."
    )

    kl_coef: float = kl(0.05, "Weight of the KL penalty in the reward (adaptive_kl: at first).")
    kl_estimator: str = kl(
        "k1", f"Estimate of the KL divergence in the penalty: {', '.join(KL_ESTIMATORS)}."
    )
    adaptive_kl: str = kl(
        "none",
        "Adapt kl_coef until the KL of an iteration is target_kl: that of a whole response "
        "(sequence), of a token on average (token), or none.",
    )
    target_kl: float | None = kl(
        None,
        "KL, in nats, that adaptive_kl aims at (default for sequence: 6; to stop updates see "
        "early_stop_kl).",
    )
    kl_horizon: int = kl(10_000, "Responses over which adaptive_kl changes kl_coef.")
    early_stop_kl: float | None = kl(
        None,
        "End an iteration's update once a minibatch's approxkl is above this (default: never).",
    )

    total_episodes: int = ppo(10_000, "Responses to collect in all, rounded up to iterations.")
    num_ppo_epochs: int = ppo(4, "Passes over each iteration's responses.")
    num_mini_batches: int = ppo(1, "Optimizer steps in each of these passes.")
    cliprange: float = ppo(0.2, "The ratio is clipped from below at 1 - cliprange.")
    cliprange_high: float | None = ppo(
        None, "The ratio is clipped from above at 1 + cliprange_high (default: cliprange)."
    )
    dual_clip: float | None = ppo(
        None,
        "Where the advantage is negative the loss is at most dual_clip * |advantage| (> 1; "
        "default: unbounded).",
    )
    cliprange_value: float = ppo(0.2, "Clip range of the critic's values.")
    vf_coef: float = ppo(0.5, "Weight of the value loss.")
    entropy_coef: float = ppo(0.0, "Weight of the entropy bonus.")
    gamma: float = ppo(1.0, "Discount factor.")
    lam: float = ppo(0.95, "Lambda of generalised advantage estimation.")
    whiten_advantages: bool = ppo(True, "Centre and scale the advantages of an iteration.")

    def __post_init__(self):
        super().__post_init__()
        if self.cliprange_high is None:
            self.cliprange_high = self.cliprange
        if self.critic_learning_rate is None:
            self.critic_learning_rate = self.learning_rate
        self._check(
            "must be >= 1",
            lambda x: x is None or x >= 1,
            *("total_episodes", "num_ppo_epochs", "num_mini_batches", "kl_horizon"),
            "rollout_batch_size",
        )
        self._check("must be >= 0", lambda x: x >= 0, "critic_warmup")
        self._check(
            "must be >= 0 and finite",
            lambda x: 0 <= x < math.inf,
            *("kl_coef", "cliprange_high", "vf_coef", "entropy_coef", "missing_eos_penalty"),
            "critic_learning_rate",
        )
        self._check("must be in [0, 1)", lambda x: 0 <= x < 1, "cliprange")
        self._check("must be in [0, 1]", lambda x: 0 <= x <= 1, "gamma", "lam")
        self._check("must be > 0", lambda x: 0 < x < math.inf, "cliprange_value")
        optional = "score_clip", "early_stop_kl", "target_kl"
        self._check("must be > 0", lambda x: x is None or x > 0, *optional)
        self._check("must be > 1", lambda x: x is None or x > 1, "dual_clip")
        self._check("must be finite", lambda x: x is None or math.isfinite(x), "missing_eos_score")
        self._check_choices(kl_estimator=KL_ESTIMATORS, adaptive_kl=ADAPTIVE_KL)
        self._check_choices(score_scaling=SCORE_SCALINGS, logits_from=LOGITS_FROM)
        self._check(
            "must be finite numbers",
            lambda x: x is None or all(map(math.isfinite, x)),
            "reward_weights",
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
