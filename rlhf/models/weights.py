"""Weights of a model's folder: every one must be accounted for, because transformers gives what a
folder lacks random values, each time others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file, logging

from rlhf.errors import UserError
from rlhf.run.terminal import say


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from telling of weights what `account_for` tells or refuses."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def weights_lacking(loading: dict[str, Any]) -> list[str]:
    """Names, of transformers' loading information, each weight of the model that the folder lacks
    or has in another shape."""
    wrong = [f"no {name}" for name in sorted(loading["missing_keys"])]
    wrong += [
        f"{name} of shape {tuple(there)}, where the model's is {tuple(here)}"
        for name, there, here in sorted(loading["mismatched_keys"])
    ]
    return wrong


def account_for(path: str, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Raises UserError if the folder lacks weights of the model; says which it has besides, and
    which transformers did not leave as they were."""
    wrong, unused = weights_lacking(loading), sorted(loading["unexpected_keys"])
    if wrong:
        besides = f", but {unused[0]}" if unused else ""
        raise UserError(
            f"the weights in {path} do not fit a {type(model).__name__}: there is {wrong[0]}"
            f"{besides} ({len(wrong)} do not fit): save them under transformers' names, all of them"
        )
    if unused:
        say(f"{path}: {len(unused)} weights are not used, such as {unused[0]}")
    folder = Path(path)
    if not folder.is_dir():
        commit = getattr(model.config, "_commit_hash", None)
        folder = Path(cached_file(path, "config.json", revision=commit)).parent
    if line := restore_padding(model, folder):
        say(line)


@torch.no_grad()
def restore_padding(model: PreTrainedModel, folder: Path) -> str | None:
    """Puts back embeddings of pad tokens, which some classes set to 0 whenever they are opened;
    returns a line that says so, None if there is none that the folder's safetensors files have."""
    line = None
    for name, module in model.named_modules():
        row = getattr(module, "padding_idx", None)
        if not isinstance(module, nn.Embedding) or row is None or module.weight[row].any():
            continue
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as saved:
                names = saved.keys()
                if f"{name}.weight" in names:
                    embedding = saved.get_slice(f"{name}.weight")[row]
                    if embedding.any():
                        module.weight[row] = embedding.to(module.weight)
                        line = (
                            f"transformers sets {name}.weight[{row}] of a {type(model).__name__} "
                            "to 0 whenever it opens one: here it is what was saved, elsewhere 0"
                        )
    return line
