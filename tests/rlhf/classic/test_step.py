"""`rlhf.classic` against TRL 0.11.4: figures, defaults and keys; and where TRL was wrong."""

from dataclasses import MISSING, fields

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser

from rlhf import classic
from rlhf.classic import PPOConfig, PPOTrainer, create_reference_model
from rlhf.errors import UserError
from tests.rlhf.helpers import classic_peer
from tests.rlhf.helpers.classic_peer import RAGGED, make_model, make_tokenizer
from tests.rlhf.helpers.classic_trainer import ARRAYS, KEYS, make_trainer, rows, step, weights

pytest.importorskip("datasets")

# Fixed responses are no samples of the policy.
pytestmark = pytest.mark.filterwarnings("ignore:objective/kl is")

# `python tests/rlhf/helpers/classic_peer.py` with TRL 0.11.4, transformers 4.46.3, torch 2.13.0.
FIGURES = """
                                   equal      ragged    whitened      scaled accumulated
objective/kl                    0.215353    -1.51675     6.17524      3.7414     6.12472
objective/kl_coef               0.199968         0.2    0.199968    0.199968    0.196995
objective/entropy                10.8036     8.64613     13.5969     7.96203     11.3304
ppo/mean_non_score_reward     -0.0107659    0.110309   -0.308712   -0.272058   -0.301634
ppo/mean_scores                    0.625       0.625       0.625 -0.00414503    0.630548
ppo/std_scores                   1.10868     1.10868     1.10868    0.572604     1.11852
tokens/queries_len_mean                3        2.75           3        2.75           3
tokens/queries_len_std                 0     1.70783           0     1.70783           0
tokens/responses_len_mean              4        2.75           4        2.75           4
tokens/responses_len_std               0     1.70783           0     1.70783           0
ppo/loss/policy               -0.0408173    0.260147  -0.0596261  -0.0168367  -0.0440696
ppo/loss/value                  0.516323    0.846936    0.753134     1.07405    0.805617
ppo/loss/total                 0.0108151     0.34484   0.0156873   0.0905683   0.0364921
ppo/policy/entropy               1.99853     1.95407      1.9793      1.9698     2.12678
ppo/policy/approxkl           0.00836754  0.00618134    0.117242 0.000594717   0.0096279
ppo/policy/policykl           -0.0461091  0.00792388    0.177246  0.00544194   0.0567559
ppo/policy/clipfrac              0.09375    0.078125    0.328125           0       0.125
ppo/policy/advantages_mean             0   -0.306285           0           0           0
ppo/returns/mean                0.530686    0.984253  -0.0689328    -0.41378   -0.107996
ppo/returns/var                 0.757434    0.568021    0.486279    0.201991    0.199524
ppo/val/vpred                   0.038278    0.484158  -0.0639879    0.959904   -0.235369
ppo/val/error                    1.03265     1.68955     1.50627      2.1481     1.61123
ppo/val/clipfrac                       0     0.03125           0           0           0
ppo/val/mean                   0.0546383    0.399101  -0.0632596     0.98791   -0.229906
ppo/val/var                    0.0119628   0.0234134    0.026499   0.0730722  0.00535026
ppo/val/var_explained          -0.363349    -1.97446    -2.09754    -9.63463     -7.0754
ppo/learning_rate                   0.01        0.01        0.01        0.01        0.01
objective/kl_dist/0             -0.26973    -6.40301     8.35202     10.6791     3.97895
objective/kl_dist/1             -0.31765     0.93231      4.2275     0.00132       6.732
objective/kl_dist/2             -0.18956    -2.83841     6.21091     0.00735     9.99243
objective/kl_dist/3              1.63836     2.24213     5.91051     4.27787     3.79549
"""
CASES, *ROWS = (line.split() for line in FIGURES.strip().splitlines())
# dataclasses.fields of TRL 0.11.4's PPOConfig, but for exp_name, the script's name.
DEFAULTS = {
    **{"seed": 0, "log_with": None, "task_name": None, "model_name": "gpt2"},
    "query_dataset": "stanfordnlp/imdb",
    "reward_model": "sentiment-analysis:lvwerra/distilbert-imdb",
    **{"remove_unused_columns": True, "tracker_kwargs": {}, "accelerator_kwargs": {}},
    **{"project_kwargs": {}, "tracker_project_name": "trl", "push_to_hub_if_best_kwargs": {}},
    **{"steps": 20000, "learning_rate": 1.41e-05, "adap_kl_ctrl": True, "init_kl_coef": 0.2},
    **{"kl_penalty": "kl", "target": 6.0, "horizon": 10000.0, "gamma": 1.0, "lam": 0.95},
    **{"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "batch_size": 128},
    **{"forward_batch_size": None, "mini_batch_size": 128, "gradient_accumulation_steps": 1},
    **{"world_size": None, "ppo_epochs": 4, "max_grad_norm": None, "optimize_cuda_cache": None},
    **{"optimize_device_cache": False, "early_stopping": False, "target_kl": 1.0},
    **{"compare_steps": 1, "ratio_threshold": 10.0, "use_score_scaling": False},
    **{"use_score_norm": False, "score_clip": None, "whiten_rewards": False},
    **{"gradient_checkpointing": False, "is_encoder_decoder": None, "is_peft_model": None},
    **{"backward_batch_size": None, "global_backward_batch_size": None},
    **{"global_batch_size": None, "dataset_num_proc": None},
}


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_trl(case):
    """After three steps, with several epochs, minibatches and options; TRL's own differ by 1e-4
    from run to run where many Adam steps amplify the rounding."""
    stats = classic_peer.run(classic, case)
    column = CASES.index(case) + 1
    for name, *figures in ((row[0], *map(float, row[1:])) for row in ROWS):
        value = stats.get(name)
        if value is None:
            value = stats["objective/kl_dist"][int(name[-1])]
        assert value == pytest.approx(figures[column - 1], rel=1e-3, abs=1e-4), name


def test_keys_and_types_are_those_of_trl():
    stats = step(make_trainer())
    assert set(stats) == KEYS
    assert {name for name, value in stats.items() if isinstance(value, np.ndarray)} == ARRAYS
    assert {type(value) for name, value in stats.items() if name not in ARRAYS} == {float}
    assert stats["objective/logprobs"].shape == (4, 7)
    assert stats["objective/kl_dist"].shape == (4,)


def test_defaults_are_those_of_trl():
    ours = {
        option.name: option.default_factory() if option.default is MISSING else option.default
        for option in fields(PPOConfig)
    }
    del ours["exp_name"], ours["temperature"]
    assert ours == DEFAULTS
    config = PPOConfig(batch_size=8, forward_batch_size=2, gradient_accumulation_steps=2)
    assert (config.mini_batch_size, config.backward_batch_size) == (2, 4)
    assert config.total_ppo_epochs == 2500
    (parsed,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(["--score_clip", "2"])
    assert parsed == PPOConfig(score_clip=2.0)


def test_first_minibatch_is_on_policy_in_spite_of_dropout():
    """Ratio 1 and KL 0 to the last bit of what sampled, after a step too."""
    trainer = make_trainer(dropout=0.5, ppo_epochs=1, temperature=2.0)
    for _ in range(2):
        stats = step(trainer)
        assert stats["ppo/policy/approxkl"] < 1e-12
        np.testing.assert_allclose(stats["ppo/policy/ratio"], 1, atol=1e-6)
    query = torch.tensor([3, 4])
    first, second = (
        trainer.generate(query, do_sample=False, max_new_tokens=8, temperature=2.0)
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_temperature_divides_the_logits():
    trainer = make_trainer(temperature=2.0)
    query, response = torch.tensor(RAGGED[0][0]), torch.tensor(RAGGED[1][0])
    ids = torch.cat([query, response])[None]
    with torch.no_grad():
        logits = trainer.model(ids)[0].double()
    expected = (logits / 2).log_softmax(-1)[0, 2:-1].gather(1, response[:, None])[:, 0]
    logprobs = step(trainer)["objective/logprobs"][0, 2:7]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5)


def test_company_and_padding_change_no_row():
    """Each response alone has the log-probs and the KL that it has in the batch."""
    together = step(make_trainer())
    for i, (query, response) in enumerate(zip(*RAGGED, strict=True)):
        alone = step(make_trainer(batch_size=1, mini_batch_size=1), [query], [response])
        part = slice(len(query) - 1, len(query) + len(response) - 1)
        np.testing.assert_allclose(
            alone["objective/logprobs"][0, part], together["objective/logprobs"][i, part], rtol=1e-5
        )
        assert alone["objective/kl"] == pytest.approx(together["objective/kl_dist"][i], abs=1e-5)


def test_minibatches_that_one_step_sums_over_change_nothing_but_memory():
    """Also where they differ in length, and TRL took the mean of their means."""
    changes = []
    for size in (4, 2, 1):
        trainer = make_trainer(
            mini_batch_size=size, gradient_accumulation_steps=4 // size, ppo_epochs=1
        )
        trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=1.0)
        before = weights(trainer)
        step(trainer)
        changes.append(weights(trainer) - before)
    assert changes[0].norm() > 0.1
    for change in changes[1:]:
        torch.testing.assert_close(change, changes[0], rtol=1e-4, atol=1e-6)


def test_max_grad_norm_bounds_every_step():
    trainer = make_trainer(max_grad_norm=1e-2, ppo_epochs=1)
    trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=1.0)
    for _ in range(3):
        before = weights(trainer)
        step(trainer)
        assert (weights(trainer) - before).norm() == pytest.approx(1e-2, rel=1e-3)


