"""`rlhf.classic` against TRL 0.11.4: figures, defaults and keys; and where TRL was wrong."""

import math
import pickle
import sys
from dataclasses import MISSING, fields
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    DistilBertConfig,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedTokenizerFast,
)

pytest.importorskip("datasets")
from datasets import Dataset

from rlhf import classic
from rlhf.classic import (
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
    respond_to_batch,
)
from rlhf.errors import UserError
from tests.rlhf import classic_peer
from tests.rlhf.classic_peer import RAGGED, make_model, make_tokenizer

# Fixed responses are no samples of the policy.
pytestmark = pytest.mark.filterwarnings("ignore:objective/kl is")

# `python tests/rlhf/classic_peer.py` with TRL 0.11.4, transformers 4.46.3, torch 2.13.0.
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
KEYS = {
    *("objective/kl", "objective/kl_dist", "objective/logprobs", "objective/ref_logprobs"),
    *("objective/kl_coef", "objective/entropy"),
    *("ppo/mean_non_score_reward", "ppo/mean_scores", "ppo/std_scores", "ppo/learning_rate"),
    *("ppo/loss/policy", "ppo/loss/value", "ppo/loss/total"),
    *("ppo/policy/entropy", "ppo/policy/approxkl", "ppo/policy/policykl", "ppo/policy/clipfrac"),
    *("ppo/policy/advantages", "ppo/policy/advantages_mean", "ppo/policy/ratio"),
    *("ppo/returns/mean", "ppo/returns/var"),
    *("ppo/val/vpred", "ppo/val/error", "ppo/val/clipfrac", "ppo/val/mean", "ppo/val/var"),
    "ppo/val/var_explained",
    *("tokens/queries_len_mean", "tokens/queries_len_std", "tokens/queries_dist"),
    *("tokens/responses_len_mean", "tokens/responses_len_std", "tokens/responses_dist"),
    *("time/ppo/forward_pass", "time/ppo/compute_rewards", "time/ppo/compute_advantages"),
    *("time/ppo/optimize_step", "time/ppo/calc_stats", "time/ppo/total"),
}
ARRAYS = {
    *("objective/kl_dist", "objective/logprobs", "objective/ref_logprobs"),
    *("ppo/policy/advantages", "ppo/policy/ratio", "tokens/queries_dist", "tokens/responses_dist"),
}
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


def rows(values) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


def make_trainer(dropout: float = 0.0, **options) -> PPOTrainer:
    """A trainer of four responses at a time whose reference is another model."""
    options = {"batch_size": 4, "mini_batch_size": 4, "learning_rate": 1e-2} | options
    return PPOTrainer(
        PPOConfig(**options),
        make_model(classic, 0.0, dropout),
        make_model(classic, 0.5, dropout),
        make_tokenizer(),
    )


def step(trainer: PPOTrainer, queries=RAGGED[0], responses=RAGGED[1], masks=None) -> dict:
    scores = rows([1.0, -0.5, 0.25, 2.0][: len(queries)])
    return trainer.step(rows(queries), rows(responses), scores, masks)


def weights(trainer: PPOTrainer) -> torch.Tensor:
    return torch.cat([x.detach().flatten().clone() for x in trainer.model.parameters()])


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


# The value head


def test_saved_folder_holds_model_and_head(tmp_path):
    trainer = make_trainer()
    step(trainer)
    trainer.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        logits, _, values = trainer.model(ids)
        again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path)).eval()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        for result, expected in zip(again(ids)[::2], (logits, values), strict=True):
            torch.testing.assert_close(result, expected)
        torch.testing.assert_close(plain(ids).logits, logits)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["v_head.summary.weight"].shape == (1, 8)
    assert (tmp_path / "tokenizer.json").exists()
    assert set(again.state_dict()) == set(plain.state_dict()) | {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }
    half = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.pretrained_model.dtype == torch.bfloat16
    assert torch.equal(half.v_head.summary.weight, again.v_head.summary.weight)
    assert half(ids)[2].dtype == torch.float32


