"""What a checkpoint is made of: states, hashes and models."""

import copy
import errno
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from rlhf.errors import UserError
from rlhf.run import checkpoints as module
from rlhf.run import files
from rlhf.run.checkpoints import open_run
from rlhf.run.generators import random_state, set_random_state
from rlhf.run.state import hash_data, hash_weights, load_state, load_weights, save_model, save_state
from tests.rlhf.helpers.checkpoints import SMALL, Vocabulary, killed, names, one_line, save

# State


def draw() -> list[float]:
    numbers = [random.gauss(0, 1), np.random.normal(), torch.randn(()).item()]
    if torch.cuda.is_available():
        numbers.append(torch.randn((), device="cuda").item())
    return numbers


def test_random_generators_go_on_where_they_were(tmp_path):
    # gauss and normal make numbers in pairs; the second of a pair is state as well.
    for generate in (random.seed, np.random.seed, torch.manual_seed):
        generate(0)
    draw()
    save_state(tmp_path / "random.pt", random_state())
    expected = [draw() for _ in range(700)]  # beyond one block of the Mersenne twister
    for generate in (random.seed, np.random.seed, torch.manual_seed):
        generate(1)
    assert draw() != expected[0]
    set_random_state(load_state(tmp_path / "random.pt"))
    assert [draw() for _ in range(700)] == expected