def test_minibatch_beyond_ratio_threshold_takes_no_part():
    trainer = make_trainer()
    step(trainer)  # gives Adam a momentum
    before = weights(trainer)
    trainer.config.ratio_threshold = 0.5
    with pytest.warns(UserWarning, match=r"skipped: its mean ratio 1.00 is above .* 0.5"):
        step(trainer)
    assert torch.equal(weights(trainer), before)


def estimate(rewards: list[float], values: list[float]) -> np.ndarray:
    """The advantages of a trajectory by their recursion, with γ = 0.9 and λ = 0.8."""
    value, advantage, advantages = 0.0, 0.0, []
    for reward, own in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + 0.9 * value - own + 0.9 * 0.8 * advantage
        value = own
        advantages.insert(0, advantage)
    return np.array(advantages)


def test_masked_token_of_a_response_is_skipped():
    """Advantages are those of the trajectory without it, the score at its last token."""
    trainer = make_trainer(
        batch_size=1, mini_batch_size=1, ppo_epochs=1, init_kl_coef=0.0, gamma=0.9, lam=0.8
    )
    query, response, counted = [3, 4], [5, 6, 7, 8, 9], [0, 1, 3]
    with torch.no_grad():
        values = trainer.model(torch.tensor([query + response]))[2][0, 1:-1]
    expected = estimate([0.0, 0.0, 1.0], values[counted].tolist())
    expected = (expected - expected.mean()) / expected.std(ddof=1)
    stats = step(trainer, [query], [response], rows([[1, 1, 0, 1, 0]]))
    advantages = stats["ppo/policy/advantages"]
    np.testing.assert_allclose(advantages[[1, 2, 4]], expected, rtol=1e-4)
    assert advantages[[0, 3, 5]].tolist() == [0, 0, 0]


