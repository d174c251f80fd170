"""top-k, top-p, min-p and temperature 0: what is drawn from, and PPO on what was kept."""

import pytest
import torch

from rlhf.config.inference import GenerateConfig
from rlhf.data.loaders import Prompts
from rlhf.errors import UserError
from rlhf.inference.policy import Policy
from rlhf.models.truncation import make_filters
from rlhf.ppo.train import train_ppo
from rlhf.ppo.trainer import PPOTrainer

OPTIONS = {
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "all": {"top_k": 6, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7, "min_response_length": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_responses_are_drawn_from_what_they_are_scored_over(options, ppo_config, tmp_path):
    trainer = PPOTrainer(ppo_config(output_dir=str(tmp_path), **options))
    config, rows = trainer.config, trainer.next_rows()
    responses = trainer.sample(trainer.prompts, rows, trainer.generator)
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    for row in shuffled.tolist():
        one = responses.rows(torch.tensor([row]))
        length = int(one.mask.sum())
        assert one.kept[0].counts.shape == (length,)
        logits = trainer.policy(one.input_ids[one.attention_mask][None]).logits[:, -length - 1 : -1]
        scores = trainer.stopping.suppress_(logits.clone())[0] / config.temperature
        ids = iter(one.kept[0].ids.split(one.kept[0].counts.tolist()))
        for step, position in enumerate(scores):
            kept = position[None]
            for function in make_filters(config):
                kept = function(None, kept)
            expected = (kept[0] > -torch.inf).nonzero()[:, 0]
            drawn_from = next(ids)
            assert drawn_from.tolist() == expected.tolist() and len(expected) < len(position)
            assert one.tokens[0, step] in drawn_from
    # The policy's log-probs are those of the renormalised distribution.
    batch = trainer.evaluate(rows, responses)
    one = responses.rows(torch.tensor([0]))
    length = int(one.mask.sum())
    logits = trainer.policy(one.input_ids[one.attention_mask][None]).logits[0, -length - 1 : -1]
    scores = trainer.stopping.suppress_(logits[None].clone())[0].double() / config.temperature
    for step, ids in enumerate(one.kept[0].ids.split(one.kept[0].counts.tolist())):
        expected = scores[step, one.tokens[0, step]] - scores[step, ids.long()].logsumexp(0)
        got = batch.experience.logprobs[0, step]
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    steps = trainer.update(batch)
    assert steps[0]["policy/ratio_error"] < 1e-5 and steps[0]["policy/approxkl"].abs() < 1e-9
    assert batch.experience.ref_logprobs.equal(batch.experience.logprobs)


def test_micro_batches_do_not_change_the_result(ppo_config, tmp_path):
    weights = []
    for size in (8, 2):
        options = {"top_p": 0.8, "per_device_train_batch_size": size, "entropy_coef": 0.01}
        config = ppo_config(output_dir=str(tmp_path / str(size)), rollout_batch_size=16, **options)
        trainer = PPOTrainer(config)
        rows = trainer.next_rows()
        batch = trainer.evaluate(rows, trainer.sample(trainer.prompts, rows, trainer.generator))
        trainer.update(batch)
        weights.append(list(trainer.model.parameters()))
    torch.testing.assert_close(*weights, atol=2e-5, rtol=0)


def test_a_run_learns_from_truncated_samples(ppo_config, tmp_path):
    options = {"top_k": 5, "top_p": 0.95, "entropy_coef": 0.01, "total_episodes": 64}
    metrics = train_ppo(ppo_config(output_dir=str(tmp_path / "run"), **options))
    assert metrics["policy/first_ratio_error"] < 1e-5


def test_hidden_states_have_no_logits_to_keep(ppo_config, tmp_path):
    with pytest.raises(UserError, match="top_k, top_p and min_p need the logits"):
        PPOTrainer(ppo_config(output_dir=str(tmp_path), top_p=0.5, logits_from="hidden"))


def test_bounds(ppo_config):
    for name, value in (("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1)):
        with pytest.raises(UserError, match=f"{name} must be"):
            ppo_config(output_dir="-", **{name: value})
    with pytest.raises(UserError, match="temperature must be > 0"):
        ppo_config(output_dir="-", temperature=0.0)


def test_temperature_0_takes_the_most_probable_token(trained_sft, tmp_path):
    config = GenerateConfig(
        model_name_or_path=str(trained_sft),
        prompt=["film", "plot is"],
        output_file=str(tmp_path / "answers.jsonl"),
        temperature=0.0,
        response_length=8,
    )
    policy = Policy(str(trained_sft), config)
    ids = policy.tokenizer(["film is", "plot"]).input_ids
    samples = policy.answer(Prompts(ids, ["film is", "plot"], {}), lambda: None)
    for row, prompt in enumerate(ids):
        own = policy.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
        mask = samples.responses.mask[row]
        assert samples.responses.tokens[row][mask].tolist() == own[0, len(prompt) :].tolist()
