"""RLHF from end to end: supervised fine-tuning, a reward model, and PPO."""

import importlib.util
import sys

# What the extra `rlhf` of pyproject.toml brings, by the names that it is imported by.
PACKAGES = (
    *("transformers", "datasets", "tokenizers", "safetensors", "tensorboard"),
    *("rich", "matplotlib", "yaml", "jinja2", "numpy"),
)
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
HOW_TO_INSTALL = f'the trainer needs {", ".join(MISSING)}: pip install "ppo-kernels[rlhf]"'


class _Refusal:
    """The importer of the trainer's modules where packages are missing: says how to get them."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.startswith("rlhf.") and name != "rlhf.__main__":
            raise ImportError(HOW_TO_INSTALL)


if MISSING:
    sys.meta_path.insert(0, _Refusal)
