"""Tokens drawn from logits, against the three calls of PyTorch that draw them, and transformers'
filters before these."""

import pytest
import torch
from transformers.generation import logits_process

from benchmarks.harness import DTYPES, Contest, check_accuracy, checked
from ppo_kernels import sample_tokens

TEMPERATURE = 0.8
FILTERS = {"top_k": 50, "top_p": 0.95, "min_p": 0.01}


def cumsum(logits, uniforms):
    probabilities = torch.softmax(logits.float() / TEMPERATURE, dim=-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def kept_by_transformers(logits):
    scores = logits.float() / TEMPERATURE
    for warper in (
        logits_process.TopKLogitsWarper(FILTERS["top_k"]),
        logits_process.TopPLogitsWarper(FILTERS["top_p"]),
        logits_process.MinPLogitsWarper(FILTERS["min_p"]),
    ):
        scores = warper(None, scores)
    return scores


def check_drawn(result, scores, uniforms):
    """In the rows that are compared the tokens are where fp64 has them, and their log-probabilities
    as exact as those of eager PyTorch."""
    tokens, logprobs, scores, uniforms = map(checked, (*result, scores, uniforms))
    probabilities = torch.softmax(scores.double(), -1)
    after = probabilities.cumsum(-1).gather(-1, tokens[:, None])[:, 0]
    before = after - probabilities.gather(-1, tokens[:, None])[:, 0]
    assert ((before - 3e-6 <= uniforms) & (uniforms < after + 3e-6)).all()
    eager, truth = (
        torch.log_softmax(x, -1).gather(-1, tokens[:, None])[:, 0]
        for x in (scores, scores.double())
    )
    check_accuracy("logprobs", logprobs, eager, truth, fp32_roundings=8)


def make_contest(shape, dtype, setting, filters):
    device = setting.device
    logits = torch.randn(shape, dtype=dtype, device=device).mul_(2)
    uniforms = torch.rand(shape[0], dtype=torch.float64, device=device)
    options = {"temperature": TEMPERATURE, "backend": setting.backend, **filters}

    def op():
        return sample_tokens(logits, uniforms, **options)

    def check():
        scores = kept_by_transformers(logits) if filters else logits.float() / TEMPERATURE
        check_drawn(op(), scores, uniforms)

    if filters:
        baselines = {"transformers": lambda: cumsum(kept_by_transformers(logits), uniforms)}
    else:
        baselines = {"cumsum": lambda: cumsum(logits, uniforms)}
    return Contest(
        op=op, baselines=baselines, copied=logits, moved_bytes=logits.nbytes, check=check
    )


def make_unfiltered(shape, dtype, setting):
    return make_contest(shape, dtype, setting, {})


def make_filtered(shape, dtype, setting):
    return make_contest(shape, dtype, setting, FILTERS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_tokens(measure, sampling_shape, dtype):
    measure("sample_tokens", make_unfiltered, sampling_shape, dtype)


def test_filtered(measure, sampling_shape):
    measure("sample_tokens, filtered", make_filtered, sampling_shape, torch.float32)
