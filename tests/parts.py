"""Tests in two parts, `--part quick` for `make test` and `--part rest`, which `make test-all` adds.

The rest is what is marked slow and, of a test of three or more parameters, the cases that bring no
new pair of their values: faults show where two values meet, such as a backend and a dtype, far more
often than where three do. The cases chosen are the same in every run.
"""

from collections import defaultdict
from itertools import combinations


def pytest_addoption(parser):
    parser.addoption("--part", choices=("quick", "rest"), help="half of the tests: tests/parts.py")


def _pairs(item):
    """Of the names and values of a case's parameters."""
    values = sorted((name, repr(x)) for name, x in item.callspec.params.items())
    return set(combinations(values, 2))


def chosen(cases):
    """Of the cases of one test so many that all pairs come up: the next adds the most of them."""
    pairs = {case: _pairs(case) for case in cases}
    missing = set().union(*pairs.values())
    found = set()
    while missing:
        best = max(pairs, key=lambda case: len(pairs[case] & missing))
        missing -= pairs.pop(best)
        found.add(best)
    return found


def _quick(items):
    quick, cases = set(), defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow"):
            continue
        if len(getattr(getattr(item, "callspec", None), "params", ())) > 2:
            # What needs a GPU is skipped without one, and must not stand for what does not.
            needs_gpu = item.get_closest_marker("gpu") is not None
            cases[item.parent, item.originalname, needs_gpu].append(item)
        else:
            quick.add(item)
    return quick.union(*map(chosen, cases.values()))


def pytest_collection_modifyitems(config, items):
    part = config.getoption("part")
    if part is None:
        return
    quick = _quick(items)
    dropped = [item for item in items if (item in quick) != (part == "quick")]
    items[:] = [item for item in items if (item in quick) == (part == "quick")]
    config.hook.pytest_deselected(items=dropped)