def test_optimizer_and_scheduler_state_come_back_bitwise(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return model, optimizer, scheduler

    def step(model, optimizer, scheduler):
        model(torch.ones(3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    unbroken = make()
    step(*unbroken)
    state = [part.state_dict() for part in unbroken]
    save_state(tmp_path / "state.pt", {"parts": state})
    resumed = make()
    for part, values in zip(resumed, load_state(tmp_path / "state.pt")["parts"], strict=True):
        part.load_state_dict(values)
    for parts in (unbroken, resumed):
        step(*parts)
    for old, new in zip(unbroken[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(old, new)


def test_state_that_could_run_code_is_not_loaded(tmp_path):
    torch.save({"config": Path("x")}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="weights_only"):
        load_state(tmp_path / "state.pt")


def test_the_hash_of_data_sees_every_row():
    rows = [[1, 2], "film", {"answer": [1.5, None]}]
    assert hash_data(rows) == hash_data(iter(rows))
    for other in (
        [[1, 3], *rows[1:]],
        [[1], [2], *rows[1:]],
        rows[::-1],
        rows[:2],
        [*rows[:2], {"answer": [1.5, 0]}],
    ):
        assert hash_data(other) != hash_data(rows)
    first, second = ([{"image": {1, 2}, "object": object()}] for _ in range(2))
    assert hash_data(first) == hash_data(second)  # though at another address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_hash_of_weights_sees_every_bit(dtype):
    models = [torch.nn.Linear(3, 2).to(dtype), torch.nn.BatchNorm1d(2)]
    before = hash_weights(models)
    assert hash_weights(copy.deepcopy(models)) == before
    assert hash_weights(models[::-1]) != before
    weight = models[0].weight.data
    bits = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    for bit in range(8 * dtype.itemsize - 1):
        bits[1, 2] ^= 1 << bit
        assert hash_weights(models) != before
        bits[1, 2] ^= 1 << bit
    assert hash_weights(models) == before
    models[1].running_mean += 1
    assert hash_weights(models) != before


def test_the_hash_of_weights_sees_complex_buffers():
    """Some models keep rotary frequencies so."""
    model = torch.nn.Module()
    model.register_buffer("frequencies", torch.randn(4, dtype=torch.complex128))
    before = hash_weights([model])
    model.frequencies[2] += 1e-6j
    assert hash_weights([model]) != before


# Models


def make_model(kind: str):
    torch.manual_seed(0)
    if kind == "tied":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16)
        )
    if kind == "experts":  # saved under other names and in other shapes than they have in memory
        config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
        return MixtralForCausalLM(config)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def scramble(model) -> dict[str, torch.Tensor]:
    """Other weights; the copy of the ones before."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return before


def equal(model, state: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in found)


@pytest.mark.parametrize("shards", ["50GB", "2KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("kind", ["untied", "tied", "experts"])
def test_weights_are_loaded_bitwise_into_the_same_tensors(tmp_path, kind, shards):
    model = make_model(kind)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (shards == "2KB")
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    saved = scramble(model)
    assert not equal(model, saved)
    load_weights(model, tmp_path)
    assert equal(model, saved)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    if kind == "tied":
        assert model.lm_head.weight is model.transformer.wte.weight


def test_loading_weights_draws_no_random_numbers(tmp_path):
    model = make_model("untied")
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    load_weights(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "lm_head|model.layers.2.* which the model lacks and 8 more"),
        ({"num_hidden_layers": 1}, "they hold no model.layers.1"),
        ({"vocab_size": 12}, r"shape \(12, 8\), where the model's is \(11, 8\) and 1 more"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, changes, message):
    LlamaForCausalLM(LlamaConfig(**SMALL | changes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_weights(make_model("untied"), tmp_path)
    one_line(error)


def test_weights_that_cannot_be_read(tmp_path):
    model = make_model("untied")
    model.save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(UserError, match="cannot load the weights") as error:
        load_weights(model, tmp_path)
    one_line(error)


class Sharded:
    """A model that is saved in shards."""

    def __init__(self, model):
        self.model = model

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder, max_shard_size="2KB")


def test_a_model_is_saved_over_an_earlier_one(tmp_path):
    """In shards over one file, and back: no weights of the earlier one are read, and those of
    others stay."""
    model = make_model("untied")
    others = [tmp_path / f"{name}_model.safetensors" for name in ("adapter", "reward")]
    others.append(tmp_path / "model-best.safetensors")
    for other in others:
        other.write_text(other.name)
    for wrapped in (model, Sharded(model), model, Sharded(model)):
        scramble(model)
        save_model(tmp_path, wrapped, Vocabulary())
        assert equal(AutoModelForCausalLM.from_pretrained(tmp_path), model.state_dict())
        assert ("model.safetensors" in names(tmp_path)) == (wrapped is model)
        assert not any(map(files.is_leftover, tmp_path.iterdir()))
    assert [other.read_text() for other in others] == [other.name for other in others]


class Copied:
    """A model whose files are copied from a folder: no threads in a forked process."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save_pretrained(self, folder: Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_while_a_model_is_saved_leaves_one_model_or_none(tmp_path):
    """The earlier model, the new one, or a folder that is not opened; never a mixture."""
    model, seen = make_model("untied"), set()
    model.save_pretrained(tmp_path / "new", max_shard_size="5KB")
    after = scramble(model)
    model.save_pretrained(tmp_path / "earlier")
    before = scramble(model)
    for call in range(1, 300):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "earlier", out)
        new = Copied(tmp_path / "new")
        was_killed = killed(lambda out=out, new=new: save_model(out, new, Vocabulary()), call)
        if (out / "config.json").exists():
            found = AutoModelForCausalLM.from_pretrained(out)
            seen.add("before" if equal(found, before) else "after")
            assert equal(found, before) or equal(found, after)
        else:
            seen.add("none")
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(out)
        if not was_killed:
            break
    assert 20 < call < 299
    assert seen == {"before", "none", "after"}


def test_a_model_that_cannot_be_saved_leaves_the_earlier_one(tmp_path, monkeypatch):
    model = make_model("untied")
    save_model(tmp_path, model, Vocabulary())

    class Broken:
        def save_pretrained(self, folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = scramble(model)
    with pytest.raises(UserError) as error:
        save_model(tmp_path, model, Broken())
    assert one_line(error).startswith(f"cannot save the model in {tmp_path}: No space left on dev")
    assert not any(map(files.is_leftover, tmp_path.iterdir()))
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path), before)


def test_a_folder_that_cannot_be_made(tmp_path, make_config):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to output_dir .* Not a directory: choose"):
        open_run(make_config(output_dir=str(tmp_path / "file" / "run")), "ppo")
    with pytest.raises(UserError, match="is a file"):
        open_run(make_config(output_dir=str(tmp_path / "file")), "ppo")
    with pytest.raises(UserError, match=r"cannot write to output_dir .* too long: choose"):
        open_run(make_config(output_dir=str(tmp_path / ("a" * 300))), "ppo")
    with pytest.raises(UserError, match="it cannot be read: File name too long: give a whole"):
        open_run(make_config(resume_from_checkpoint="a" * 300), "ppo")


def test_a_full_disk_names_the_remedy(run, make_config, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = save(run, 2)
    monkeypatch.setattr(module, "write_file", full)
    start = "cannot write to output_dir .*: No space left on device: "
    with pytest.raises(UserError, match=f"{start}free some space .* go on with --resume"):
        open_run(make_config(resume_from_checkpoint="auto"), "ppo")
    new = str(tmp_path / "new")
    with pytest.raises(UserError, match=f"{start}choose another folder"):
        open_run(make_config(output_dir=new), "ppo")
    with pytest.raises(UserError, match=f"{start}choose another folder"):
        open_run(make_config(output_dir=new + "er", resume_from_checkpoint=str(path)), "ppo")
