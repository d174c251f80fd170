"""The KL coefficient and the scale of scores, fixed or adapting."""

import pytest
import torch

from rlhf.ppo.adaptive import KLController, ScoreScaler
from rlhf.ppo.train import train_ppo
from rlhf.rollout import token_rewards
from tests.rlhf.helpers.stages import records


@pytest.fixture
def controller(ppo_config):
    def make(**changes) -> KLController:
        return KLController(ppo_config(output_dir="-", **changes))

    return make


def test_a_fixed_kl_coefficient_stays(controller):
    fixed = controller(kl_coef=0.2)
    fixed.update(torch.full((4, 5), 100.0), torch.ones(4, 5, dtype=torch.bool))
    assert fixed.kl_coef == 0.2


@pytest.mark.parametrize(
    ("kind", "target", "factor"),
    [
        # 4 responses of 3, 2, 1 and 2 tokens, each token 0.5 nats: 1 nat a response on average.
        ("sequence", 1.0, 1.0),
        ("sequence", 1 / 1.1, 1 + 0.1 * 4 / 100),
        ("sequence", 0.1, 1 + 0.2 * 4 / 100),
        ("sequence", 50.0, 1 - 0.2 * 4 / 100),
        ("token", 0.5, 1.0),
        ("token", 0.5 / 0.9, 1 - 0.1 * 4 / 100),
        ("token", 0.01, 1 + 0.2 * 4 / 100),
    ],
)
def test_adaptive_kl_moves_towards_its_target(controller, kind, target, factor):
    mask = torch.arange(3) < torch.tensor([3, 2, 1, 2])[:, None]
    adaptive = controller(adaptive_kl=kind, target_kl=target, kl_horizon=100, kl_coef=0.3)
    adaptive.update(torch.where(mask, 0.5, 0.0), mask)
    assert adaptive.kl_coef == pytest.approx(0.3 * factor)


def test_adaptive_kl_sets_the_coefficient_of_the_next_iteration(ppo_config, tmp_path):
    path = tmp_path / "run"
    train_ppo(
        ppo_config(
            output_dir=str(path),
            adaptive_kl="sequence",
            target_kl=1e-6,
            kl_horizon=160,
            kl_coef=0.1,
            total_episodes=64,
        )
    )
    coefficients = [line["kl_coef"] for line in records(path)]
    # The first iteration's KL is 0, below any target: down; then up, as far as a step may go.
    assert coefficients == pytest.approx([0.1, 0.098, 0.098 * 1.02, 0.098 * 1.02**2])


def test_the_estimator_of_the_kl_penalty():
    logprobs, ref_logprobs = torch.tensor([[-0.9, -2.5]]), torch.tensor([[-1.5, -1.0]])
    mask, scores = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1)
    difference = torch.tensor([[0.6, -1.5]])
    expected = {
        "k1": difference,
        "k2": difference**2 / 2,
        "k3": torch.expm1(-difference) + difference,
        "abs": difference.abs(),
    }
    for estimator, kl in expected.items():
        rewards = token_rewards(logprobs, ref_logprobs, scores, mask, 0.1, estimator)
        torch.testing.assert_close(rewards, -0.1 * kl)


@pytest.mark.parametrize("kind", ["running", "reference"])
def test_score_scaling_by_moments(ppo_config, kind):
    scaler = ScoreScaler(ppo_config(output_dir="-", score_scaling=kind))
    generator = torch.Generator().manual_seed(0)
    seen = []
    for iteration in range(5):
        scores = 3 + 10 * iteration + 2 * torch.randn(7 + iteration, generator=generator)
        if kind == "running" or iteration == 0:
            seen.append(scores)
        moments = torch.cat(seen).double()
        expected = (scores - moments.mean()) / moments.std(correction=0)
        torch.testing.assert_close(scaler(scores), expected.float(), rtol=1e-5, atol=1e-5)


def test_equal_scores_are_scaled_to_zero(ppo_config):
    scaler = ScoreScaler(ppo_config(output_dir="-", score_scaling="running"))
    assert scaler(torch.full((5,), 0.3)).tolist() == pytest.approx([0.0] * 5, abs=0.02)
