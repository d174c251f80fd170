"""The classic API's data loader, accelerator and trackers."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf import classic
from rlhf.classic import PPOConfig, PPOTrainer
from rlhf.errors import UserError
from tests.rlhf.helpers.classic_peer import make_model, make_tokenizer
from tests.rlhf.helpers.classic_trainer import ARRAYS, GOOD, KEYS, make_trainer, rows, step

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
