"""The classic API's model with a value head, and how it is saved and opened."""

import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DistilBertConfig

from rlhf import classic
from rlhf.classic import AutoModelForCausalLMWithValueHead
from rlhf.errors import UserError
from tests.rlhf.helpers.classic_peer import make_model
from tests.rlhf.helpers.classic_trainer import make_trainer, step

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
