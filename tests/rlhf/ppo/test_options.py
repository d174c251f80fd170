"""The knobs of PPO, each against what it says it does."""

import json
import math

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from rlhf.errors import UserError
from rlhf.models.generation import Stopping
from rlhf.models.heads import ActorCritic, make_head
from rlhf.models.loading import load_causal_lm, value_head
from rlhf.models.passes import token_values
from rlhf.ppo.train import train_ppo
from rlhf.ppo.trainer import PPOTrainer
from tests.rlhf.helpers.ppo import collect
from tests.rlhf.helpers.stages import records


@pytest.fixture
def make_trainer(ppo_config, tmp_path):
    def make(**changes) -> PPOTrainer:
        return PPOTrainer(ppo_config(output_dir=str(tmp_path / "run"), **changes))

    return make


@pytest.mark.parametrize("scaling", ["none", "running", "reference"])
def test_rewards_and_advantages_from_scratch(make_trainer, scaling):
    """Every knob on the way from scores to advantages, over three iterations, in fp64."""
    trainer = make_trainer(
        kl_coef=0.2,
        kl_estimator="k3",
        gamma=0.9,
        lam=0.8,
        score_scaling=scaling,
        score_clip=0.7,
        missing_eos_penalty=0.3,
        whiten_rewards=True,
        temperature=1.3,
        response_length=4,
    )
    seen = []
    for _ in range(3):
        batch = collect(trainer)
        mask, experience = batch.responses.mask, batch.experience
        scores = batch.scores.scores.double()
        seen.append(scores)
        moments = torch.cat(seen) if scaling == "running" else seen[0]
        if scaling != "none":
            scores = (scores - moments.mean()) / moments.std(correction=0)
        scores = scores.clamp(-0.7, 0.7) - 0.3 * ~batch.responses.ended
        difference = (experience.ref_logprobs - experience.logprobs).double()
        rewards = -0.2 * (torch.expm1(difference) - difference) * mask
        rewards[torch.arange(len(mask)), mask.sum(1) - 1] += scores
        torch.testing.assert_close(batch.rewards.double(), rewards, atol=1e-5, rtol=0)

        whitened = (rewards - rewards[mask].mean()) / rewards[mask].std(correction=0)
        values = experience.values.double()
        advantages = torch.zeros_like(values)
        for row, length in enumerate(mask.sum(1).tolist()):
            following, advantage = 0.0, 0.0
            for t in reversed(range(length)):
                delta = whitened[row, t] + 0.9 * following - values[row, t]
                advantage = delta + 0.9 * 0.8 * advantage
                advantages[row, t], following = advantage, values[row, t]
        returns = (advantages + values)[mask]
        torch.testing.assert_close(batch.returns[mask].double(), returns, atol=1e-5, rtol=1e-5)
        centred = advantages - advantages[mask].mean()
        expected = (centred / advantages[mask].std(correction=0))[mask]
        torch.testing.assert_close(batch.advantages[mask].double(), expected, atol=1e-4, rtol=1e-4)
        trainer.update(batch)


