"""What `benchmarks.gpu.smoke` checks and measures of each family of ops.

A check compares with `reference` in fp64 in the 2-norm, or bit by bit. Its shapes take each way
that a kernel can go: a row on chip in one block or a cluster of two, four or eight, elements that
stand apart (V = 50,257 and 1,031), rows that are read twice, one warp, strided rows.
"""

import dataclasses
from collections.abc import Iterator

import torch

import ppo_kernels
from benchmarks import (
    bench_gae,
    bench_kl,
    bench_logprobs,
    bench_ppo_loss,
    bench_sampling,
    bench_statistics,
)
from benchmarks.harness import Rounds, Setting, make_clock
from ppo_kernels import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (rows, V, dtype), the most telling first.
SHAPES = {
    "cuda": [
        *((5, 151936, BF16), (5, 50257, BF16), (5, 32000, F32), (3, 151936, F32)),
        *((3, 262144, F32), (7, 1031, F16), (9, 7, F32)),
    ],
    "rehearsal": [(2, 136, BF16), (3, 67, F32)],
}
GAE_SHAPES = {
    "cuda": [(33, 5), (9, 2048), (5, 2047), (4, 40_001), (16, 131_072)],
    "rehearsal": [(3, 70)],
}
# Of a gradient in 16 bits, rounded once; and of what is fp32.
ROUNDED = {BF16: 4e-3, F16: 1e-3, F32: 2e-5}
EXACT = 2e-5
OPTIONS = {"entropy_coef": 0.02, "dual_clip": 3.0, "temperature": 0.8}


