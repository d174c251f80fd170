"""What a compiled GPU kernel uses: registers, spills, and what its loops load and compute."""

import os
import re
import subprocess
import tempfile
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L\w+):", re.MULTILINE)
_TARGET = re.compile(r"`\((\.L\w+)\)")


class Loop(NamedTuple):
    """An innermost loop, per thread and iteration: widths in bits, what is loaded in bytes."""

    exponentials: int
    loaded: int
    from_shared: int  # bytes, which `loaded` does not count
    narrowest_load: int  # from either
    narrowest_store: int
    exchanges: int  # barriers, and values passed between threads of a warp
    to_shared: int  # bytes


class Sass(NamedTuple):
    """`spills` counts accesses to local memory; widths are the widest of the kernel, in bits."""

    spills: int
    load: int
    store: int
    loops: list[Loop]


def _width(opcode):
    sizes = [part.lstrip("US") for part in opcode.split(".")[1:]]
    return next((int(size) for size in sizes if size.isdigit()), 32)


def _of_kind(opcodes, *kinds):
    return [_width(x) for x in opcodes if x.split(".")[0] in kinds]


def _loop(opcodes):
    loads, stores = _of_kind(opcodes, "LDG", "LDGSTS"), _of_kind(opcodes, "STG")
    shared = _of_kind(opcodes, "LDS")
    return Loop(
        exponentials=sum(x.startswith("MUFU.EX2") for x in opcodes),
        loaded=sum(loads) // 8,
        from_shared=sum(shared) // 8,
        narrowest_load=min(loads + shared, default=0),
        narrowest_store=min(stores, default=0),
        exchanges=len(_of_kind(opcodes, "BAR", "SHFL")),
        to_shared=sum(_of_kind(opcodes, "STS")) // 8,
    )


def parse(text):
    """Sass of a kernel as `nvdisasm -c` prints it: a loop ends in a conditional jump back.

    Unconditional ones lead from rare code, laid out at the end, back to where it was left. What
    only waits, for a barrier that counts bytes, is no loop.
    """
    labels = {x[1]: x.start() for x in _LABEL.finditer(text)}
    found, spans = [], []
    for x in _INSTRUCTION.finditer(text):
        predicate, opcode, operands = x.groups()
        found.append((x.start(), opcode))
        target = _TARGET.search(operands)
        if opcode == "BRA" and predicate and target and labels[target[1]] < x.start():
            spans.append((labels[target[1]], x.start()))
    touches = [at for at, opcode in found if opcode.startswith(("LD", "ST"))]
    spans = [(begin, end) for begin, end in spans if any(begin <= at <= end for at in touches)]
    innermost = [
        (begin, end)
        for begin, end in spans
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
    ]
    opcodes = [opcode for _, opcode in found]
    return Sass(
        spills=len(_of_kind(opcodes, "LDL", "STL")),
        load=max(_of_kind(opcodes, "LDG", "LDGSTS"), default=0),
        store=max(_of_kind(opcodes, "STG"), default=0),
        loops=[_loop([x for at, x in found if begin <= at <= end]) for begin, end in innermost],
    )


def _tool(name, *arguments):
    import triton

    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def measure(cubin):
    """(registers, bytes of stack, Sass) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    registers, stack = (max(map(int, re.findall(rf"{x}:(\d+)", usage))) for x in ("REG", "STACK"))
    return registers, stack, parse(text)