def test_folder_without_head_is_given_a_new_one(world, tmp_path):
    path = str(world / "llama")
    with torch.random.fork_rng():
        model = AutoModelForCausalLMWithValueHead.from_pretrained(
            path, v_head_init_strategy="normal", v_head_initializer_range=3.0
        )
    assert model.v_head.summary.bias.item() == 0
    assert model.v_head.summary.weight.std().item() == pytest.approx(3, rel=0.5)
    expected = AutoModelForCausalLM.from_pretrained(path).state_dict()
    for name, weight in expected.items():
        assert torch.equal(model.state_dict()[name], weight)
    ids = torch.tensor([[3, 4, 5]])
    logits, loss, values, cache = model(ids, labels=ids, return_past_key_values=True)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(loss, expected)
    assert values.shape == (1, 3) and cache.get_seq_length() == 3
    with pytest.raises(UserError, match="v_head_init_strategy must be None or 'normal', got 'x'"):
        AutoModelForCausalLMWithValueHead.from_pretrained(path, v_head_init_strategy="x")
    DistilBertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"must be a causal language model .* DistilBertConfig"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_options_of_trl_for_other_models_may_be_empty(world, caplog):
    """TRL's own script gives peft_config=None; and a folder without head is no fault to report."""
    path = str(world / "gpt2")
    AutoModelForCausalLMWithValueHead.from_pretrained(
        path, peft_config=None, reward_adapter=None, load_in_8bit=False, is_trainable=True
    )
    assert "LOAD REPORT" not in caplog.text
    for options in ({"peft_config": object()}, {"reward_adapter": "x"}, {"load_in_4bit": True}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is not supported: give a wh"):
            AutoModelForCausalLMWithValueHead.from_pretrained(path, **options)


def save_bin(model: AutoModelForCausalLMWithValueHead, folder) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def save_shards(model: AutoModelForCausalLMWithValueHead, folder) -> None:
    model.save_pretrained(folder, max_shard_size="1KB")


def test_half_a_head_is_none(tmp_path):
    model = make_model(classic, 0.0)
    weights = model.state_dict()
    del weights["v_head.summary.bias"]
    model.config.save_pretrained(tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"the value head in .* is damaged: it lacks"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("save", [save_bin, save_shards])
def test_head_is_read_from_whatever_kind_of_file(save, tmp_path):
    model = make_model(classic, 0.0)
    save(model, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_wrapper_has_its_own_head(tmp_path, world):
    """Under TRL's names, pickled, and exchanged for another, with which it is saved."""
    opened = AutoModelForCausalLMWithValueHead.from_pretrained(str(world / "gpt2"))
    again = pickle.loads(pickle.dumps(opened))
    for name, weight in opened.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    model = make_model(classic, 0.0)
    names = [name for name, _ in model.named_parameters()]
    assert names[0] == "pretrained_model.transformer.wte.weight"
    assert names[-2:] == ["v_head.summary.weight", "v_head.summary.bias"]
    model.v_head = make_model(classic, 0.5).v_head
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert torch.equal(again.v_head.summary.weight, make_model(classic, 0.5).v_head.summary.weight)
    assert [name for name, _ in again.named_parameters()] == names


def test_gradient_checkpointing_of_the_model_itself():
    model = make_model(classic, 0.0)
    layers = model.pretrained_model.transformer.h
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in layers)
    model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in layers)


def test_saved_folder_goes_to_the_hub_if_told_so(tmp_path, monkeypatch):
    trainer, pushed = make_trainer(), []
    monkeypatch.setattr(
        trainer, "push_to_hub", lambda repo_id, **options: pushed.append((repo_id, options))
    )
    trainer._save_pretrained(tmp_path / "policy")
    assert not pushed
    trainer.save_pretrained(tmp_path / "policy", push_to_hub=True)
    trainer.save_pretrained(str(tmp_path), repo_id="me/it", push_to_hub=True, private=True)
    assert pushed == [("policy", {}), ("me/it", {"private": True})]
    with pytest.raises(UserError, match="private is for push_to_hub: leave it out"):
        trainer.save_pretrained(tmp_path / "policy", private=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot save the model in .*: free .* another folder$"):
        trainer.save_pretrained(tmp_path / "file" / "policy")
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "policy")


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 6, "mini_batch_size": 4},
            r"batch_size must be a multiple .* 4 \* 1, got 6",
        ),
        ({"mini_batch_size": 0}, "mini_batch_size must be an integer >= 1, got 0"),
        ({"kl_penalty": "k3"}, "kl_penalty must be one of .*'full'.*, got 'k3'"),
        ({"log_with": "mlflow"}, "log_with must be one of .*'wandb'.*, got 'mlflow'"),
        ({"log_with": "wandb"}, "log_with 'wandb' needs wandb: pip install wandb"),
        ({"temperature": 0.0}, "temperature must be a number > 0, got 0.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number > 0 or None, got 0.0"),
        ({"gamma": 1.5}, r"gamma must be a number in \[0, 1\], got 1.5"),
        ({"learning_rate": "1e-5"}, "learning_rate must be a number >= 0 and finite, got '1e-5'"),
        ({"learning_rate": None}, "learning_rate must be a number >= 0 and finite, got None"),
        ({"score_clip": "2"}, "score_clip must be a number > 0 or None, got '2'"),
        ({"target_kl": None}, "target_kl must be a number > 0, got None"),
        ({"horizon": 10.0}, "horizon must be more than a fifth of batch_size 128.* got 10.0"),
        ({"world_size": 2}, "world_size must be left out: .* one process.*, got 2"),
        ({"is_peft_model": True}, "is_peft_model must be left out"),
        ({"push_to_hub_if_best_kwargs": {"private": True}}, "must hold repo_id, got"),
    ],
)
def test_config_is_checked(changes, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # wandb's
    with pytest.raises(UserError, match=message) as error:
        PPOConfig(**changes)
    assert "\n" not in str(error.value)


GOOD = {
    "queries": rows(RAGGED[0]),
    "responses": rows(RAGGED[1]),
    "scores": rows([1.0, -0.5, 0.25, 2.0]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.ones(4, 2)}, "queries must be a list of tensors, got Tensor"),
        (
            {"responses": GOOD["responses"][:3]},
            "responses must have batch_size = 4 elements, got 3",
        ),
        ({"scores": [1.0, 2.0, 3.0, 4.0]}, r"scores\[0\] must be a tensor, got float"),
        ({"queries": [*GOOD["queries"][:3], [3]]}, r"queries\[3\] must be a tensor, got list"),
        ({"queries": [x[None] for x in GOOD["queries"]]}, r"queries\[0\] must be 1-D, got shape"),
        (
            {"queries": [x.float() for x in GOOD["queries"]]},
            "int64 or int32 token ids, got torch.f",
        ),
        ({"responses": rows([[], [3], [3], [3]])}, r"responses\[0\] must hold int64"),
        (
            {"responses": [x[:0] for x in GOOD["responses"]]},
            r"responses\[0\] must have at least one",
        ),
        ({"responses": rows([[11], [3], [3], [3]])}, r"ids in \[0, 11\), .*, got 11"),
        ({"queries": rows([[-1], [3], [3], [3]])}, r"ids in \[0, 11\), .*, got -1"),
        ({"responses": [torch.full((33,), 3)] * 4}, r"fit the model's 32 positions, got 38 tokens"),
        ({"scores": [torch.ones(2)] * 4}, r"scores\[0\] must be a single number, got shape \(2,\)"),
        ({"scores": [torch.ones(1, 1)] * 4}, r"scores\[0\] must be a single number"),
        ({"scores": rows([1.0, math.nan, 0.0, 0.0])}, r"scores\[1\] must be finite, got nan"),
        (
            {"response_masks": rows([[1]])},
            "response_masks must have batch_size = 4 elements, got 1",
        ),
        ({"response_masks": rows([[1]] * 4)}, r"response_masks\[0\] must have shape \(5,\)"),
        (
            {"response_masks": [x * 0 for x in GOOD["responses"]]},
            r"response_masks\[0\] must count at least one token, got none",
        ),
    ],
)
def test_step_is_checked(changes, message):
    trainer = make_trainer()
    before = weights(trainer)
    with pytest.raises(UserError, match=message) as error:
        trainer.step(**GOOD | changes)
    assert "\n" not in str(error.value)
    assert torch.equal(weights(trainer), before)


