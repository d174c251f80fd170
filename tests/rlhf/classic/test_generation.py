"""`PPOTrainer.generate` and `respond_to_batch` of the classic API."""

import pytest
import torch
from transformers import GenerationConfig

from rlhf import classic
from rlhf.classic import LengthSampler, PPOTrainer, respond_to_batch
from rlhf.errors import UserError
from tests.rlhf.helpers.classic_peer import make_model
from tests.rlhf.helpers.classic_trainer import make_trainer, rows

# Generation


def greedy(trainer: PPOTrainer, queries, **options):
    return trainer.generate(
        queries, do_sample=False, max_new_tokens=5, pad_token_id=1, eos_token_id=1, **options
    )


def test_list_of_queries_is_answered_as_each_alone():
    trainer = make_trainer()
    queries = rows([[3], [4, 5, 6, 7, 8], [9, 10]])
    together = greedy(trainer, queries, batch_size=3)
    for query, output in zip(queries, together, strict=True):
        alone = greedy(trainer, query)
        assert alone.shape[0] == 1
        assert alone[0].tolist() == output.tolist()
        assert output[: len(query)].tolist() == query.tolist()
    responses = greedy(trainer, queries, batch_size=2, return_prompt=False)
    for query, whole, response in zip(queries, together, responses, strict=True):
        assert response.tolist() == whole[len(query) :].tolist()
    pair = greedy(trainer, queries, generate_ref_response=True)
    reference = PPOTrainer(trainer.config, make_model(classic, 0.5), tokenizer=trainer.tokenizer)
    for output, expected in zip(pair[1], greedy(reference, queries), strict=True):
        assert output.tolist() == expected.tolist()
    assert [x.tolist() for x in pair[0]] == [x.tolist() for x in together]


def test_responses_are_cut_after_their_own_eos():
    """EOS in the prompt ends nothing, and pad, which is EOS, is no token of a response."""
    trainer = make_trainer()
    head = trainer.model.pretrained_model.transformer.wte.weight
    with torch.no_grad():
        head[1] += 2 * head[8]  # makes EOS likely
    queries = rows([[1, 3], [1, 4, 5]] * 8)
    options = {"do_sample": True, "max_new_tokens": 12, "pad_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    whole = trainer.generate(queries, remove_padding=False, **options)
    torch.manual_seed(0)
    ended = 0
    for query, padded, output in zip(
        queries, whole, trainer.generate(queries, **options), strict=True
    ):
        response = padded[len(query) :].tolist()
        if 1 in response:
            response = response[: response.index(1) + 1]
            ended += 1
        assert output.tolist() == query.tolist() + response
    assert ended > 4


@pytest.mark.parametrize(
    ("options", "own", "ends"),
    [
        ({"eos_token_id": [1, 5, 6]}, 1, {1, 5, 6}),
        ({"eos_token_id": torch.tensor([5])}, 1, {5}),
        ({"generation_config": GenerationConfig(eos_token_id=6)}, 1, {6}),
        ({}, [5, 6], {5, 6}),
        ({}, None, {1}),  # the tokenizer's, as TRL cut there
        ({"eos_token_id": -1}, 1, set()),
        ({"eos_token_id": 100_000}, 1, set()),
        ({"eos_token_id": None}, 1, set()),
    ],
)
def test_responses_are_cut_at_what_ends_them(options, own, ends):
    """Llama-3 and Qwen end a response by ids other than the tokenizer's EOS; others by none."""
    trainer = make_trainer()
    trainer.model.pretrained_model.generation_config.eos_token_id = own
    queries = rows([[1, 5, 6, 3]] * 16)
    sampling = {"do_sample": True, "max_new_tokens": 10, "pad_token_id": 0, **options}
    outputs = []
    for remove_padding in (False, True):
        torch.manual_seed(0)
        options = {"return_prompt": False, "batch_size": 16, "remove_padding": remove_padding}
        outputs.append(trainer.generate(queries, **options, **sampling))
    assert {len(whole) for whole in outputs[0]} == {10}
    for whole, response in zip(
        *([row.tolist() for row in output] for output in outputs), strict=True
    ):
        found = [i for i, token in enumerate(whole) if token in ends]
        assert response == whole[: found[0] + 1 if found else None]
    assert any(len(response) < 10 for response in outputs[1]) == bool(ends)


def test_several_responses_to_one_query():
    trainer = make_trainer()
    query, options = torch.tensor([3, 4]), {"do_sample": True, "max_new_tokens": 6}
    options |= {"num_return_sequences": 3, "pad_token_id": 1, "eos_token_id": None}
    whole = trainer.generate(query, **options)
    assert whole.shape == (3, 8)
    assert whole[:, :2].tolist() == [[3, 4]] * 3
    assert len({tuple(row) for row in whole.tolist()}) > 1
    assert trainer.generate(query, return_prompt=False, **options).shape == (3, 6)


def test_respond_to_batch_samples_from_the_model():
    model = make_model(classic, 0.0)
    queries = torch.tensor([[3, 4, 5]]).expand(4000, 3)
    responses = respond_to_batch(model, queries, txt_len=1)
    assert responses.shape == (4000, 1)
    with torch.no_grad():
        expected = model(queries[:1])[0][0, -1].softmax(-1)
    counts = responses.flatten().bincount(minlength=len(expected)) / len(responses)
    torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)
    greedy = respond_to_batch(model, queries[:2], txt_len=25, top_k=1)
    assert greedy.shape == (2, 25)
    assert greedy[0, 0] == expected.argmax()
    with pytest.raises(UserError, match="fit the model's 32 positions, got 33 tokens"):
        respond_to_batch(model, queries[:2], txt_len=30)


