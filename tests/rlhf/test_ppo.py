"""What must be right in PPO: each was wrong in a well-known trainer."""

import json
import math

import pytest
import torch
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data import pad, tokenize_prompts
from rlhf.models import sequence_scores, token_values
from rlhf.ppo import PPOTrainer, prompt_batches, train_ppo
from rlhf.rollout import (
    Responses,
    ended_with_eos,
    response_logits,
    response_values,
    shaped_scores,
    token_rewards,
)

EOS = 2
METRICS = {
    *("objective/scores", "objective/kl", "objective/kl_per_token", "objective/entropy"),
    *("objective/rlhf_reward", "objective/non_score_reward", "policy/approxkl", "policy/clipfrac"),
    *("policy/ratio", "policy/ratio_max", "policy/entropy", "loss/policy", "loss/value"),
    *("val/explained_variance", "tokens/response_len", "tokens/eos_rate", "tokens_per_second"),
    *("time/generate", "time/evaluate", "time/update", "kl_coef", "lr"),
}


@pytest.fixture
def make_trainer(ppo_config, tmp_path):
    def make(**changes) -> PPOTrainer:
        return PPOTrainer(ppo_config(output_dir=str(tmp_path / "run"), **changes))

    return make


@pytest.fixture(params=["llama", "gpt2"])
def any_model(request, world):
    """Paths for a run from an untrained model; the GPT-2 has dropout 0.1."""
    path = str(world / request.param)
    return {"model_name_or_path": path, "reward_model_path": f"{path}-reward"}


def collect(trainer: PPOTrainer):
    prompts = tokenize_prompts(trainer.tokenizer, ["film", "plot is", "film is good"], 64)
    batch = next(prompt_batches(prompts, trainer.batch_size, torch.Generator().manual_seed(0)))
    return trainer.evaluate(trainer.sample(batch))


def row_ids(responses: Responses, row: int) -> tuple[list[int], list[int]]:
    prompt = responses.prompt_ids[row][responses.prompt_mask[row]].tolist()
    return prompt, responses.tokens[row][responses.mask[row]].tolist()


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "min_response_length": 3}])
def test_first_minibatch_of_every_update_has_ratio_one(ppo_config, any_model, tmp_path, changes):
    config = ppo_config(output_dir=str(tmp_path / "run"), **any_model, **changes)
    train_ppo(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for metrics in map(json.loads, lines):
        assert metrics["policy/first_ratio_error"] < 1e-5
        assert abs(metrics["policy/first_approxkl"]) < 1e-5
        assert metrics["policy/approxkl"] > 1e-5  # The later minibatches do move.
        assert metrics["policy/ratio_max"] > 1.001


def test_padding_changes_no_logits_values_or_scores(make_trainer, any_model):
    trainer = make_trainer(**any_model)
    responses = trainer.sample([[3], [4, 5], [3, 5, 7, 8], [6]] * 4)
    logits = response_logits(trainer.policy, responses, EOS, 0)
    values = response_values(trainer.critic, responses)
    scores = sequence_scores(trainer.reward_model, responses.input_ids, responses.attention_mask)
    for row in range(16):
        prompt, response = row_ids(responses, row)
        ids = torch.tensor([prompt + response])
        span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        alone = trainer.policy(ids).logits[0, span]
        torch.testing.assert_close(logits[row, : len(response)], alone, atol=1e-5, rtol=1e-5)
        alone = token_values(trainer.critic, ids, torch.ones_like(ids))[0]
        torch.testing.assert_close(values[row, : len(response)], alone[span], atol=1e-5, rtol=1e-5)
        alone = trainer.reward_model.score(
            trainer.reward_model.base_model(ids).last_hidden_state[:, -1]
        )
        torch.testing.assert_close(scores[row], alone[0, 0], atol=1e-5, rtol=1e-5)


def test_parts_are_of_similar_length_and_drop_only_columns_of_padding(make_trainer):
    responses = make_trainer().sample([[3], [4, 5], [3, 5, 7, 8], [6]])
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


def test_score_is_read_at_eos_where_pad_is_eos(make_trainer):
    model = make_trainer().reward_model
    model.config.pad_token_id = EOS
    ids, mask = pad([[3, 5, 7, EOS], [4, 5, 8, 9, 6, EOS]], EOS)
    for row, length in enumerate((4, 6)):
        alone = model.score(model.base_model(ids[row : row + 1, :length]).last_hidden_state[:, -1])
        torch.testing.assert_close(sequence_scores(model, ids, mask)[row], alone[0, 0])


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_temperature_divides_policy_and_reference_logits(make_trainer, temperature):
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


def test_micro_batch_size_does_not_change_the_update(make_trainer):
    weights = []
    for size, accumulation in ((12, 1), (4, 3), (1, 12)):
        trainer = make_trainer(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.05,
            entropy_coef=0.01,
        )
        trainer.update(collect(trainer))
        models = (trainer.policy, trainer.critic)
        weights.append([p for model in models for p in model.parameters()])
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, atol=2e-5, rtol=0)