def test_step_without_gradients_is_refused():
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pytest.raises(UserError, match=r"call it outside of torch.no_grad\(\)"):
            make_trainer().step(**GOOD)


def test_scores_of_one_element_are_numbers():
    stats = make_trainer().step(**GOOD | {"scores": [torch.ones(1)] * 4})
    assert stats["ppo/mean_scores"] == 1.0


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1])


def test_trainer_is_checked(monkeypatch):
    model, tokenizer, config = make_model(classic, 0.0), make_tokenizer(), PPOConfig()
    other, frozen = make_model(classic, 0.5), make_model(classic, 0.5).requires_grad_(False)
    for arguments, message in (
        (({}, model, None, tokenizer), "config must be of type rlhf.PPOConfig, got dict"),
        (
            (config, model.pretrained_model, None, tokenizer),
            "model must be of type rlhf.AutoModelForCausalLMWith",
        ),
        (
            (config, model, model.pretrained_model, tokenizer),
            "ref_model must be of type rlhf.AutoModelFor",
        ),
        ((config, model, None, None), "tokenizer must be of type transformers.Pre.*, got NoneType"),
        (
            (config, model, None, tokenizer, [1]),
            "of type torch.Dataset or datasets.Dataset, got list",
        ),
        (
            (config, model, None, tokenizer, Dataset.from_dict({"query": ["a"]})),
            "dataset must have at least batch_size = 128 rows, got 1",
        ),
        (
            (config, model, None, tokenizer, Stream()),
            "dataset must give rows by their index, got an IterableDataset",
        ),
        (
            (config, model, None, PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)),
            "tokenizer must have an EOS token, it has none: set one",
        ),
        (
            (config, model, model, tokenizer),
            "ref_model must be a model of its own, .* leave it out for a frozen copy",
        ),
        (
            (config, model, AutoModelForCausalLMWithValueHead(model.pretrained_model), tokenizer),
            "ref_model must be a model of its own, .* leave it out for a frozen copy",
        ),
        (
            (config, frozen, None, tokenizer),
            "model must have parameters that require a gradient, got none",
        ),
        (
            (config, model, None, tokenizer, None, torch.optim.SGD(other.parameters(), lr=1.0)),
            "optimizer must hold parameters of the model that require a gradient, got none",
        ),
    ):
        with pytest.raises(UserError, match=message):
            PPOTrainer(*arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())
    monkeypatch.setattr("rlhf.distributed.world_size", lambda: 2)
    with pytest.raises(
        UserError, match="PPOTrainer runs in one process: start it without torchrun"
    ):
        PPOTrainer(config, model, None, tokenizer)