class Batch:
    """Logits (2, rows, V), half of a row -inf, and what a loss is given of them."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype, strided: bool):
        self.name = f"2x{rows}x{vocabulary} {str(dtype)[6:]}" + " strided" * strided
        wide = 2 * torch.randn(2, rows + 1, vocabulary)
        wide[:, 0, : vocabulary // 2] = -torch.inf
        self.wide, self.strided, self.rounded = wide.to(dtype), strided, ROUNDED[dtype]
        self.tokens = self.logits().argmax(-1)
        log_p = torch.log_softmax(self.exact(), -1)
        logprobs = log_p.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)
        self.old_logprobs = (logprobs + 0.5 * torch.randn(2, rows)).float()
        self.advantages = torch.randn(2, rows)
        self.mask = torch.arange(2 * rows).view(2, rows) % 4 != 2

    def logits(self) -> torch.Tensor:
        """A fresh copy."""
        return self.wide.clone()[:, :-1] if self.strided else self.wide[:, :-1].contiguous()

    def exact(self) -> torch.Tensor:
        return self.wide[:, :-1].double()


def batches(setting: Setting) -> Iterator[Batch]:
    for shape in SHAPES[setting.name]:
        for strided in (False, True):
            yield Batch(*shape, strided)


def compared(name: str, **pairs) -> dict:
    """A check of (result, fp64 truth, bound on the relative error in the 2-norm) each."""
    errors = {}
    for key, (got, truth, bound) in pairs.items():
        got, truth = got.detach().double(), truth.detach().double()
        error = ((got - truth).norm() / truth.norm().clamp_min(1e-30)).item()
        if not error <= bound:
            errors[key] = f"{error:.2e} > {bound:.0e}"
    return {"check": name, "right": not errors, "errors": errors}


def same_bits(name: str, **pairs) -> dict:
    errors = [key for key, (a, b) in pairs.items() if not torch.equal(a, b)]
    return {"check": name, "right": not errors, "errors": errors}


def check_loss(setting: Setting, in_place: bool) -> Iterator[dict]:
    function = ppo_kernels.ppo_loss_ if in_place else ppo_kernels.ppo_loss
    for batch in batches(setting):
        per_token = batch.tokens, batch.old_logprobs, batch.advantages, batch.mask
        leaf = batch.exact().requires_grad_()
        exact = (x.double() if x.is_floating_point() else x for x in per_token)
        loss, *_, logprobs, entropy = ppo_kernels.ppo_loss(
            leaf, *exact, **OPTIONS, backend="reference"
        )
        (truth,) = torch.autograd.grad(loss, leaf)
        logits = batch.logits().requires_grad_(not in_place)
        got = function(logits, *per_token, **OPTIONS, backend=setting.backend)
        grad = logits if in_place else torch.autograd.grad(got.loss, logits)[0]
        yield compared(
            f"{function.__name__} {batch.name}",
            loss=(got.loss, loss, 1e-4),
            gradient=(grad, truth, batch.rounded),
            logprobs=(got.logprobs, logprobs, EXACT),
            entropy=(got.token_entropy, entropy, EXACT),
        )


def check_logprobs(setting: Setting) -> Iterator[dict]:
    for batch in batches(setting):
        leaf, exact = batch.logits().requires_grad_(), batch.exact().requires_grad_()
        upstream = torch.randn(2, *batch.tokens.shape)
        got = ppo_kernels.token_logprobs_and_entropy(leaf, batch.tokens, backend=setting.backend)
        truth = reference.token_logprobs_and_entropy(exact, batch.tokens)
        (grad,) = torch.autograd.grad(got, leaf, list(upstream))
        (grad_truth,) = torch.autograd.grad(truth, exact, list(upstream.double()))
        yield compared(
            f"token_logprobs_and_entropy {batch.name}",
            logprobs=(got[0], truth[0], EXACT),
            entropy=(got[1], truth[1], EXACT),
            gradient=(grad, grad_truth, batch.rounded),
        )


def check_kl(setting: Setting) -> Iterator[dict]:
    for batch in batches(setting):
        leaf, exact = batch.logits().requires_grad_(), batch.exact().requires_grad_()
        other = (leaf.detach().float() + 0.3 * torch.randn(leaf.shape)).to(leaf.dtype)
        got = ppo_kernels.kl_divergence(leaf, other, backend=setting.backend)
        truth = reference.kl_divergence(exact, other.double())
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        (grad_truth,) = torch.autograd.grad(truth.sum(), exact)
        yield compared(
            f"kl_divergence {batch.name}",
            kl=(got, truth, EXACT),
            gradient=(grad, grad_truth, batch.rounded),
        )


def check_statistics(setting: Setting) -> Iterator[dict]:
    for batch in batches(setting):
        got = ppo_kernels.token_statistics(batch.logits(), batch.tokens, backend=setting.backend)
        truth = reference.token_statistics(batch.exact(), batch.tokens)
        pairs = zip(got._fields, got, truth, strict=True)
        yield compared(
            f"token_statistics {batch.name}", **{name: (x, y, 1e-4) for name, x, y in pairs}
        )


def check_sampling(setting: Setting) -> Iterator[dict]:
    """Tokens lie where the cumulative distribution in fp64 passes their numbers, to 1e-5."""
    for batch in batches(setting):
        temperature = bench_sampling.TEMPERATURE
        scores = batch.exact() / temperature
        kept = bench_sampling.kept_by_transformers(batch.logits().flatten(0, 1)).double()
        for filters, left in (({}, scores), (bench_sampling.FILTERS, kept.view_as(scores))):
            uniforms = torch.rand(batch.tokens.shape, dtype=torch.float64)
            tokens, logprobs = ppo_kernels.sample_tokens(
                batch.logits(),
                uniforms,
                temperature=temperature,
                **filters,
                backend=setting.backend,
            )
            p, at = left.softmax(-1), tokens.unsqueeze(-1)
            own, after = p.gather(-1, at).squeeze(-1), p.cumsum(-1).gather(-1, at).squeeze(-1)
            there = (own > 0) & (after > uniforms - 1e-5) & (after - own <= uniforms + 1e-5)
            found = compared("", logprobs=(logprobs, own.log(), 1e-4))
            errors = found["errors"] | ({} if there.all() else {"tokens": (~there).sum().item()})
            name = f"sample_tokens {batch.name} {sorted(filters)}"
            yield {"check": name, "right": not errors, "errors": errors}


def check_gae(setting: Setting) -> Iterator[dict]:
    """The last tokens against a loop, which is slow; all of them against another call's."""
    factors = {"gamma": 0.99, "lam": 0.95}
    for rows, length in GAE_SHAPES[setting.name]:
        rewards, values = torch.randn(2, rows, length)
        dones, mask = torch.rand(rows, length) < 0.01, torch.rand(rows, length) < 0.9
        options = {"mask": mask, "dones": dones, **factors, "backend": setting.backend}
        got, again = (ppo_kernels.gae(rewards, values, **options) for _ in range(2))
        ends = torch.arange(rows + 1) * length
        packed = ppo_kernels.gae_packed(
            *(x.flatten() for x in (rewards, values)),
            ends,
            mask.flatten(),
            dones=dones.flatten(),
            **factors,
            backend=setting.backend,
        )
        last = slice(max(0, length - 2048), None)
        truth = ppo_kernels.gae(
            *(x[:, last].double().cpu() for x in (rewards, values)),
            mask[:, last].cpu(),
            dones=dones[:, last].cpu(),
            **factors,
            backend="reference",
        )
        yield compared(
            f"gae {rows}x{length}",
            advantages=(got[0][:, last].cpu(), truth[0], EXACT),
            returns=(got[1][:, last].cpu(), truth[1], EXACT),
            packed=(packed[0].view(rows, length), got[0], EXACT),
        )
        yield same_bits(f"gae {rows}x{length} again", advantages=(got[0], again[0]))


