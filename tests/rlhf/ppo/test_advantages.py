"""Rewards of tokens, and the advantages made of them."""

import pytest
import torch

from rlhf.models.passes import sequence_scores
from rlhf.rollout import shaped_scores, token_rewards
from tests.rlhf.helpers.ppo import collect
from tests.rlhf.helpers.world import EOS


def test_whitening_is_centred_over_the_mask(make_trainer):
    batch = collect(make_trainer())
    mask = batch.responses.mask
    assert not mask.all()
    assert batch.advantages[mask].mean().item() == pytest.approx(0, abs=1e-5)
    assert batch.advantages[mask].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (batch.advantages[~mask] == 0).all()


def test_rewards_are_whitened_over_the_mask_before_gae(make_trainer):
    batch = collect(make_trainer(whiten_rewards=True, whiten_advantages=False, lam=1.0))
    mask = batch.responses.mask
    # With lam = gamma = 1 the return of a token is the sum of the rewards from it on.
    whitened = batch.returns - torch.cat([batch.returns[:, 1:], torch.zeros(16, 1)], 1)
    last = mask.sum(1) - 1
    whitened[torch.arange(16), last] = batch.returns[torch.arange(16), last]
    rewards = batch.rewards[mask]
    expected = (rewards - rewards.mean()) / rewards.std(correction=0)
    torch.testing.assert_close(whitened[mask], expected, atol=1e-4, rtol=1e-4)


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
    mean, std = (
        trainer.rewards[0].model.config.reward_mean,
        trainer.rewards[0].model.config.reward_std,
    )
    expected = (sequence_scores(trainer.rewards[0].model, ids, mask) - mean) / std
    torch.testing.assert_close(batch.scores.scores, expected, atol=1e-5, rtol=1e-5)
    assert abs(std - 1) > 0.1


def test_missing_eos_is_penalised_or_replaced_and_scores_are_clipped(ppo_config):
    scores = torch.tensor([0.5, 0.5, -9.0])
    ended = torch.tensor([True, False, False])
    subtract = ppo_config(output_dir="unused", missing_eos_penalty=1.5, score_clip=2.0)
    assert shaped_scores(scores, ended, subtract).tolist() == [0.5, -1.0, -3.5]
    replace = ppo_config(output_dir="unused", missing_eos_score=-3.0, score_clip=2.0)
    assert shaped_scores(scores, ended, replace).tolist() == [0.5, -3.0, -3.0]


@pytest.mark.parametrize("option", [{"missing_eos_penalty": 10.0}, {"missing_eos_score": -10.0}])
def test_score_and_eos_penalty_sit_on_the_last_real_token(make_trainer, option):
    """Also where that token is EOS, PAD, or the last that fits."""
    batch = collect(make_trainer(kl_coef=0.0, response_length=4, **option))
    tokens, mask, scores = batch.responses.tokens, batch.responses.mask, batch.scores.scores
    missing = 0
    for row, length in enumerate(mask.sum(1).tolist()):
        expected = scores[row].item()
        if tokens[row, length - 1] != EOS:
            missing += 1
            expected = expected - 10.0 if "missing_eos_penalty" in option else -10.0
        assert batch.rewards[row, length - 1].item() == pytest.approx(expected)
        others = [*range(length - 1), *range(length, 4)]
        assert (batch.rewards[row, others] == 0).all()
    assert 0 < missing < 16