# Data and logs


def test_dataloader_shuffles_whole_batches_of_the_columns_that_count():
    dataset = Dataset.from_dict(
        {"input_ids": [[i, i] for i in range(11)], "query": list("abcdefghijk"), "other": [0] * 11}
    ).with_format("torch")
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=4),
        make_model(classic, 0.0),
        None,
        make_tokenizer(),
        dataset,
        data_collator=lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    )
    batches = list(trainer.dataloader)
    assert [set(batch) for batch in batches] == [{"input_ids", "query"}] * 2
    seen = [ids[0].item() for batch in batches for ids in batch["input_ids"]]
    assert len(set(seen)) == 8 and seen != sorted(seen)


def test_accelerator_answers_for_one_process(capsys):
    trainer = make_trainer()
    accelerator = trainer.accelerator
    assert accelerator.is_main_process and accelerator.num_processes == 1
    assert accelerator.process_index == accelerator.local_process_index == 0
    assert accelerator.state.deepspeed_plugin is None
    assert trainer.current_device == accelerator.device and not trainer.is_distributed
    assert accelerator.unwrap_model(trainer.model) is trainer.model
    accelerator.wait_for_everyone()
    accelerator.print("reward", 1.0)
    assert capsys.readouterr().out == "reward 1.0\n"


def test_tensorboard_holds_the_numbers(tmp_path):
    trainer = make_trainer(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path)})
    batch = {"query": ["a"] * 4, "response": ["b"] * 4}
    for _ in range(2):
        stats = step(trainer)
        trainer.log_stats(stats, batch, rows([1.0, -0.5, 0.25, 2.0]))
    events = EventAccumulator(str(tmp_path / "trl"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == KEYS - ARRAYS | {"env/reward_mean", "env/reward_std"}
    last = events.Scalars("objective/kl")[-1]
    assert (last.step, last.value) == (2, pytest.approx(stats["objective/kl"]))
    assert events.Scalars("env/reward_mean")[0].value == 0.6875


def test_wandb_is_given_the_stats_and_a_table(monkeypatch):
    """A stand-in of wandb's own interface, which is not installed here."""
    calls = []
    wandb = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = lambda **arguments: calls.append(arguments)
    wandb.Table = lambda columns, rows: (columns, rows)
    wandb.log = lambda values: calls.append(values)  # a step would have it drop what comes late
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trainer = make_trainer(log_with="wandb", tracker_kwargs={"wandb": {"name": "run"}})
    assert (calls[0]["project"], calls[0]["name"]) == ("trl", "run")
    batch = {"query": list("abcd"), "response": list("efgh")}
    trainer.log_stats(step(trainer), batch, [1.0, 2.0, 3.0, 4.0])
    assert set(calls[1]) == KEYS | {
        *("env/reward_mean", "env/reward_std", "env/reward_dist", "game_log")
    }
    assert calls[1]["game_log"][0] == ["query", "response", "reward"]
    assert calls[1]["game_log"][1][1] == ["b", "f", 2.0]
    with pytest.raises(UserError, match="columns_to_log must be keys of batch, it has no 'x'"):
        trainer.log_stats({}, batch, [1.0] * 4, columns_to_log=["x"])


def test_best_model_is_pushed(monkeypatch):
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "me/best"}, compare_steps=2)
    pushed = []
    monkeypatch.setattr(trainer, "push_to_hub", lambda repo_id: pushed.append(repo_id))
    for scores in (0.0, 9.0, 1.0, 9.0, 0.5):  # of which every second is looked at: 0, 1, 0.5
        trainer.step(**GOOD | {"scores": rows([scores] * 4)})
    assert pushed == ["me/best"] * 2
