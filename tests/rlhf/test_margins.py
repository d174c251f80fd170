"""Margins between two answers, and scores that are kept near 0, in the loss of the reward model."""

import math

import pytest
import torch
import torch.nn.functional as F

from rlhf.config.training import RewardConfig
from rlhf.data.loaders import Ranking, load_rankings
from rlhf.data.padding import pad
from rlhf.errors import UserError
from rlhf.models.loading import load_scorer
from rlhf.models.passes import sequence_scores
from rlhf.reward_model import evaluate, pair_metrics, train_reward

UNUSED = {"model_name_or_path": "unused", "dataset_name": "unused", "output_dir": "unused"}
PAIR = {"prompt": "film", "chosen": " good", "rejected": " bad"}


def load(path: str, tokenizer) -> list[Ranking]:
    return load_rankings(RewardConfig(**UNUSED), path, "train", tokenizer)


def test_the_margin_lowers_the_difference_that_the_loss_sees_and_no_other_figure():
    """σ(log 3) = 3/4, σ(log 9) = 9/10: a margin of log 3 asks for three times the odds."""
    scores = torch.tensor([math.log(9), 0.0, math.log(9), 0.0], requires_grad=True)
    pairs = [Ranking([[1], [2]], 0.0), Ranking([[1], [2]], math.log(3))]
    metrics = pair_metrics(scores, pairs, 0.0, 2)
    expected = {
        "loss": (math.log(10 / 9) + math.log(4 / 3)) / 2,
        "accuracy": 1.0,
        "margin": math.log(9),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    metrics["loss"].backward()
    assert scores.grad.tolist() == pytest.approx([-0.05, 0.05, -0.125, 0.125])


def test_scores_whose_sum_is_not_0_cost_its_square():
    """Over all pairs of a ranking: (3 + 1)², (3 - 1)² and (1 - 1)²."""
    scores = torch.tensor([3.0, 1.0, -1.0])
    plain, centred = (
        pair_metrics(scores, [Ranking([[1], [2], [3]], 0.0)], center, 3) for center in (0.0, 0.01)
    )
    assert centred["loss"] - plain["loss"] == pytest.approx(0.01 * (16 + 4 + 0) / 3)
    for name in ("accuracy", "margin"):
        assert centred[name] == plain[name]


def test_margins_are_read_with_chosen_and_rejected(tokenizer, save, tmp_path):
    path = save(PAIR | {"margin": 2}, PAIR | {"margin": -0.5})
    assert [ranking.margin for ranking in load(path, tokenizer)] == [2.0, -0.5]
    assert [ranking.margin for ranking in load(save(PAIR), tokenizer)] == [0.0]
    (tmp_path / "data.csv").write_text("prompt,chosen,rejected,margin\nfilm, good, bad,1.5\n")
    assert load(str(tmp_path / "data.csv"), tokenizer)[0].margin == 1.5


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([PAIR | {"margin": 1}, PAIR], "row 2: margin must be a finite number, got None"),
        ([PAIR | {"margin": "wide"}], "row 1: margin must be a finite number, got 'wide'"),
        ([PAIR | {"margin": math.nan}], "row 1: margin must be a finite number, got nan"),
        ([PAIR | {"margin": True}], "row 1: margin must be a finite number, got True"),
        ([PAIR | {"margin": 10**400}], "row 1: margin must be a finite number, got 1000"),
        (
            [{"prompt": "film", "ranking": [" good", " bad"], "margin": 1}],
            "a margin is between two answers: give chosen and rejected, or leave margin out",
        ),
    ],
)
def test_a_wrong_margin_is_named(tokenizer, save, rows, part):
    path = save(*rows)
    with pytest.raises(UserError) as caught:
        load(path, tokenizer)
    assert part in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_the_coefficient_is_a_number_from_0_on(value):
    with pytest.raises(UserError, match="center_rewards_coefficient must be >= 0 and finite"):
        RewardConfig(**UNUSED, center_rewards_coefficient=value)


def test_the_loss_of_a_step_and_of_an_evaluation_is_the_one_of_trl(
    world, tokenizer, save, tmp_path
):
    rows = [
        {"prompt": "film is", "chosen": " good .", "rejected": " bad .", "margin": 0.5},
        {"prompt": "plot is", "chosen": " fine great .", "rejected": " dull .", "margin": 2.0},
    ]
    path = save(*rows)
    config = RewardConfig(
        model_name_or_path=str(world / "llama"),
        dataset_name=path,
        eval_dataset_name=path,
        output_dir=str(tmp_path / "out"),
        center_rewards_coefficient=0.3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        num_train_epochs=1,
        logging_steps=1,
        save_steps=0,
        report_to="none",
    )
    metrics = train_reward(config)
    model = load_scorer(str(tmp_path / "out"), tokenizer).eval()
    rankings = load(path, tokenizer)
    ids, mask = pad([answer for ranking in rankings for answer in ranking.answers], 0)
    with torch.no_grad():
        chosen, rejected = sequence_scores(model, ids, mask).reshape(2, 2).unbind(1)
    losses = -F.logsigmoid(chosen - rejected - torch.tensor([0.5, 2.0]))
    expected = losses.mean() + 0.3 * ((chosen + rejected) ** 2).mean()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    figures, _ = evaluate(model, tokenizer, rankings, config)
    assert figures["eval/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert figures["eval/margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-5)
