"""What a checkpoint is made of: models, and the state of a run."""

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError, one_line
from rlhf.models.weights import quiet, restore_padding, weights_lacking
from rlhf.run.files import GO_ON, disk_errors, remove, saving_name, sync, sync_tree

# Integers as wide as an element, by its bytes.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Entries of a model's configuration that tell where it comes from and how it is run.
PROVENANCE = {
    *("_name_or_path", "architectures", "transformers_version"),
    *("dtype", "torch_dtype", "use_cache", "_attn_implementation"),
}


def save_state(path: Path, state: dict) -> None:
    """Saves tensors, numbers, strings, and lists, tuples and dicts of them."""
    # Through Python's file, or torch's error would not tell that the disk is full.
    with path.open("wb") as file:
        torch.save(state, file)


def load_state(path: Path, *, mmap: bool = False) -> dict:
    """What `save_state` saved, its tensors on the CPU; with `mmap` they are not read before use."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def hash_data(rows: Iterable) -> str:
    """SHA-256 of rows of token ids, text, or what else JSON can hold; of what it cannot, Python's
    representation counts."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=_represent).encode() + b"\n")
    return digest.hexdigest()


def _represent(value: object) -> str:
    """Without the address that some objects have in it, which every process gives anew."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def hash_weights(models: Iterable[nn.Module]) -> str:
    """SHA-256 of the models' parameters and buffers, and of configurations: the name and shape of
    each, and the sum of its elements' bits as integers, which is exact, fast and the same on every
    device."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, torch.Tensor):
                if tensor.is_complex():
                    tensor = torch.view_as_real(tensor)
                bits = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
                # In parts, for a sum as int64 takes a copy as int64.
                total = sum(part.sum(dtype=torch.int64).item() for part in bits.split(1 << 24))
                digest.update(f"{name} {tuple(tensor.shape)} {total}\n".encode())
        if isinstance(model, PreTrainedModel):
            digest.update(hash_config(model).encode())
    return digest.hexdigest()


def hash_config(model: PreTrainedModel) -> str:
    """SHA-256 of what in a model's configuration bears on its numbers."""
    values = model.config.to_diff_dict()
    return hash_data([{name: values[name] for name in sorted(values.keys() - PROVENANCE)}])


def save_model(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    remedy: str = GO_ON,
) -> None:
    """Writes model and tokenizer into the folder `path`, complete or not at all.

    They are written to a temporary folder inside `path` and moved from there. `config.json`,
    without which transformers' Auto classes open nothing, is the first to go of an earlier model
    and the last to come of this one, so that no weights are read that do not belong to it. Files of
    other names stay. Errors of the disk end with `remedy`.
    """
    temporary = saving_name(path / "model")
    with disk_errors(f"save the model in {path}", remedy):
        try:
            temporary.mkdir(parents=True)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            sync_tree(temporary)
            (path / "config.json").unlink(missing_ok=True)
            sync(path)
            for pattern in ("model.safetensors*", "model-?????-of-?????.safetensors"):
                for weights in path.glob(pattern):
                    weights.unlink()
            for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == "config.json"):
                remove(path / entry.name)
                sync(path)
                os.replace(entry, path / entry.name)
            sync(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copies the weights that `save_model` wrote to `folder` into the model's own tensors."""
    try:
        with quiet():
            saved, loading = type(model).from_pretrained(
                folder,
                config=copy.deepcopy(model.config),
                dtype=torch.float32,  # holds every narrower number exactly
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # a damaged folder raises whatever its reader raises
        raise UserError(f"cannot load the weights in {folder}: {one_line(error)}") from error
    wrong = weights_lacking(loading)
    wrong += [f"{name}, which the model lacks" for name in sorted(loading["unexpected_keys"])]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"the weights in {folder} are of another model, they hold {wrong[0]}{more}: go on "
            "with the model that the run was started with"
        )
    restore_padding(saved, folder)
    model.load_state_dict(saved.state_dict())