def test_whitened_rewards_of_padding_enter_no_advantage():
    """Responses of different lengths, which TRL got wrong: the returns by the recursion."""
    trainer = make_trainer(ppo_epochs=1, init_kl_coef=0.0, gamma=0.9, lam=0.8, whiten_rewards=True)
    rewards = [[0.0] * (len(response) - 1) for response in RAGGED[1]]
    for row, score in zip(rewards, [1.0, -0.5, 0.25, 2.0], strict=True):
        row.append(score)
    every = np.concatenate(rewards)
    returns = []
    for query, response, row in zip(*RAGGED, rewards, strict=True):
        with torch.no_grad():
            values = trainer.model(torch.tensor([query + response]))[2][0, len(query) - 1 : -1]
        whitened = (np.array(row) - every.mean()) / every.std(ddof=1) + every.mean()
        returns.append(estimate(whitened.tolist(), values.tolist()) + values.numpy())
    stats = step(trainer)
    assert stats["ppo/returns/mean"] == pytest.approx(np.concatenate(returns).mean(), rel=1e-4)
    assert stats["ppo/returns/var"] == pytest.approx(np.concatenate(returns).var(ddof=1), rel=1e-4)


def test_single_token_response_gives_no_nan():
    stats = step(make_trainer(batch_size=1, mini_batch_size=1), [[3, 4]], [[5]])
    without = {"ppo/std_scores", "tokens/queries_len_std", "tokens/responses_len_std"}
    without |= {"ppo/val/var_explained"}
    assert all(np.isfinite(value).all() for name, value in stats.items() if name not in without)


