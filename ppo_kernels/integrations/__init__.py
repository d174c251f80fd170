"""The ops inside other people's trainers: functions of their names, and `patch` to swap them in.

`trl`, `verl`, `openrlhf` and `torchrl` hold functions with the names, signatures and results of
that package's own, on `ppo_kernels`; each says which version it mirrors. None imports the package.
"""

import contextlib
import importlib
import inspect
import sys

from ppo_kernels import checks
from ppo_kernels.integrations import openrlhf, torchrl, trl, verl

_PEERS = {"trl": trl, "verl": verl, "openrlhf": openrlhf, "torchrl": torchrl}


def _signature(function):
    """Without annotations; that of an autograd function is its forward's."""
    signature = inspect.signature(getattr(function, "forward", function))
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=signature.empty)


def _original(path, ours):
    """The function at `path` that `ours` stands in for; None where there is none."""
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise ImportError(f"patch needs {path}, which cannot be imported: {error}") from error
    theirs = getattr(module, ours.__name__, None)
    if theirs is None:
        return None
    # Ours may have options that only later versions have.
    expected, got = _signature(ours), _signature(theirs)
    parameters = list(got.parameters.values())
    if parameters != list(expected.parameters.values())[: len(parameters)]:
        raise TypeError(
            f"{path}.{ours.__name__} must have the signature {expected}, got {got}: this version "
            "is not supported"
        )
    return theirs


def _swaps(peer):
    """(theirs, ours) of each function to swap."""
    for path, functions in peer.REPLACES.items():
        for ours in functions:
            theirs = _original(path, ours)
            if theirs is None:
                raise AttributeError(
                    f"{path} has no {ours.__name__}: this version is not supported"
                )
            yield theirs, ours
    for path, functions in getattr(peer, "REPLACES_IN_LATER_VERSIONS", {}).items():
        for ours in functions:
            try:
                theirs = _original(path, ours)
            except ImportError:
                continue  # What cannot be imported nobody calls.
            if theirs is not None:
                yield theirs, ours


def _replace(package, old, new):
    """In all modules of a package that are imported, and in their dicts (verl's registries)."""
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] != package:
            continue
        names = vars(module)
        for holder in (names, *[x for x in names.values() if type(x) is dict]):
            for key in [key for key, value in holder.items() if value is old]:
                holder[key] = new


class patch(contextlib.ContextDecorator):
    """Within `with patch(peer):` (or a function decorated so), or between `patch(peer).enable()`
    and that one's `disable()`, the peer's trainers run on our ops.

    Every module of the peer that holds one of the functions, under whatever name, holds ours, also
    one that is first imported within; all have their own back afterwards, whatever was raised.
    `patch` may be repeated, and nested: the first one entered ends it for all, also where it is
    left before the others. What copied a function elsewhere keeps it: your own `from trl...
    import`, a `torch.compile(function)` or `partial` that an object made when it was built. So
    build trainers within. Modules belong to the process: all its threads see the change, and worker
    processes (Ray's, torchrun's) each need a `patch` of their own.

    Args:
        peer: "trl", "verl", "openrlhf" or "torchrl".

    Raises:
        ValueError: an unknown name.
        ImportError: the peer, or what it needs, is not installed.
        AttributeError, TypeError: its version has not got the function, or with other parameters.
        RuntimeError: `disable()` of what is not enabled.
    """

    def __init__(self, peer: str) -> None:
        checks.choice("peer", peer, tuple(_PEERS))
        self.peer = peer
        self._swapped: list = []  # by each `enable` that is not undone yet

    def enable(self) -> None:
        # Within another patch theirs are ours already, and the outer one gives them back.
        swaps = list(_swaps(_PEERS[self.peer]))
        self._swapped.append(swaps)
        try:
            for theirs, ours in swaps:
                if theirs is not ours:
                    ours.theirs = theirs  # For calls that ours hands on.
                _replace(self.peer, theirs, ours)
        except BaseException:
            self.disable()
            raise

    def disable(self) -> None:
        if not self._swapped:
            raise RuntimeError(f"patch({self.peer!r}) must be enabled to be disabled, by itself")
        for theirs, ours in self._swapped.pop():
            _replace(self.peer, ours, theirs)

    def __enter__(self) -> None:
        self.enable()

    def __exit__(self, *error: object) -> None:
        self.disable()
