"""The counting toy: its world, its curve's beginning, and the figures of a run."""

import json
from pathlib import Path

import pytest

from rlhf.data.loaders import load_prompts
from rlhf.demo import counting
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.ppo.train import train_ppo


def test_the_world(tmp_path):
    config = counting.make_world(tmp_path, seed=3)
    tokenizer = load_tokenizer(config.model_name_or_path)
    assert len(tokenizer) == load_causal_lm(config.model_name_or_path).config.vocab_size == 36
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4, 35]) == [
        *("[PAD]", "<eos>", "<bos>", "<unk>"),
        *("t0", "t31"),
    ]
    prompts = load_prompts(config, config.dataset_name, config.dataset_split, tokenizer).ids
    assert len(prompts) == 128 * 16
    assert all(len(ids) == 3 and ids[0] == 2 and min(ids[1:]) >= 4 for ids in prompts)
    assert {token for ids in prompts for token in ids[1:]} == set(range(4, 36))
    assert counting.count(["t5 t5 t15 t0 t5", "t50 t6", ""]) == [3, 0, 0]


def test_a_policy_learns_to_count(tmp_path):
    config = counting.make_world(tmp_path, seed=0)
    config.total_episodes, config.lr_scheduler_type = 40 * counting.BATCH_SIZE, "constant"
    train_ppo(config, [counting.count])
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(record["tokens/response_len"] == 12 for record in records)
    assert records[0]["objective/scores"] < 2
    # Untrained, 12 / 35 = 0.34.
    assert records[-1]["objective/scores"] > 8


def test_the_figures_of_a_run(monkeypatch):
    def train(config, reward_funcs):
        assert reward_funcs == [counting.count] and config.seed == 7
        folder = Path(config.output_dir)
        folder.mkdir()
        records = [
            {
                "step": step,
                "objective/scores": step / 10,
                "objective/kl": 2 * step,
                "time/generate": 0.01,
                "time/evaluate": 0.02,
                "time/update": 0.03 if step < 65 else 0.05,
            }
            for step in range(4, 129, 4)
        ]
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )

    monkeypatch.setattr(counting, "train_ppo", train)
    assert counting.run_counting(7) == pytest.approx(
        {"score_at_40": 4.0, "score": 12.4, "kl": 248.0, "seconds": 128 * 0.07}
    )