def test_gradient_is_that_of_the_textbook_loss(make_trainer):
    trainer = make_trainer(
        num_mini_batches=1,
        num_ppo_epochs=1,
        cliprange=0.1,
        cliprange_high=0.3,
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
    old_logprobs = batch.experience.logprobs + 0.3 * torch.randn(mask.shape)
    old_values = batch.experience.values + 0.3 * torch.randn(mask.shape)
    experience = batch.experience._replace(logprobs=old_logprobs, values=old_values)
    batch = batch._replace(experience=experience)

    logits = response_logits(trainer.policy, responses, EOS, 0) / 0.8
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    logprobs = logprobs.gather(-1, responses.tokens[..., None])[..., 0]
    ratio = (logprobs - old_logprobs).exp()
    gain = torch.minimum(ratio * batch.advantages, ratio.clamp(0.9, 1.3) * batch.advantages)
    values = response_values(trainer.critic, responses)
    clipped = old_values + (values - old_values).clamp(-0.15, 0.15)
    error = torch.maximum((values - batch.returns) ** 2, (clipped - batch.returns) ** 2)
    loss = (-gain - 0.05 * entropy + 0.7 * 0.5 * error)[mask].mean()
    parameters = [*trainer.policy.parameters(), *trainer.critic.parameters()]
    expected = torch.autograd.grad(loss, parameters)

    gradients = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in parameters)
    )
    trainer.update(batch)
    torch.testing.assert_close(gradients, list(expected), atol=1e-6, rtol=1e-4)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3, 1e-5}


def test_gradients_are_clipped_before_every_step(make_trainer):
    trainer = make_trainer(max_grad_norm=1e-3)
    norms = []

    def record(*_):
        for model in (trainer.policy, trainer.critic):
            norms.append(get_total_norm([p.grad for p in model.parameters()]).item())

    trainer.optimizer.register_step_pre_hook(record)
    steps = trainer.update(collect(trainer))
    assert len(norms) == 8
    assert norms == pytest.approx([1e-3] * 8, rel=1e-2)
    assert all(step["grad_norm/policy"] > 1e-3 for step in steps)


def test_advantages_are_whitened_over_the_mask(make_trainer):
    batch = collect(make_trainer())
    mask = batch.responses.mask
    assert not mask.all()
    assert batch.advantages[mask].mean().item() == pytest.approx(0, abs=1e-5)
    assert batch.advantages[mask].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (batch.advantages[~mask] == 0).all()


