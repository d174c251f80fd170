"""The order in which compiled CUDA C++ kernels synchronise and access memory."""

import re
from typing import NamedTuple

# Instructions whose order is told. Of equal ones side by side the first.
_PTX = re.compile(
    r"^\s*(?:@!?%\w+\s+)?((?:ld|st|atom|red|bar|barrier|fence|membar|mbarrier|cp|mapa)\.[\w.:]+)",
    re.MULTILINE,
)
_SASS = re.compile(
    r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?"
    r"((?:LDG?|STG?|LDS|STS|ATOMG?|RED|MEMBAR|CCTL|BAR|UCGABAR_\w+|SYNCS|UBLKCP)\b[A-Z0-9_.]*)"
)
_ENTRY = re.compile(r"\.entry (\w+)\(.*?^\{(.*?)^\}", re.MULTILINE | re.DOTALL)

_LOOKS_BACK = r"^gae\.scan<.*(ManyChunks|Trajectories)"
_MERGES = r"^(kl\.forward|logprobs\.forward|statistics\.forward|ppo_loss\.saved|.*\.with_gradient)<"
_IN_BULK = r"\.with_gradient<.*, true>"


class Rule(NamedTuple):
    """Where its kernels have what it is about (a pattern of opcodes), the code is `wanted` there:
    so many times in each of them, and never elsewhere."""

    name: str
    kernels: str
    times: int
    code: str
    about: str
    wanted: str


RULES = [
    Rule(
        "publish: data, then a fence, then the flag",
        *(_LOOKS_BACK, 2),  # An empty chunk publishes too.
        *("sass", r"STG\S*STRONG"),
        r"STG(?!\S*STRONG)\S* MEMBAR\.ALL\.GPU STG\S*\.STRONG\.GPU ",
    ),
    Rule(
        "publish: with a release",
        *(_LOOKS_BACK, 2),
        *("ptx", r"st\.release"),
        r"st\.global\S* st\.release\.gpu\S* ",
    ),
    Rule(
        "look back: the flag, then nothing that is cached, then data",
        *(_LOOKS_BACK, 1),
        *("sass", r"LDG\S*STRONG"),
        r"LDG\S*\.STRONG\.GPU CCTL\.IVALL LDG(?!\S*STRONG)\S* ",
    ),
    Rule(
        "look back: with an acquire",
        *(_LOOKS_BACK, 1),
        *("ptx", r"ld\.acquire"),
        r"ld\.acquire\.gpu\S* ld\.global\S* ",
    ),
    Rule(
        "merge: all have begun, remote stores, a fence, all have stored, then loads",
        *(_MERGES, 1),
        *("sass", r"UCGABAR|\b(LD|ST)\."),
        r"UCGABAR_ARV ((?!UCGABAR)\S+ )*UCGABAR_WAIT CCTL\.IVALL (BAR\S* )?"
        r"(ST\.\S+ )+(MEMBAR\.ALL\.CTA )?MEMBAR\.ALL\.GPU CCTL\.IVALL "
        r"UCGABAR_ARV UCGABAR_WAIT CCTL\.IVALL (BAR\S* )?LDS\S* ",
    ),
    Rule(
        "merge: with a fence of the cluster",
        *(_MERGES, 1),
        *("ptx", r"barrier\.cluster|mapa"),
        r"barrier\.cluster\.arrive\.relaxed ((?!barrier)\S+ )*barrier\.cluster\.wait\.acquire "
        r"mapa\S* (st\.(?!global|shared)\S+ )+fence\.acq_rel\.cluster "
        r"barrier\.cluster\.arrive\.relaxed barrier\.cluster\.wait\.acquire ld\.shared\S* ",
    ),
    Rule(
        "bulk copies: barriers, how many bytes, the copy; all threads; a wait, then loads",
        *(_IN_BULK, 1),
        *("sass", r"UBLKCP|SYNCS\.(EXCH|ARRIVE)"),
        r"SYNCS\.EXCH\S* (SYNCS\.ARRIVE\S* UBLKCP\S* )+((?!LDS|SYNCS)\S+ )*BAR\.SYNC\S* "
        r"((?!LDS|SYNCS)\S+ )*(SYNCS\.PHASECHK\S* LDS\S* )+",
    ),
    Rule(
        "bulk copies: with a fence after the barriers",
        *(_IN_BULK, 1),
        *("ptx", r"cp\.async\.bulk|mbarrier\.(init|arrive)"),
        r"mbarrier\.init\S* fence\.mbarrier_init\.release\.cluster "
        r"(mbarrier\.arrive\.expect_tx\S* cp\.async\.bulk\S* )+",
    ),
]


def bodies(ptx):
    """{mangled name: code} of every kernel."""
    return dict(_ENTRY.findall(ptx))


def _told(names):
    return "".join(f"{x} " for x, y in zip(names, [None, *names], strict=False) if x != y)


def of_ptx(body):
    """Opcodes of a kernel. Parameters and constants are no memory."""
    names = _PTX.findall(body)
    return _told([x for x in names if not x.startswith(("ld.param", "ld.const"))])


def of_sass(code):
    """Opcodes of a kernel as `nvdisasm -c` prints it."""
    return _told(_SASS.findall(code))


def concerns(rule, report):
    return re.search(rule.kernels, f"{report['kernel']}<{report['variant']}>") is not None


def broken(report):
    """Names of the rules that a kernel breaks, whose code is in report["order"]."""
    found = []
    for rule in RULES:
        rest, times = re.subn(rule.wanted, "", report["order"][rule.code])
        if times != rule.times * concerns(rule, report) or re.search(rule.about, rest):
            found.append(rule.name)
    return found
