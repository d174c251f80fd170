"""Reward functions of the user's: found by name, called, and their errors told in one line.

They have surroundings of their own: the current folder, torch's default dtype and the random
generators are to each call as the last one left them, and to the run as the run did.
"""

import asyncio
import atexit
import concurrent.futures
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rlhf.errors import UserError, one_line
from rlhf.run.generators import generators_of_functions

_moved: dict[str, Any] = {}  # the folder and the dtype of the functions, where they are others


def load_function(source: str) -> Any:
    """What `module:name` or `file.py:name` stands for; the current folder counts for modules."""
    place, _, name = source.rpartition(":")
    if not place or not name:
        raise UserError(f"a reward must be module:function or file.py:function, got {source!r}")
    module = _import(place)
    function = getattr(module, name, None)  # once, for a module's __getattr__ may open a model
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value)]
        nearest = difflib.get_close_matches(name, functions, n=1)
        known = ", ".join(functions) or "none"
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {known}"
        raise UserError(f"{place} has no function {name!r}: {hint:.200}")
    return function


def _import(place: str) -> ModuleType:
    """A module by its dotted name, or a file by its path: imported once, known by that path.

    A module may import what is in the current folder, a file what is in its own.
    """
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise UserError(f"reward file {place} does not exist: give file.py:function")
        # Without dots, which would make a package of what stands before the last.
        name, folder = str(path).replace(".", " "), str(path.parent)
    else:
        name, folder = place, ""
    if folder not in sys.path:
        sys.path.append(folder)
    if name in sys.modules:
        return sys.modules[name]
    try:
        importlib.invalidate_caches()
        with _surroundings():
            if not place.endswith(".py"):
                return importlib.import_module(name)
            spec = importlib.util.spec_from_file_location(name, path)
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        frames = traceback.extract_tb(error.__traceback__)[1:]
        frames = [frame for frame in frames if "importlib" not in frame.filename]
        raise UserError(
            f"cannot import {place} for a reward: {one_line(error)}{_place(frames)}"
            f"{_remedy(place, error)}"
        ) from error


def _remedy(place: str, error: BaseException) -> str:
    if "relative import" in str(error):
        return ": give package.module:function, as seen from the folder that holds the package"
    if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
        return ": give a module of the current folder or an installed one, or file.py:function"
    return ""


def call(name: str, function: Callable, arguments: dict):
    """The function's result, awaited where it is to be; what it raises becomes a UserError that
    says where."""
    try:
        with _surroundings():
            result = function(**arguments)
            return _wait_for(result) if inspect.isawaitable(result) else result
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        between = (__file__, *(os.path.dirname(m.__file__) for m in (asyncio, concurrent.futures)))
        frames = [frame for frame in frames if not frame.filename.startswith(between)]
        raise UserError(f"reward {name} raised {one_line(error)}{_place(frames)}") from error


@contextmanager
def _surroundings() -> Iterator[None]:
    """What the module's docstring says."""
    ours = {"folder": _current_folder(), "dtype": torch.get_default_dtype()}
    _enter(_moved)
    try:
        with generators_of_functions():
            yield
    finally:
        theirs = {"folder": _current_folder(), "dtype": torch.get_default_dtype()}
        _moved.clear()
        _moved.update({name: theirs[name] for name in ours if theirs[name] != ours[name]})
        _enter({name: ours[name] for name in _moved})


def _current_folder() -> str | None:
    """None if it has been deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _enter(surroundings: dict[str, Any]) -> None:
    if surroundings.get("folder") is not None:
        os.chdir(surroundings["folder"])
    if "dtype" in surroundings:
        torch.set_default_dtype(surroundings["dtype"])


def _wait_for(awaitable: Awaitable) -> Any:
    """Its result. All are awaited in one event loop, to which the open connections of a client may
    belong; where another loop is running, as in a notebook, that is done in a thread."""

    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _event_loop().run_until_complete(wait())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_event_loop().run_until_complete, wait()).result()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return loop


def _place(frames: list[traceback.FrameSummary]) -> str:
    """The deepest of `frames` in the file of the first, as ' (file.py, line 1)'."""
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