def test_tutorials_generation_arguments():
    trainer = make_trainer()
    sampler = LengthSampler(4, 16)
    lengths = set()
    for _ in range(60):
        output = trainer.generate(
            torch.tensor([3, 4]),
            min_length=-1,
            top_k=0.0,
            top_p=1.0,
            do_sample=True,
            pad_token_id=1,
            eos_token_id=0,
            max_new_tokens=sampler(),
        )
        lengths.add(output.squeeze().shape[0] - 2)
    assert max(lengths) <= 15
    assert {sampler() for _ in range(500)} == set(range(4, 16))
    outputs = trainer.generate(
        rows([[3], [4]] * 3), lambda: 2, return_prompt=False, suppress_tokens=[1], pad_token_id=1
    )
    assert [len(output) for output in outputs] == [2] * 6


def test_temperature_other_than_the_configured_one_is_told():
    with pytest.warns(UserWarning, match=r"temperature 0.5 is not PPOConfig.temperature 1.0"):
        greedy(make_trainer(), torch.tensor([3, 4]), temperature=0.5)
    options = {"do_sample": True, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 0}
    config = GenerationConfig(temperature=1e-4, **options)
    trainer = make_trainer()
    with pytest.warns(UserWarning, match=r"temperature 0.0001 is not PPOConfig.temperature 1.0"):
        cold = [trainer.generate(torch.tensor([3, 4]), generation_config=config) for _ in range(5)]
    assert len({tuple(row[0].tolist()) for row in cold}) == 1
    trainer = make_trainer(temperature=1e-4)
    cold = [
        trainer.generate(torch.tensor([3, 4]), generation_config=GenerationConfig(**options))
        for _ in range(5)
    ]
    assert len({tuple(row[0].tolist()) for row in cold}) == 1


def test_stop_strings_end_responses_one_at_a_time_only():
    """In a batch transformers pads those that have ended, and a pad may be sampled too."""
    trainer, queries = make_trainer(), [torch.tensor([3, 4]), torch.tensor([5])]
    with pytest.raises(UserError, match=r"stop_strings leave no token .* give batch_size=1"):
        trainer.generate(queries, stop_strings=["x"])
    stop = [lambda ids, scores: ids[:, 0] >= 0]
    rows = trainer.generate(queries, batch_size=1, stopping_criteria=stop, max_new_tokens=5)
    assert [len(row) for row in rows] == [3, 2]


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        ([[3, 4]], {}, r"must be 1-D or a list of 1-D tensors, got torch.Size\(\[1, 2\]\)"),
        (3, {}, r"query_tensor must be 1-D or a list of 1-D tensors, got torch.Size\(\[\]\)"),
        ([3, 4], {"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ([3, 4], {"batch_size": -1}, "batch_size must be an integer >= 1, got -1"),
        ([3, 4], {"max_new_tokens": 31}, "fit the model's 32 positions, got 33 tokens"),
        ([3, 4], {"max_length": 33}, "fit the model's 32 positions, got 33 tokens"),
        ([3, 4], {"length_sampler": lambda: 40}, "fit the model's 32 positions, got 42 tokens"),
        ([3] * 32, {}, "fit the model's 32 positions, got 33 tokens"),
        ([3, 4], {"return_dict_in_generate": True}, "return_dict_in_generate must be False"),
    ],
)
def test_generate_is_checked(query, options, message):
    with pytest.raises(UserError, match=message) as error:
        make_trainer().generate(torch.tensor(query), **options)
    assert "\n" not in str(error.value)


def test_generate_of_a_list_is_checked():
    trainer = make_trainer()
    with pytest.raises(UserError, match="must have at least one tensor, got an empty list"):
        trainer.generate([])
    with pytest.raises(UserError, match="must be 1-D or a list of 1-D tensors, got tuple"):
        trainer.generate((torch.tensor([3]),))
    with pytest.raises(UserError, match=r"num_return_sequences must be 1 for a list .* got 2"):
        trainer.generate(rows([[3], [4]]), num_return_sequences=2)
