"""This process's random generators, which the run and the user's functions have in common, and what
each of the two finds in them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import set_seed

_functions: dict | None = None  # as the user's functions left them; None: as the run did


def seed_all(seed: int) -> None:
    """Seeds the generators, for the user's functions too."""
    global _functions
    _functions = None
    set_seed(seed)


def random_state() -> dict:
    """Their state: Python's, NumPy's, and torch's on the CPU and on the current GPU; and, in
    `functions`, the same as the user's functions left them."""
    return _get() | {"functions": _functions}


def set_random_state(state: dict) -> None:
    """Sets them to a state of `random_state`."""
    global _functions
    _set(state)
    _functions = state.get("functions")


@contextmanager
def generators_of_functions() -> Iterator[None]:
    """Within it they are as the user's functions left them, and afterwards as the run did: whether
    a function seeds them, or how often it draws, does not change the run."""
    global _functions
    ours = _get()
    if _functions is not None:
        _set(_functions)
    try:
        yield
    finally:
        _functions = _get()
        _set(ours)


def _get() -> dict:
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"] = {
        "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "pos": numpy_state["state"]["pos"],
    }
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set(state: dict) -> None:
    random.setstate(state["python"])
    key = state["numpy"]["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(state["numpy"] | {"state": state["numpy"]["state"] | {"key": key}})
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
