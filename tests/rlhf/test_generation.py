"""Sampling: the right distribution, the right lengths, padding and cache without effect."""

import pytest
import torch

from rlhf.data import pad
from rlhf.generation import generate
from rlhf.models import load_causal_lm, positions

EOS, PAD = 2, 0
PROMPTS = [[3], [4, 5], [3, 5, 7], [1, 4, 5, 8, 6]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, world):
    """Weights large enough for every position to matter."""
    model = load_causal_lm(str(world / request.param)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def trained(trained_sft):
    return load_causal_lm(str(trained_sft)).eval()


def sample(model, prompts, *, max_length=8, min_length=0, temperature=1.0, pad_token_id=PAD):
    prompt_ids, prompt_mask = pad(prompts, pad_token_id, "left")
    max_lengths = torch.as_tensor(max_length).expand(len(prompts)).clone()
    return generate(
        model,
        prompt_ids,
        prompt_mask,
        max_lengths=max_lengths,
        min_length=min_length,
        temperature=temperature,
        eos_token_id=EOS,
        pad_token_id=pad_token_id,
        generator=torch.Generator().manual_seed(0),
    )


def test_greedy_limit_equals_full_recomputation_row_by_row(model):
    # Rows end at different times, so the batch shrinks on the way.
    max_length = torch.tensor([12, 2, 7, 1])
    tokens, lengths = sample(model, PROMPTS, max_length=max_length, temperature=1e-4)
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(max_length[row]):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        response = ids[len(prompt) :]
        assert tokens[row, : lengths[row]].tolist() == response
        assert (tokens[row, lengths[row] :] == PAD).all()


def test_tokens_follow_the_tempered_softmax(trained):
    temperature = 3.0
    tokens, _ = sample(trained, [[3, 5]] * 20_000, max_length=1, temperature=temperature)
    frequency = torch.bincount(tokens[:, 0], minlength=13) / 20_000
    expected = (trained(torch.tensor([[3, 5]])).logits[0, -1] / temperature).softmax(-1)
    assert (frequency - expected).abs().max() < 0.01
    untempered = trained(torch.tensor([[3, 5]])).logits[0, -1].softmax(-1)
    assert (untempered - expected).abs().max() > 0.03


def test_eos_is_never_sampled_before_the_minimum_length(model):
    tokens, lengths = sample(model, [[3]] * 500, max_length=9, min_length=5)
    assert lengths.min() == 6 and lengths.max() == 9
    assert not (tokens[:, :5] == EOS).any()


def test_every_response_stops_at_its_own_longest_length(model):
    max_length = torch.arange(500) % 6 + 1
    _, lengths = sample(model, [[3]] * 500, max_length=max_length, min_length=6)
    assert torch.equal(lengths, max_length)


def test_a_sampled_pad_token_counts_like_any_other(model):
    plain = sample(model, [[3]] * 200)
    padded = sample(model, [[3]] * 200, pad_token_id=9)
    assert torch.equal(plain.lengths, padded.lengths)
    real = torch.arange(plain.tokens.shape[1]) < plain.lengths[:, None]
    assert torch.equal(plain.tokens[real], padded.tokens[real])
    assert (plain.tokens[real] == 9).any() and (plain.tokens[real] == PAD).any()


def test_pad_may_be_eos(model):
    distinct, same = sample(model, PROMPTS * 50), sample(model, PROMPTS * 50, pad_token_id=EOS)
    assert torch.equal(distinct.lengths, same.lengths)
    assert (distinct.lengths < 8).any()


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[False, False, True, True, False]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 1]]
