"""What the configurations of all commands are made of: fields with a help text under a heading, and
the options that several commands share."""

import math
import os
import re
from dataclasses import dataclass, field
from functools import partial

from rlhf.errors import UserError, quote

# The headings, in the order of the help and of the YAML files.
SECTIONS = (
    "Models and data",
    "Output and checkpoints",
    "Learning",
    "Batches and precision",
    "Rewards",
    "KL penalty",
    "PPO",
    "Responses",
)

# The options that name files, folders, or what may be one.
PATHS = {
    *("model_name_or_path", "critic_model_path", "policies", "reward_funcs"),
    *("dataset_name", "eval_dataset_name"),
    *("output_dir", "output_file", "resume_from_checkpoint"),
}

# Modules of reward functions, by the names that stand in the configurations of earlier runs.
MOVED = {
    "rlhf.tasks.reviews": "rlhf.demo.reviews",
    "rlhf.recipes.sentiment": "examples/imdb/sentiment.py",
}

DTYPES = ("float32", "bfloat16", "float16", "auto")


def option(section: str, default, text: str):
    metadata = {"help": text, "section": section}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def required(section: str, text: str):
    return field(metadata={"help": text, "section": section})


data = partial(option, SECTIONS[0])
output = partial(option, SECTIONS[1])
learning = partial(option, SECTIONS[2])
hardware = partial(option, SECTIONS[3])
rewards = partial(option, SECTIONS[4])
kl = partial(option, SECTIONS[5])
ppo = partial(option, SECTIONS[6])
responses = partial(option, SECTIONS[7])


def _path_as_text(value: object) -> object:
    if isinstance(value, list):
        return [_path_as_text(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _moved(name: object) -> object:
    module, _, function = str(name).partition(":")
    return f"{MOVED[module]}:{function}" if module in MOVED else name


def expand(name: str, path: str) -> str:
    """The path that an option gives, its `~` and `$HOME` replaced as a shell would have done. What
    is there under the very name stays."""
    if "\0" in path:
        raise UserError(f"{name} must not hold the character NUL, got {quote(path)}")
    if os.path.lexists(path):
        return path
    expanded = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$(\w+|\{[^}]*\})", expanded):
        raise UserError(
            f"{name} {quote(path)} holds {unset[0]}, and there is no such variable in the "
            "environment: set it, or write out the path"
        )
    return expanded


def is_unicode(text: str) -> bool:
    """Tells whether a tokenizer takes the text: not half a surrogate pair, as JSON may hold one,
    and as the command line has for a byte of another encoding."""
    return re.search(r"[\ud800-\udfff]", text) is None


@dataclass(kw_only=True)
class Options:
    """What every command has that runs a model."""

    seed: int = learning(0, "Seed of every random choice.")
    per_device_eval_batch_size: int = hardware(64, "Sequences in one pass without gradient.")
    bf16: bool = hardware(False, "Run the models in bfloat16 autocast (the weights stay fp32).")
    dtype: str | None = hardware(
        None,
        "Type of all weights, also of those that learn: float32, bfloat16, float16, or auto, that "
        "of the folder (default: float32; on a GPU bfloat16 for reward models, and for policies "
        "that only answer).",
    )
    attn_implementation: str | None = hardware(
        None, "Attention of the models, such as sdpa, eager or flash_attention_2 (default: theirs)."
    )
    trust_remote_code: bool = data(
        False, "Run Python code that model folders bring with them. It can do anything."
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            value = _path_as_text(value)
            if name in PATHS and isinstance(value, str):
                value = expand(name, value)
            elif name in PATHS and isinstance(value, list):
                value = [expand(name, item) for item in value]
            setattr(self, name, value)
        self._check("must be in [0, 2**32)", lambda x: 0 <= x < 2**32, "seed")
        self._check("must be >= 1", lambda x: x >= 1, "per_device_eval_batch_size")
        self._check_choices(dtype=(None, *DTYPES))

    def _check(self, rule: str, holds, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not holds(value):
                raise UserError(f"{name} {rule}, got {quote(value)}")

    def _check_choices(self, **choices: tuple[str, ...]) -> None:
        for name, allowed in choices.items():
            self._check(f"must be one of {allowed}", allowed.__contains__, name)


@dataclass(kw_only=True)
class ModelOptions(Options):
    model_name_or_path: str = required(SECTIONS[0], "Folder or hub id of the model to start from.")
    revision: str | None = data(
        None, "Branch, tag or commit of model_name_or_path on the hub (default: main)."
    )


@dataclass(kw_only=True)
class DataOptions(Options):
    dataset_name: str = required(
        SECTIONS[0],
        "Training data: a .jsonl, .json, .csv (each also .gz) or .parquet file, a folder that "
        "datasets saved or that was cloned from the hub, or a hub id.",
    )
    dataset_config_name: str | None = data(
        None, "Configuration of a data set from the hub, or of its clone."
    )
    dataset_split: str = data("train", "Split of a data set that has several.")


@dataclass(kw_only=True)
class RewardOptions(Options):
    reward_funcs: list[str] = rewards(
        [],
        "What scores a response; several are weighted and summed. Each is the folder or hub id of "
        "a reward model, module:function, or file.py:function, called as f(prompts, completions, "
        "**columns) -> one score (or None, or a list with one for each token) per completion.",
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.reward_funcs, list):
            self.reward_funcs = [_moved(name) for name in self.reward_funcs]


@dataclass(kw_only=True)
class ResponseOptions(Options):
    """How a policy answers prompts."""

    temperature: float = responses(
        1.0, "Divides the logits everywhere: sampling, update, reference."
    )
    top_k: int = responses(0, "Sample from the top_k most probable tokens; 0: from all.")
    top_p: float = responses(
        1.0, "Sample from the fewest most probable tokens that have this much probability."
    )
    min_p: float = responses(
        0.0, "Sample from tokens with this share of the most probable one's probability and more."
    )
    response_length: int = responses(64, "Longest response, in tokens.")
    min_response_length: int = responses(
        0,
        "Neither EOS nor a stop_token is sampled before this many tokens, and no stop_strings "
        "end a response.",
    )
    sample_response_length: bool = responses(
        False, "Draw each response's longest length from [min_response_length, response_length]."
    )
    stop_token: list[str] | None = responses(
        None, "Tokens that end a response as EOS does (the last token is kept)."
    )
    stop_strings: list[str] | None = responses(
        None, "Texts that end a response, with the token that completes one."
    )
    max_prompt_length: int = responses(512, "Of longer prompts BOS and the last tokens are kept.")
    text_prompt_length: list[int] = responses(
        [2, 8],
        "Where the data has text rather than prompt: the first tokens of each text are a prompt, "
        "so many at least and at most.",
    )

    greedy = False  # whether a temperature of 0, which takes the most probable token, is allowed

    def __post_init__(self):
        super().__post_init__()
        if not (self.greedy and self.temperature == 0):
            self._check("must be > 0", lambda x: 0 < x < math.inf, "temperature")
        self._check("must be >= 0", lambda x: x >= 0, "top_k")
        self._check("must be in (0, 1]", lambda x: 0 < x <= 1, "top_p")
        self._check("must be in [0, 1]", lambda x: 0 <= x <= 1, "min_p")
        self._check("must be >= 1", lambda x: x >= 1, "response_length", "max_prompt_length")
        for name in ("stop_token", "stop_strings"):
            self._check("must not hold empty strings", lambda x: all(x or []), name)
            self._check("must be valid Unicode", lambda x: all(map(is_unicode, x or [])), name)
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