def test_worked_example_of_the_augmented_reward():
    logprobs = torch.tensor([[-0.9, -2.5, -0.5, 9.0], [-1.0, 9.0, 9.0, 9.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0, -0.5, 0.0], [-2.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    rewards = token_rewards(logprobs, ref_logprobs, torch.tensor([5.0, -1.0]), mask, 0.1)
    expected = torch.tensor([[-0.06, 0.15, 5.0, 0.0], [-1.1, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_scores_are_in_units_of_the_training_data(make_trainer):
    trainer = make_trainer()
    batch = collect(trainer)
    ids, mask = batch.responses.input_ids, batch.responses.attention_mask
    mean, std = trainer.reward_model.config.reward_mean, trainer.reward_model.config.reward_std
    expected = (sequence_scores(trainer.reward_model, ids, mask) - mean) / std
    torch.testing.assert_close(batch.experience.scores, expected, atol=1e-5, rtol=1e-5)
    assert abs(std - 1) > 0.1


def test_missing_eos_is_penalised_and_scores_are_clipped(ppo_config):
    config = ppo_config(output_dir="unused", missing_eos_penalty=1.5, score_clip=2.0)
    scores = torch.tensor([0.5, 0.5, -9.0])
    ended = torch.tensor([True, False, False])
    assert shaped_scores(scores, ended, config).tolist() == [0.5, -1.0, -3.5]


def test_eos_as_the_last_possible_token_is_not_missing():
    tokens = torch.tensor([[5, 6, EOS], [5, EOS, EOS], [5, 6, 7], [5, 6, EOS]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool()
    prompt = torch.ones(4, 1, dtype=torch.long)
    responses = Responses(prompt, prompt.bool(), tokens, mask)
    assert ended_with_eos(responses, EOS).tolist() == [True, True, False, False]


def test_response_lengths_are_drawn_from_their_range(make_trainer):
    trainer = make_trainer(response_length=6, min_response_length=6, sample_response_length=True)
    assert (trainer.sample([[3]] * 50).mask.sum(1) == 6).all()
    trainer = make_trainer(response_length=6, min_response_length=3, sample_response_length=True)
    lengths = trainer.sample([[3]] * 200).mask.sum(1)
    assert sorted(set(lengths.tolist())) == [3, 4, 5, 6]


def test_prompts_are_all_used_before_any_is_used_again():
    batches = prompt_batches([[i] for i in range(10)], 4, torch.Generator().manual_seed(0))
    used = [ids[0] for _ in range(5) for ids in next(batches)]
    assert sorted(used[:10]) == sorted(used[10:]) == list(range(10))
    assert used[:10] != used[10:]


def test_training_raises_the_score_and_saves_policy_and_critic(
    ppo_config, world, trained_sft, tmp_path
):
    path = tmp_path / "run"
    config = ppo_config(
        output_dir=str(path),
        per_device_train_batch_size=32,
        total_episodes=64 * 15,
        learning_rate=3e-3,
        report_to="tensorboard",
    )
    last = train_ppo(config)
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 16))
    assert set(records[0]) >= METRICS
    assert last["objective/scores"] > records[0]["objective/scores"] + 0.5
    assert records[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert last["objective/kl"] > 0.1
    assert last["objective/rlhf_reward"] == pytest.approx(
        last["objective/scores"] + last["objective/non_score_reward"], abs=1e-5
    )
    assert last["objective/non_score_reward"] == pytest.approx(
        -config.kl_coef * last["objective/kl"], abs=1e-5
    )

    policy = AutoModelForCausalLM.from_pretrained(path)
    start = AutoModelForCausalLM.from_pretrained(trained_sft)
    assert not torch.equal(policy.lm_head.weight, start.lm_head.weight)
    assert policy.generate(torch.tensor([[3]]), max_new_tokens=3).shape[1] > 1
    critic = AutoModelForSequenceClassification.from_pretrained(path / "critic")
    assert critic.score.weight.shape == (1, 32)
    assert (path / "completions.md").read_text().count("- after [") == 3
    for plot in ("reward", "policy", "loss", "responses"):
        assert (path / f"{plot}.png").read_bytes()[:4] == b"\x89PNG"
    assert list((path / "tensorboard").iterdir())


def test_the_same_seed_gives_the_same_run(ppo_config, tmp_path):
    runs = []
    for name in ("a", "b"):
        train_ppo(ppo_config(output_dir=str(tmp_path / name)))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line) for line in lines])
    for first, second in zip(*runs, strict=True):
        for name, value in first.items():
            if not name.startswith("time/") and name != "tokens_per_second":
                assert second[name] == value