def check_bits(setting: Setting) -> Iterator[dict]:
    """Equal logits have equal log-probs, in every op, batch and place."""
    backend = {"backend": setting.backend}
    for rows, vocabulary, dtype in SHAPES[setting.name]:
        batch = Batch(rows, vocabulary, dtype, strided=False)
        logits, tokens = batch.logits(), batch.tokens
        scored = ppo_kernels.token_logprobs_and_entropy(logits, tokens, **backend)
        loss = ppo_kernels.ppo_loss_(
            logits.clone(), tokens, scored.logprobs, batch.advantages, **backend
        )
        moved = torch.empty(logits.numel() + 1, dtype=dtype)[1:].view(logits.shape).copy_(logits)
        elsewhere = ppo_kernels.token_logprobs_and_entropy(moved, tokens, **backend)
        alone = ppo_kernels.token_logprobs_and_entropy(
            logits[1, -1:].clone(), tokens[1, -1:], **backend
        )
        yield same_bits(
            f"bits {batch.name}",
            ratio_is_1=(loss.approx_kl, torch.zeros_like(loss.approx_kl)),
            loss_scores_alike=(loss.logprobs, scored.logprobs),
            where_rows_begin=(elsewhere.logprobs, scored.logprobs),
            whatever_the_batch=(alone.logprobs, scored.logprobs[1, -1:]),
        )


CHECKS = {
    "ppo_loss_": lambda setting: check_loss(setting, in_place=True),
    "ppo_loss": lambda setting: check_loss(setting, in_place=False),
    "bits": check_bits,
    "logprobs": check_logprobs,
    "kl": check_kl,
    "gae": check_gae,
    "sampling": check_sampling,
    "statistics": check_statistics,
}

# (tokens, V, dtype) of the figures, the headline first.
SIZES = {
    "cuda": [
        *((8192, 151936, BF16), (8192, 32000, BF16), (8192, 50257, BF16), (133, 151936, BF16)),
        *((8192, 32000, F32), (16, 151936, BF16)),
    ],
    "rehearsal": [(3, 136, BF16)],
}
GAE_SIZES = {
    "cuda": [(8192, 2048, F32), (16, 131072, F32), (512, 2048, F32)],
    "rehearsal": [(3, 70, F32)],
}
ROUNDS = 9
# Of eager PyTorch, at one size.
EAGER = (8192, 32000, BF16)


# Op -> what makes its contest, as in its benchmark.
MAKERS = {
    "ppo_loss_": bench_ppo_loss.make_ppo_loss_in_place,
    "ppo_loss": bench_ppo_loss.make_ppo_loss,
    "token_logprobs_and_entropy": bench_logprobs.make_logprobs,
    "kl_divergence": bench_kl.make_kl,
    "gae": bench_gae.make_gae,
    "sample_tokens": bench_sampling.make_unfiltered,
    "token_statistics": bench_statistics.make_statistics,
}


def figures(op: str, sizes=SIZES) -> object:
    """A generator of the op's figures in copies."""

    def measured(setting: Setting) -> Iterator[dict]:
        for *shape, dtype in sizes[setting.name]:
            contest = MAKERS[op](tuple(shape), dtype, setting)
            eager = contest.baselines.get("eager")
            baselines = {"eager": eager} if eager and (*shape, dtype) == EAGER else {}
            contest = dataclasses.replace(contest, baselines=baselines, rounds=ROUNDS)
            rounds = Rounds(contest, make_clock(setting), setting)
            for _ in range(ROUNDS):
                rounds.prepare()
                rounds.run_op()
            found = {k: round(v, 4) for k, v in rounds.figures().items()}
            yield {"op": op, "shape": shape, "dtype": str(dtype)[6:]} | found
            del contest, rounds

    return measured


FIGURES = {
    "ppo_loss_": figures("ppo_loss_"),
    "ppo_loss": figures("ppo_loss"),
    "logprobs": figures("token_logprobs_and_entropy"),
    "kl": figures("kl_divergence"),
    "gae": figures("gae", GAE_SIZES),
    "sampling": figures("sample_tokens"),
    "statistics": figures("token_statistics"),
}
