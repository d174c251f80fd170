"""What must be right in PPO: each was wrong in a well-known trainer."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import get_total_norm
from transformers import AutoTokenizer

from rlhf.data.padding import pad
from rlhf.models.passes import sequence_scores, token_values
from rlhf.ppo.train import train_ppo
from rlhf.ppo.trainer import PPOTrainer
from rlhf.rollout import Draws, Responses, sample_responses
from tests.rlhf.helpers.ppo import collect
from tests.rlhf.helpers.stages import records
from tests.rlhf.helpers.world import EOS


@pytest.fixture(params=["llama", "gpt2"])
def any_model(request, world):
    """Paths for a run from an untrained model; the GPT-2 has dropout 0.1."""
    path = str(world / request.param)
    return {"model_name_or_path": path, "reward_funcs": [f"{path}-reward"]}


def sample(trainer: PPOTrainer, prompts: list[list[int]], draws: Draws | None = None) -> Responses:
    draws = draws or Draws.of(len(prompts), trainer.config, trainer.generator)
    return sample_responses(
        trainer.policy, trainer.stopping, trainer.decoding, prompts, draws, trainer.config
    )


def row_ids(responses: Responses, row: int) -> tuple[list[int], list[int]]:
    prompt = responses.prompt_ids[row][responses.prompt_mask[row]].tolist()
    return prompt, responses.tokens[row][responses.mask[row]].tolist()


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "min_response_length": 3}])
def test_ratio_is_one_at_the_first_minibatch(ppo_config, any_model, tmp_path, changes):
    config = ppo_config(output_dir=str(tmp_path / "run"), **any_model, **changes)
    train_ppo(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for metrics in map(json.loads, lines):
        assert metrics["policy/first_ratio_error"] < 1e-5
        assert abs(metrics["policy/first_approxkl"]) < 1e-5
        assert metrics["policy/approxkl"] > 1e-5  # The later minibatches do move.
        assert metrics["policy/ratio_max"] > 1.001


def test_padding_invariance_of_logits_values_and_scores(make_trainer, any_model):
    trainer = make_trainer(**any_model)
    responses = sample(trainer, [[3], [4, 5], [3, 5, 7, 8], [6]] * 4)
    tokens, values = trainer.model(*responses.inputs)
    scores = sequence_scores(
        trainer.rewards[0].model, responses.input_ids, responses.attention_mask
    )
    for row in range(16):
        prompt, response = row_ids(responses, row)
        ids = torch.tensor([prompt + response])
        span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        alone = trainer.policy(ids).logits[0, span]
        actual = tokens.logits[row, : len(response)]
        torch.testing.assert_close(actual, alone, atol=1e-5, rtol=1e-5)
        alone = token_values(trainer.model.critic, ids, torch.ones_like(ids))[0]
        torch.testing.assert_close(values[row, : len(response)], alone[span], atol=1e-5, rtol=1e-5)
        alone = trainer.rewards[0].model.score(
            trainer.rewards[0].model.base_model(ids).last_hidden_state[:, -1]
        )
        torch.testing.assert_close(scores[row], alone[0, 0], atol=1e-5, rtol=1e-5)


def test_parts_are_of_similar_length_and_drop_only_columns_of_padding(make_trainer):
    responses = sample(make_trainer(), [[3], [4, 5], [3, 5, 7, 8], [6]])
    lengths = responses.attention_mask.sum(1)
    seen = []
    for index, part in responses.by_length(torch.tensor([3, 1, 0]), 2):
        seen += index.tolist()
        assert part.prompt_ids.shape[1] == responses.prompt_mask[index].sum(1).max()
        assert part.tokens.shape[1] == responses.mask[index].sum(1).max()
        for row, original in enumerate(index.tolist()):
            assert row_ids(part, row) == row_ids(responses, original)
    assert sorted(seen) == [0, 1, 3]
    assert lengths[seen].tolist() == sorted(lengths[seen].tolist(), reverse=True)


def test_pad_may_be_eos_in_the_reward_model(make_trainer):
    model = make_trainer().rewards[0].model
    model.config.pad_token_id = EOS
    ids, mask = pad([[3, 5, 7, EOS], [4, 5, 8, 9, 6, EOS]], EOS)
    for row, length in enumerate((4, 6)):
        alone = model.score(model.base_model(ids[row : row + 1, :length]).last_hidden_state[:, -1])
        torch.testing.assert_close(sequence_scores(model, ids, mask)[row], alone[0, 0])


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_temperature_divides_logits_of_policy_and_reference(make_trainer, temperature):
    trainer = make_trainer(temperature=temperature, min_response_length=2)
    with torch.no_grad():
        for parameter in trainer.reference.parameters():
            parameter.mul_(1.1)
    batch = collect(trainer)
    for row in range(4):
        prompt, response = row_ids(batch.responses, row)
        length = len(response)
        for model, logprobs in (
            (trainer.policy, batch.experience.logprobs),
            (trainer.reference, batch.experience.ref_logprobs),
        ):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logits[:2, EOS] = -math.inf
            expected = (logits / temperature).log_softmax(-1)
            expected = expected.gather(-1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(logprobs[row, :length], expected, atol=1e-5, rtol=1e-5)
            assert (logprobs[row, length:] == 0).all()
            if model is trainer.policy:
                entropy = torch.distributions.Categorical(logits=logits / temperature).entropy()
                actual = batch.experience.entropy[row, :length]
                torch.testing.assert_close(actual, entropy, atol=1e-5, rtol=1e-5)


def test_number_of_optimizer_steps(make_trainer):
    trainer = make_trainer(
        num_mini_batches=3,
        num_ppo_epochs=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        total_episodes=48,
    )
    assert (trainer.batch_size, trainer.num_iterations) == (24, 2)
    steps = []
    trainer.optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    assert len(trainer.update(collect(trainer))) == len(steps) == 3 * 2


def weights_after_an_update(trainer: PPOTrainer) -> list[torch.Tensor]:
    trainer.update(collect(trainer))
    return list(trainer.model.parameters())


def test_micro_batch_invariance(make_trainer):
    """per_device_train_batch_size * gradient_accumulation_steps counts, not its factors."""
    options = {"max_grad_norm": 0.05, "entropy_coef": 0.01}
    weights = [
        weights_after_an_update(
            make_trainer(
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                **options,
            )
        )
        for size, accumulation in ((12, 1), (4, 3), (1, 12))
    ]
    by_rollout = make_trainer(per_device_train_batch_size=4, rollout_batch_size=24, **options)
    for other in (*weights[1:], weights_after_an_update(by_rollout)):
        torch.testing.assert_close(weights[0], other, atol=2e-5, rtol=0)


def test_padding_invariance_of_the_update(make_trainer):
    """More padding on both sides of every row changes neither the batch nor the update."""
    weights = []
    for extra in (0, 5):
        trainer = make_trainer()
        rows = trainer.next_rows()
        responses = trainer.sample(trainer.prompts, rows, trainer.generator)
        wide = responses._replace(
            prompt_ids=F.pad(responses.prompt_ids, (extra, 0), value=9),
            prompt_mask=F.pad(responses.prompt_mask, (extra, 0)),
            tokens=F.pad(responses.tokens, (0, extra), value=9),
            mask=F.pad(responses.mask, (0, extra)),
        )
        batch = trainer.evaluate(rows, wide)
        assert (batch.advantages[:, responses.tokens.shape[1] :] == 0).all()
        trainer.update(batch)
        weights.append(list(trainer.model.parameters()))
    torch.testing.assert_close(*weights, atol=2e-5, rtol=0)


def test_batch_order_invariance(make_trainer, any_model):
    """Rows in another order, with their random numbers, are the same rows: all that is said of
    them and the update of a single minibatch."""
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    batches, weights = [], []
    for order in (torch.arange(16), shuffled):
        trainer = make_trainer(num_mini_batches=1, per_device_train_batch_size=16, **any_model)
        draws = Draws.of(16, trainer.config, trainer.generator).rows(order)
        rows = [i % 3 for i in order.tolist()]
        prompts = [trainer.prompts.ids[row] for row in rows]
        responses = sample(trainer, prompts, draws)
        batches.append(trainer.evaluate(rows, responses))
        trainer.update(batches[-1])
        weights.append(list(trainer.model.parameters()))
    first, second = batches
    assert torch.equal(first.responses.tokens[shuffled], second.responses.tokens)
    for name in ("rewards", "advantages", "returns"):
        expected = getattr(first, name)[shuffled]
        torch.testing.assert_close(getattr(second, name), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(*weights, atol=2e-5, rtol=0)


def test_responses_are_masked_by_their_length_and_pad_is_never_a_free_action(
    make_trainer, any_model
):
    """A policy that samples PAD now and then is asked for each of them: it counts in the length,
    in the KL penalty and in the advantages. Only the end of a response ends it."""
    trainer = make_trainer(kl_coef=0.5, **any_model)
    with torch.no_grad():
        for parameter in trainer.reference.parameters():
            parameter.mul_(1.5)
    batch = collect(trainer)
    tokens, mask = batch.responses.tokens, batch.responses.mask
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(8) < lengths[:, None])
    for row, length in enumerate(lengths.tolist()):
        assert length == 8 or tokens[row, length - 1] == EOS
        assert (tokens[row, : length - 1] != EOS).all()
    inner_pads = (tokens == trainer.tokenizer.pad_token_id) & (
        torch.arange(8) < lengths[:, None] - 1
    )
    assert inner_pads.sum() > 3
    kl = batch.experience.logprobs - batch.experience.ref_logprobs
    assert (kl[inner_pads] != 0).all() and (batch.advantages[inner_pads] != 0).all()
    torch.testing.assert_close(batch.rewards[inner_pads], -0.5 * kl[inner_pads])


def test_pad_may_be_eos(ppo_config, world, trained_sft, tmp_path):
    """With EOS as pad a run is, bit for bit, the one with a pad token of its own."""
    runs = []
    for name, pad_token in (("own", "<pad>"), ("eos", "<eos>")):
        for part, path in (
            ("sft", trained_sft),
            ("reward", ppo_config(output_dir="-").reward_funcs[0]),
        ):
            shutil.copytree(path, tmp_path / name / part)
            tokenizer = AutoTokenizer.from_pretrained(path)
            tokenizer.pad_token = pad_token
            tokenizer.save_pretrained(tmp_path / name / part)
        train_ppo(
            ppo_config(
                model_name_or_path=str(tmp_path / name / "sft"),
                reward_funcs=[str(tmp_path / name / "reward")],
                output_dir=str(tmp_path / name / "run"),
                missing_eos_penalty=1.0,
                response_length=4,
            )
        )
        runs.append(records(tmp_path / name / "run"))
    assert runs[0] == runs[1]
    assert 0 < runs[0][0]["tokens/eos_rate"] < 1


def test_gradient_is_that_of_the_textbook_loss(make_trainer):
    trainer = make_trainer(
        num_mini_batches=1,
        num_ppo_epochs=1,
        cliprange=0.1,
        cliprange_high=0.3,
        dual_clip=1.2,
        cliprange_value=0.15,
        vf_coef=0.7,
        entropy_coef=0.05,
        temperature=0.8,
        max_grad_norm=1e9,
        critic_learning_rate=1e-5,
    )
    batch = collect(trainer)
    responses, mask = batch.responses, batch.responses.mask
    # As if the policy and the critic had moved since the responses were sampled.
    torch.manual_seed(0)
    old_logprobs = batch.experience.logprobs + 0.6 * torch.randn(mask.shape)
    old_values = batch.experience.values + 0.3 * torch.randn(mask.shape)
    experience = batch.experience._replace(logprobs=old_logprobs, values=old_values)
    batch = batch._replace(experience=experience)

    tokens, values = trainer.model(*responses.inputs)
    logits = tokens.logits / 0.8
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    logprobs = logprobs.gather(-1, responses.tokens[..., None])[..., 0]
    ratio = (logprobs - old_logprobs).exp()
    gain = torch.minimum(ratio * batch.advantages, ratio.clamp(0.9, 1.3) * batch.advantages)
    dual = torch.where(batch.advantages < 0, gain.maximum(1.2 * batch.advantages), gain)
    assert not torch.equal(gain, dual)
    clipped = old_values + (values - old_values).clamp(-0.15, 0.15)
    error = torch.maximum((values - batch.returns) ** 2, (clipped - batch.returns) ** 2)
    loss = (-dual - 0.05 * entropy + 0.7 * 0.5 * error)[mask].mean()
    parameters = [*trainer.policy.parameters(), *trainer.model.critic.parameters()]
    expected = torch.autograd.grad(loss, parameters)

    gradients = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in parameters)
    )
    trainer.update(batch)
    torch.testing.assert_close(gradients, list(expected), atol=1e-6, rtol=1e-4)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3, 1e-5}


def test_max_grad_norm_is_honoured(make_trainer):
    trainer = make_trainer(max_grad_norm=1e-3)
    norms = []

    def record(*_):
        for model in (trainer.policy, trainer.model.critic):
            norms.append(get_total_norm([p.grad for p in model.parameters()]).item())

    trainer.optimizer.register_step_pre_hook(record)
    steps = trainer.update(collect(trainer))
    assert len(norms) == 8
    assert norms == pytest.approx([1e-3] * 8, rel=1e-2)
    assert all(step["grad_norm/policy"] > 1e-3 for step in steps)


def test_response_lengths_are_drawn_from_their_range(make_trainer):
    trainer = make_trainer(response_length=6, min_response_length=6, sample_response_length=True)
    assert (sample(trainer, [[3]] * 50).mask.sum(1) == 6).all()
    trainer = make_trainer(response_length=6, min_response_length=3, sample_response_length=True)
    lengths = sample(trainer, [[3]] * 200).mask.sum(1)
    assert sorted(set(lengths.tolist())) == [3, 4, 5, 6]


def test_prompts_are_all_used_before_any_is_used_again(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=2)
    used = [row for _ in range(3) for row in trainer.next_rows()]
    groups = [sorted(used[i : i + 3]) for i in range(0, 12, 3)]
    assert groups == [[0, 1, 2]] * 4
