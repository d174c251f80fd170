"""Calls of every op with arguments that are right, nearly right and wrong, for AddressSanitizer and
UBSan to watch: `make sanitize`.

    python -m tests.random_calls --calls 10000 --seed 0

Whatever a call raises is an answer; the process must live. Values are tested elsewhere.
"""

import argparse
import math
import random
import sys
from collections import Counter

import torch

from ppo_kernels import dispatch
from tests.calls import Call, calls
from tests.test_registered_ops import _samples

LENGTHS = (1, 2, 3, 5, 17)
VOCABULARIES = (1, 2, 7, 15, 16, 17, 31, 33, 64, 300, 1031, 4099)
DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64),
)
NUMBERS = (0, -1, 1, 3, 10**6, 2**31, 2**63 - 1, 0.5, -0.5, 1e-300, 1e308, math.inf, -math.inf)
NUMBERS += (math.nan, True, None, "k3")


def with_values(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Some elements are what a damaged model or file would hold."""
    x = x.clone()
    if x.numel() == 0 or x.is_complex():
        return x
    if x.dtype == torch.bool:
        return x ^ (torch.rand(x.shape) < 0.5)
    if x.is_floating_point():
        info = torch.finfo(x.dtype)
        odd = (math.nan, math.inf, -math.inf, info.max, info.min, info.tiny, 0.0)
    else:
        info = torch.iinfo(x.dtype)
        odd = (info.max, info.min, 0)
    places = torch.rand(x.shape) < rng.choice((0.05, 0.5, 1.0))
    return x.masked_fill(places, rng.choice(odd))


def with_strides(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The same numbers, laid out otherwise."""
    kind = rng.randrange(5)
    if kind == 0:
        return torch.stack([x, x], -1)[..., 0]
    if kind == 1:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if kind == 2 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 3 and x.dim() > 0 and len(x) > 0:
        return x[:1].expand_as(x)
    return torch.cat([x, x], 0)[: len(x)] if x.dim() else x.expand(1)[0]


def with_shape(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    changes = [lambda: x[None], lambda: x.flatten(), lambda: x.reshape(-1)[:0], lambda: x.sum()]
    if x.dim() > 0:
        changes += [
            lambda: x[..., :-1],
            lambda: torch.cat([x, x], -1),
            lambda: x[:0],
            lambda: x[0:1],
        ]
    return rng.choice(changes)()


def with_dtype(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return x.to(rng.choice(DTYPES))


CHANGES = (with_values, with_strides, with_shape, with_dtype)


def disturbed(x, rng: random.Random):
    if isinstance(x, torch.Tensor):
        for _ in range(rng.choice((1, 1, 2))):
            x = rng.choice(CHANGES)(x, rng)
        return rng.choice((x, x, x, x, None))
    if isinstance(x, torch.dtype):
        return rng.choice(DTYPES)
    return rng.choice(NUMBERS)


def some(names: list, rng: random.Random) -> set:
    """None of them, one, or two."""
    return {rng.choice(names) for _ in range(rng.choice((0, 1, 1, 2)))} if names else set()


def public_call(rng: random.Random) -> None:
    shape = rng.choice(LENGTHS), rng.choice(LENGTHS), rng.choice(VOCABULARIES)
    table = calls(*shape)
    torch.manual_seed(rng.getrandbits(32))
    call = table[rng.choice(list(table))]
    parts = call.differentiable, call.constants, call.numbers
    changed = some([key for part in parts for key in part], rng)
    parts = [
        {key: disturbed(x, rng) if key in changed else x for key, x in part.items()}
        for part in parts
    ]
    call = Call(call.function, *parts, call.takes_backend)
    if any(not isinstance(x, torch.Tensor) for x in call.differentiable.values()):
        call("native")
    else:
        call.results_and_gradients("native")


def raw_call(rng: random.Random, samples: dict[str, list]) -> None:
    name = rng.choice(list(samples))
    arguments = list(rng.choice(samples[name]))
    for i in some(list(range(len(arguments))), rng):
        arguments[i] = disturbed(arguments[i], rng)
    getattr(dispatch.kernels("native"), name)(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reason = dispatch.why_not("native", "cpu")
    if reason is not None:
        sys.exit(f"native cannot run: {reason}")
    rng, samples = random.Random(args.seed), _samples("native")
    answers = Counter()
    for number in range(args.calls):
        try:
            raw_call(rng, samples) if number % 2 else public_call(rng)
            answers["returned"] += 1
        except Exception as error:
            answers[type(error).__name__] += 1
    print(f"{args.calls} calls: " + ", ".join(f"{n} {name}" for name, n in answers.most_common()))


if __name__ == "__main__":
    main()
