"""Sampling: the right distribution, the right lengths, padding and cache without effect."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config.ppo import PPOConfig
from rlhf.data.padding import pad
from rlhf.demo.base import train_tokenizer
from rlhf.errors import UserError
from rlhf.models.generation import Decoding, Stopping, cache_keyword, generate, sample_tokens
from rlhf.models.loading import load_causal_lm
from rlhf.models.passes import positions

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


def sample(model, tokenizer, prompts, *, max_length=8, pad_token_id=PAD, seed=0, **options):
    prompt_ids, prompt_mask = pad(prompts, pad_token_id, "left")
    max_lengths = torch.as_tensor(max_length).expand(len(prompts)).clone()
    config = PPOConfig(
        **dict.fromkeys(("model_name_or_path", "dataset_name", "output_dir"), "-"),
        reward_funcs=["-"],
        response_length=int(max_lengths.max()),
        **options,
    )
    shape = len(prompts), config.response_length
    generator = torch.Generator().manual_seed(seed)
    return generate(
        model,
        prompt_ids,
        prompt_mask,
        uniforms=torch.rand(shape, dtype=torch.float64, generator=generator),
        max_lengths=max_lengths,
        stopping=Stopping(tokenizer, config),
        decoding=Decoding(cache_keyword(model)),
        temperature=config.temperature,
        pad_token_id=pad_token_id,
    )


def test_greedy_limit_equals_full_recomputation_row_by_row(model, tokenizer):
    # Rows end at different times, so the batch shrinks on the way.
    max_length = torch.tensor([12, 2, 7, 1])
    tokens, lengths, ended, _ = sample(
        model, tokenizer, PROMPTS, max_length=max_length, temperature=1e-4
    )
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(max_length[row]):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        response = ids[len(prompt) :]
        assert tokens[row, : lengths[row]].tolist() == response
        assert ended[row] == (response[-1] == EOS)
        assert (tokens[row, lengths[row] :] == PAD).all()


def test_tokens_follow_the_tempered_softmax(trained, tokenizer):
    temperature = 3.0
    tokens, *_ = sample(
        trained, tokenizer, [[3, 5]] * 20_000, max_length=1, temperature=temperature
    )
    frequency = torch.bincount(tokens[:, 0], minlength=13) / 20_000
    expected = (trained(torch.tensor([[3, 5]])).logits[0, -1] / temperature).softmax(-1)
    assert (frequency - expected).abs().max() < 0.01
    untempered = trained(torch.tensor([[3, 5]])).logits[0, -1].softmax(-1)
    assert (untempered - expected).abs().max() > 0.03


def test_eos_is_never_sampled_before_the_minimum_length(model, tokenizer):
    tokens, lengths, *_ = sample(model, tokenizer, [[3]] * 500, max_length=9, min_response_length=5)
    assert lengths.min() == 6 and lengths.max() == 9
    assert not (tokens[:, :5] == EOS).any()


def test_every_response_stops_at_its_own_longest_length(model, tokenizer):
    max_length = torch.arange(500) % 6 + 1
    _, lengths, *_ = sample(
        model, tokenizer, [[3]] * 500, max_length=max_length, min_response_length=6
    )
    assert torch.equal(lengths, max_length)


def test_a_sampled_pad_token_counts_like_any_other(model, tokenizer):
    plain = sample(model, tokenizer, [[3]] * 200)
    padded = sample(model, tokenizer, [[3]] * 200, pad_token_id=9)
    assert torch.equal(plain.lengths, padded.lengths)
    real = torch.arange(plain.tokens.shape[1]) < plain.lengths[:, None]
    assert torch.equal(plain.tokens[real], padded.tokens[real])
    assert (plain.tokens[real] == 9).any() and (plain.tokens[real] == PAD).any()


def test_pad_may_be_eos(model, tokenizer):
    distinct, same = (
        sample(model, tokenizer, PROMPTS * 50),
        sample(model, tokenizer, PROMPTS * 50, pad_token_id=EOS),
    )
    assert torch.equal(distinct.lengths, same.lengths)
    assert (distinct.lengths < 8).any()


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[False, False, True, True, False]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 1]]


def test_a_response_depends_neither_on_its_batch_nor_on_its_place_in_it(model, tokenizer):
    rows = 12
    prompts, lengths = PROMPTS * 3, torch.arange(rows) % 8 + 1
    prompt_ids, prompt_mask = pad(prompts, PAD, "left")
    whole = sample(model, tokenizer, prompts, max_length=lengths)
    for order in (torch.randperm(rows, generator=torch.Generator().manual_seed(3)), [5], [2, 9]):
        generator = torch.Generator().manual_seed(0)
        uniforms = torch.rand(rows, 8, dtype=torch.float64, generator=generator)
        config = PPOConfig(
            **dict.fromkeys(("model_name_or_path", "dataset_name", "output_dir"), "-"),
            reward_funcs=["-"],
        )
        tokens, part_lengths, ended, _ = generate(
            model,
            prompt_ids[order],
            prompt_mask[order],
            uniforms=uniforms[order],
            max_lengths=lengths[order],
            stopping=Stopping(tokenizer, config),
            decoding=Decoding(cache_keyword(model)),
            temperature=1.0,
            pad_token_id=PAD,
        )
        assert torch.equal(part_lengths, whole.lengths[order])
        assert torch.equal(ended, whole.ended[order])
        assert torch.equal(tokens, whole.tokens[order][:, : tokens.shape[1]])


def test_a_token_is_where_the_cumulative_distribution_passes_its_number():
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 3.0, 2.0, -torch.inf]).log()
    logits = logits.nan_to_num(nan=-torch.inf)
    edge = 1 / 6
    cases = {0.0: 1, edge - 1e-6: 1, edge + 1e-6: 3, 0.5: 3, 4 / 6 + 1e-6: 4, 1 - 2**-53: 4}
    uniforms = torch.tensor(list(cases), dtype=torch.float64)
    tokens = sample_tokens(logits.expand(len(cases), -1), uniforms)
    assert tokens.tolist() == list(cases.values())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits_in_sampling(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens = sample_tokens(logits.expand(10_000, -1) / temperature, uniforms)
    frequency = torch.bincount(tokens, minlength=3) / 10_000
    torch.testing.assert_close(frequency, (logits / temperature).softmax(-1), atol=2e-4, rtol=0)


def test_stop_tokens_end_a_response_and_are_kept(model, tokenizer):
    good = tokenizer.convert_tokens_to_ids("good")
    tokens, lengths, ended, _ = sample(model, tokenizer, [[3]] * 300, stop_token=["good"])
    for row, length, end in zip(tokens.tolist(), lengths.tolist(), ended.tolist(), strict=True):
        response = row[:length]
        assert not {good, EOS} & set(response[:-1])
        assert end == (response[-1] in (good, EOS))
    assert (tokens[torch.arange(300), lengths - 1] == good).any()
    tokens, lengths, *_ = sample(
        model, tokenizer, [[3]] * 300, stop_token=["good"], min_response_length=4
    )
    assert lengths.min() >= 5 and not torch.isin(tokens[:, :4], torch.tensor([good, EOS])).any()


def test_stop_strings_end_a_response_where_they_are_complete(model, tokenizer):
    text = tokenizer.decode([5, 7])
    tokens, lengths, ended, _ = sample(
        model, tokenizer, [[5]] * 500, max_length=6, stop_strings=[text]
    )
    pair = [5, 7]
    found = 0
    for row, length, end in zip(tokens.tolist(), lengths.tolist(), ended.tolist(), strict=True):
        response = row[:length]
        pairs = [response[i : i + 2] for i in range(length - 1)]
        assert pair not in pairs[:-1]
        stopped = bool(pairs) and pairs[-1] == pair
        assert end == (stopped or response[-1] == EOS)
        found += stopped
    assert found > 0


def test_stop_strings_wait_for_the_shortest_length(model, tokenizer):
    text = tokenizer.decode([5, 7])
    tokens, lengths, *_ = sample(
        model, tokenizer, [[5]] * 2000, max_length=6, stop_strings=[text], min_response_length=3
    )
    assert lengths.min() == 4
    assert ((tokens[:, 0] == 5) & (tokens[:, 1] == 7)).any()


def test_a_stop_string_of_many_tokens():
    """Over bytes, each a token, in the middle of a text and with an emoji of four bytes."""
    tokenizer = train_tokenizer([], 259)
    config = PPOConfig(
        **dict.fromkeys(("model_name_or_path", "dataset_name", "output_dir"), "-"),
        stop_strings=["</answer>", "🙂"],
    )
    stopping = Stopping(tokenizer, config)
    for text in ("a long text before it, and then </answer>", "some words 🙂"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        reached = [bool(stopping.reached(torch.tensor([ids[: n + 1]]))) for n in range(len(ids))]
        assert reached == [False] * (len(ids) - 1) + [True]


def test_ids_that_the_tokenizer_does_not_know_are_never_sampled(tokenizer):
    """Models have more rows than that, for the sake of their matrices."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    tokens, *_ = sample(LlamaForCausalLM(config).eval(), tokenizer, [[3]] * 200)
    assert tokens.max() == len(tokenizer) - 1


def test_an_unknown_stop_token_is_an_error(model, tokenizer):
    with pytest.raises(UserError, match="stop_token 'marvellous' is no token"):
        sample(model, tokenizer, [[3]], stop_token=["marvellous"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(model, tokenizer, value):
    head = model.get_output_embeddings().weight
    saved = head.detach().clone()
    with torch.no_grad():
        head[5] = value
    try:
        with pytest.raises(UserError, match="the policy's logits are not finite"):
            sample(model, tokenizer, PROMPTS)
    finally:
        head.data.copy_(saved)
