"""Padding, and the batches of a fixed data set."""

from collections import Counter

from rlhf.config.training import SFTConfig
from rlhf.data.batches import Batches
from rlhf.data.padding import pad
from tests.rlhf.helpers.rows import UNUSED, take

# Batches


def test_rows_are_padded_on_either_side():
    rows, mask = pad([[5, 6, 7], [8]], 0)
    assert rows.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    rows, mask = pad([[5, 6, 7], [8]], 5, side="left")
    assert rows.tolist() == [[5, 6, 7], [5, 5, 8]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    flags, _ = pad([[False, True], [True]], False)
    assert flags.tolist() == [[False, True], [True, False]]


def test_every_epoch_holds_every_example_once():
    config = SFTConfig(**UNUSED, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    lengths = [1 + i % 7 for i in range(20)]
    assert Batches(lengths, config).total == 4
    config.num_train_epochs = 2
    steps = take(Batches(lengths, config))
    for epoch in (steps[:4], steps[4:]):
        assert Counter(i for batch in epoch for micro in batch for i in micro) == Counter(range(20))
        assert sorted(sum(map(len, batch)) for batch in epoch) == [2, 6, 6, 6]
        assert all(len(micro) <= 3 for batch in epoch for micro in batch)


def test_steps_are_counted_over_epochs_and_processes(monkeypatch):
    def steps(**changes) -> int:
        defaults = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
        return Batches([1] * 20, SFTConfig(**UNUSED | defaults | changes)).total

    assert steps(num_train_epochs=2.5) == 10
    assert steps(num_train_epochs=1.1, per_device_train_batch_size=1) == 11
    assert steps(max_steps=7) == 7
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert steps() == 2
    assert steps(max_steps=7) == 7


def test_batches_do_not_depend_on_how_many_processes_share_them(monkeypatch):
    def first_batches(accumulation: int) -> list[list[list[int]]]:
        config = SFTConfig(
            **UNUSED,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=accumulation,
            max_steps=9,
        )
        return take(Batches(list(range(40)), config))

    alone = first_batches(4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert first_batches(2) == alone
    assert max(len(batch) for batch in alone) == 4
    for batch in alone:
        shares = [batch[rank::2] for rank in range(2)]
        assert sorted(shares[0] + shares[1]) == sorted(batch)
        assert len(shares[0]) <= 2 and len(shares[1]) <= 2