def test_gradient_checkpointing_changes_nothing():
    plain, checkpointed = make_trainer(), make_trainer(gradient_checkpointing=True)
    for trainer in (plain, checkpointed):
        # Adam would make whole steps of the rounding where a gradient is 0.
        trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=0.1)
        step(trainer)
    torch.testing.assert_close(weights(plain), weights(checkpointed))


def test_default_reference_is_a_frozen_copy():
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=4, learning_rate=1e-2),
        make_model(classic, 0.0),
        tokenizer=make_tokenizer(),
    )
    assert step(trainer)["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(step(trainer)["objective/kl"]) > 1e-3


def test_layers_shared_with_the_reference_stay_as_they_are():
    model = make_model(classic, 0.0)
    reference = create_reference_model(model, num_shared_layers=1)
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=4), model, reference, make_tokenizer()
    )
    layers = [x.pretrained_model.transformer.h for x in (model, reference)]
    for name in ("attn.c_attn.weight", "mlp.c_fc.bias"):
        assert layers[0][0].get_parameter(name) is layers[1][0].get_parameter(name)
        assert layers[0][1].get_parameter(name) is not layers[1][1].get_parameter(name)
    before = layers[0][0].attn.c_attn.weight.clone(), layers[0][1].attn.c_attn.weight.clone()
    step(trainer)
    assert torch.equal(layers[0][0].attn.c_attn.weight, before[0])
    assert not torch.equal(layers[0][1].attn.c_attn.weight, before[1])
    with pytest.raises(UserError, match=r"num_shared_layers must be from 1 to 1.*got 2"):
        create_reference_model(model, num_shared_layers=2)


def test_interrupted_step_leaves_the_next_one_as_it_is(monkeypatch):
    interrupted, plain = (
        make_trainer(mini_batch_size=2, gradient_accumulation_steps=2) for _ in range(2)
    )
    train_minibatch = interrupted._train_minibatch

    def train_and_stop(*arguments):
        train_minibatch(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(interrupted, "_train_minibatch", train_and_stop)
        with pytest.raises(KeyboardInterrupt):
            step(interrupted)
    assert torch.equal(weights(interrupted), weights(plain))
    for trainer in (interrupted, plain):
        np.random.seed(0)
        step(trainer)
    torch.testing.assert_close(weights(interrupted), weights(plain))


def test_learning_rate_schedule_moves_once_a_step():
    model = make_model(classic, 0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=2),
        model,
        tokenizer=make_tokenizer(),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    assert [step(trainer)["ppo/learning_rate"] for _ in range(3)] == [0.1, 0.05, 0.025]