def test_policy_and_critic_have_their_own_learning_rates(make_trainer):
    trainer = make_trainer(learning_rate=1e-3, critic_learning_rate=2e-3)
    rates = {
        id(parameter): group["lr"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert {rates[id(parameter)] for parameter in trainer.policy.parameters()} == {1e-3}
    assert {rates[id(parameter)] for parameter in trainer.model.critic.parameters()} == {2e-3}


def test_a_run_that_diverges_says_so(ppo_config, tmp_path):
    config = ppo_config(
        output_dir=str(tmp_path / "run"), learning_rate=1e12, max_grad_norm=1e9, total_episodes=640
    )
    with pytest.raises(UserError, match=r"learning_rate") as error:
        train_ppo(config)
    assert "\n" not in str(error.value)


def test_kl_coef_cannot_become_negative(make_trainer):
    with pytest.raises(UserError, match="kl_horizon 3 must be more than a fifth of the 16"):
        make_trainer(adaptive_kl="sequence", kl_horizon=3)


def test_scaled_and_clipped_scores_enter_the_reward(make_trainer):
    batch = collect(make_trainer(score_scaling="reference", score_clip=1.0, kl_coef=0.0))
    scores = batch.scores.scores
    expected = ((scores - scores.mean()) / scores.std(correction=0)).clamp(-1, 1)
    torch.testing.assert_close(batch.rewards.sum(1), expected, atol=1e-4, rtol=1e-4)
    assert (expected.abs() == 1).any()


def test_early_stop_ends_the_update_before_the_step(make_trainer):
    trainer = make_trainer(early_stop_kl=1e-12, num_ppo_epochs=5, learning_rate=1e-2)
    taken = []
    trainer.optimizer.register_step_pre_hook(lambda *_: taken.append(1))
    batch = collect(trainer)
    steps = trainer.update(batch)
    assert len(taken) == len(steps) - 1 < trainer.steps_per_iteration
    assert steps[-1]["policy/approxkl"] > 1e-12
    assert trainer.scheduler.last_epoch == trainer.steps_per_iteration
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    patient = make_trainer(early_stop_kl=1e9, num_ppo_epochs=5)
    assert len(patient.update(collect(patient))) == patient.steps_per_iteration


@pytest.mark.parametrize("share_trunk", [False, True])
def test_only_the_critic_learns_during_its_warmup(make_trainer, share_trunk):
    trainer = make_trainer(critic_warmup=1, share_trunk=share_trunk, weight_decay=0.1)
    before = [parameter.clone() for parameter in trainer.policy.parameters()]
    head = trainer.model.critic.score.weight.clone()
    trainer.update(collect(trainer))
    for parameter, start in zip(trainer.policy.parameters(), before, strict=True):
        assert torch.equal(parameter, start)
    assert not torch.equal(trainer.model.critic.score.weight, head)
    trainer.update(collect(trainer))
    assert not torch.equal(next(trainer.policy.parameters()), before[0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("logits_from", ["logits", "hidden"])
def test_a_shared_trunk_gives_the_values_of_its_own_scorer(
    world, tokenizer, ppo_config, name, logits_from
):
    policy = load_causal_lm(str(world / name)).eval()
    head = make_head(logits_from, policy, Stopping(tokenizer, ppo_config(output_dir="-")))
    model = ActorCritic(policy, value_head(policy), head).eval()
    assert model.shares_trunk
    torch.nn.init.normal_(model.critic.score.weight, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 3, 5, 7, 4], [4, 5, 7, 8, 9]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    _, values = model(ids, mask, 3)
    torch.testing.assert_close(values, token_values(model.critic, ids, mask)[:, -3:])
    assert model.critic_parameters() == [model.critic.score.weight]


def test_training_on_a_shared_trunk(ppo_config, tmp_path):
    path = tmp_path / "run"
    config = ppo_config(
        output_dir=str(path),
        share_trunk=True,
        per_device_train_batch_size=32,
        total_episodes=64 * 12,
        learning_rate=3e-3,
    )
    last = train_ppo(config)
    first = records(path)[0]
    assert last["objective/scores"] > first["objective/scores"] + 0.4
    assert last["loss/value"] < 0.5 * first["loss/value"]
    critic = AutoModelForSequenceClassification.from_pretrained(path / "critic")
    policy = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    for ours, theirs in zip(critic.model.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert critic.score.weight.abs().max() > 0


@pytest.fixture
def layers_that_drop_out(tmp_path, tokenizer):
    """Paths of models whose layers call dropout themselves, by name."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    models = {
        "opt": OPTForCausalLM(
            OPTConfig(dropout=0.3, ffn_dim=64, word_embed_proj_dim=32, **sizes, **special)
        ),
        "falcon": FalconForCausalLM(FalconConfig(hidden_dropout=0.3, **sizes, **special)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["opt", "falcon"])
def test_dropout_of_the_layers_themselves_stays_off(
    ppo_config, layers_that_drop_out, name, checkpointing
):
    path = str(layers_that_drop_out / name)
    config = ppo_config(
        model_name_or_path=path, output_dir="-", gradient_checkpointing=checkpointing
    )
    trainer = PPOTrainer(config, [lambda completions: [len(text) for text in completions]])
    dropout = trainer.policy.config.to_dict()
    steps = trainer.update(collect(trainer))
    assert steps[0]["policy/ratio_error"] < 1e-5
    assert trainer.policy.config.to_dict() == dropout


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing_but_memory(make_trainer, world, name):
    """Not the ratio of the first minibatch either: dropout (of the GPT-2) stays off."""
    weights, calls = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(
            model_name_or_path=str(world / name),
            reward_funcs=[str(world / f"{name}-reward")],
            gradient_checkpointing=checkpointing,
        )
        count = []
        layers = trainer.policy.base_model
        first = (layers.layers if name == "llama" else layers.h)[0]
        first.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        batch = collect(trainer)
        count.clear()
        steps = trainer.update(batch)
        calls.append(len(count))
        assert steps[0]["policy/ratio_error"] < 1e-5
        weights.append(list(trainer.model.parameters()))
        assert not first.training
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)
    assert calls[1] == 2 * calls[0]


def test_evaluation_on_held_out_prompts(ppo_config, world, tmp_path):
    path = tmp_path / "run"
    last = train_ppo(
        ppo_config(
            output_dir=str(path),
            eval_dataset_name=str(world / "prompts.jsonl"),
            eval_steps=2,
            total_episodes=16 * 5,
        )
    )
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/scores" in line] == [2, 4, 5]
    assert {"eval/kl", "eval/response_len", "eval/eos_rate"} <= last.keys()
    plain = tmp_path / "plain"
    train_ppo(ppo_config(output_dir=str(plain), total_episodes=16 * 5))
    assert records(plain) == [line for line in records(path) if "eval/scores" not in line]


def test_token_level_rewards_reach_their_tokens(ppo_config, tmp_path):
    def per_token(completion_ids):
        return [[float(token == 7) for token in ids] for ids in completion_ids]

    config = ppo_config(output_dir=str(tmp_path / "run"), kl_coef=0.0)
    trainer = PPOTrainer(config, [per_token])
    batch = collect(trainer)
    expected = ((batch.responses.tokens == 7) & batch.responses.mask).float()
    torch.testing.assert_close(batch.rewards, expected)
    assert expected.any()


def test_bf16_computes_in_bf16_and_keeps_fp32_weights_and_values(make_trainer):
    trainer = make_trainer(bf16=True)
    dtypes = set()
    trainer.policy.lm_head.register_forward_hook(lambda *args: dtypes.add(args[-1].dtype))
    batch = collect(trainer)
    steps = trainer.update(batch)
    assert dtypes == {torch.bfloat16}
    for numbers in (batch.experience.values, batch.scores.scores):
        assert not torch.equal(numbers, numbers.bfloat16().float())
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert math.isfinite(steps[-1]["loss/policy"])


def test_the_learning_rate_follows_its_schedule(ppo_config, tmp_path):
    path = tmp_path / "run"
    train_ppo(
        ppo_config(
            output_dir=str(path),
            total_episodes=16 * 4,
            lr_scheduler_type="linear",
            warmup_ratio=0.25,
        )
    )
    # 16 optimizer steps, 4 of warm-up, 4 in an iteration.
    assert [line["lr"] for line in records(path)] == pytest.approx(
        [0.0, 1e-3, 1e-3 * 8 / 12, 1e-3 * 4 / 12]
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"missing_eos_penalty": 1.0, "missing_eos_score": -1.0}, "give one of them"),
        ({"adaptive_kl": "sequence", "kl_coef": 0.0}, "kl_coef must be > 0"),
        ({"adaptive_kl": "both"}, "adaptive_kl must be one of"),
        ({"adaptive_kl": "token"}, "adaptive_kl token needs target_kl"),
        ({"stop_strings": [".", ""]}, "stop_strings must not hold empty strings"),
        ({"warmup_ratio": 0.1}, "constant has no warm-up"),
        ({"share_trunk": True, "critic_model_path": "x"}, "give one of them"),
        ({"rollout_batch_size": 16, "gradient_accumulation_steps": 2}, "give one of them"),
        ({"reward_weights": [math.inf]}, "reward_weights must be finite numbers"),
        ({"dual_clip": 0.5}, "dual_clip must be > 1"),
        ({"load_best_model_at_end": True}, "needs metric_for_best_model"),
        ({"text_prompt_length": [5, 2]}, "text_prompt_length must be two numbers"),
    ],
)
def test_options_that_contradict_each_other(ppo_config, changes, expected):
    with pytest.raises(UserError, match=expected):
        ppo_config(output_dir="-", **changes)


def test_a_batch_that_cannot_be_divided(ppo_config):
    config = ppo_config(output_dir="-", rollout_batch_size=48)
    assert config.responses_per_iteration(1) == config.responses_per_iteration(3) == 48
    with pytest.raises(UserError, match=r"48 must be a multiple of .* 8 \* 2 \* 2 = 32: try 64"):
        config.responses_per_iteration(2)
