"""The configuration of generate and evaluate; `training.py` and `ppo.py` have the stages'."""

from dataclasses import dataclass

from rlhf.config.fields import (
    SECTIONS,
    DataOptions,
    ModelOptions,
    ResponseOptions,
    RewardOptions,
    data,
    is_unicode,
    output,
    required,
    responses,
)
from rlhf.errors import UserError

PROMPTS = (
    "Prompts, as for PPO: a .jsonl, .json, .csv (each also .gz) or .parquet file, a folder that "
    "datasets saved or that was cloned from the hub, or a hub id."
)


@dataclass(kw_only=True)
class InferenceConfig(ResponseOptions, DataOptions):
    """What generate and evaluate share: prompts, and how they are answered."""

    dataset_name: str = required(SECTIONS[0], PROMPTS)
    overwrite: bool = output(False, "Replace output_file.")
    num_prompts: int | None = data(None, "Answer only the first so many prompts (default: all).")
    seed: int = responses(0, "Seed of the sampling.")
    temperature: float = responses(1.0, "Divides the logits; 0: the most probable token.")
    greedy = True

    def __post_init__(self):
        super().__post_init__()
        self._check("must be >= 1", lambda x: x is None or x >= 1, "num_prompts")


@dataclass(kw_only=True)
class GenerateConfig(InferenceConfig, ModelOptions):
    """Completions of prompts by a model."""

    model_name_or_path: str = required(SECTIONS[0], "Folder or hub id of the model that answers.")
    dataset_name: str | None = data(None, PROMPTS)
    prompt: list[str] | None = data(None, "Texts to answer as they are, in place of dataset_name.")
    output_file: str = required(
        SECTIONS[1], "JSONL file for prompt, completion, tokens, ended and the data's columns."
    )
    num_completions: int = responses(1, "Completions of each prompt.")

    def __post_init__(self):
        super().__post_init__()
        self._check("must be >= 1", lambda x: x >= 1, "num_completions")
        if bool(self.prompt) == (self.dataset_name is not None):
            raise UserError("give one of prompt and dataset_name, which say what to answer")
        self._check("must be valid Unicode", lambda x: all(map(is_unicode, x or [])), "prompt")


@dataclass(kw_only=True)
class EvaluateConfig(InferenceConfig, RewardOptions):
    """Two policies on the same prompts, compared by judges."""

    policies: list[str] = required(
        SECTIONS[0], "Folders or hub ids of two policies, A and B; B's win rate is that over A."
    )
    reward_funcs: list[str] = required(
        SECTIONS[4],
        "Judges, each by itself: the folder or hub id of a reward model, module:function, or "
        "file.py:function, called as f(prompts, completions, **columns) -> one score (or None) per "
        "completion.",
    )
    output_file: str = required(
        SECTIONS[1], "JSON file for all figures; the answers go beside it, as .jsonl."
    )

    def __post_init__(self):
        super().__post_init__()
        self._check("must name two policies", lambda x: len(x) == 2, "policies")
        self._check("must name a judge", lambda x: len(x) > 0, "reward_funcs")
        self._check("must end in .json", lambda x: x.endswith(".json"), "output_file")
