"""Opening of models: every weight is accounted for, and what a folder is not is said."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
)

from rlhf.classic import AutoModelForCausalLMWithValueHead
from rlhf.errors import UserError
from rlhf.models.loading import (
    load_causal_lm,
    load_learning_reward_model,
    load_reward_model,
    load_scorer,
    load_tokenizer,
    value_head,
)
from rlhf.models.passes import check_fits, normalise_scores, sequence_scores, token_values
from rlhf.reward_model import train_reward
from rlhf.run.state import load_weights, save_model
from tests.rlhf.helpers.tiny_llama import HEADS, SIZES, llama_config
from tests.rlhf.helpers.tiny_models import make_model, model_types
from tests.rlhf.helpers.world import WORDS, make_tokenizer


def save(folder: Path, model, tokenizer=None) -> str:
    torch.manual_seed(0)
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def rename(folder: str, change) -> None:
    """Gives the folder's weights the names that `change(name)` gives; None leaves one out."""
    file = Path(folder) / "model.safetensors"
    weights = {change(name): weight for name, weight in load_file(file).items()}
    save_file({k: v for k, v in weights.items() if k}, file, metadata={"format": "pt"})


RENAMED = {
    "compiled": (lambda name: f"_orig_mod.{name}", "no lm_head.weight, but _orig_mod"),
    "parallel": (lambda name: f"module.{name}", "no lm_head.weight, but module"),
    "peft": (lambda name: f"base_model.model.{name}", "no lm_head.weight, but base_model.model"),
    "no layer": (lambda name: None if "layers.1." in name else name, r"no model.layers.1.*\(9 do"),
    "no head": (lambda name: None if "lm_head" in name else name, r"no lm_head.weight \(1 do"),
}


@pytest.mark.parametrize("case", RENAMED)
@pytest.mark.parametrize(
    "load", [load_causal_lm, AutoModelForCausalLMWithValueHead.from_pretrained]
)
def test_a_policy_whose_weights_do_not_fit_is_refused(case, load, tmp_path):
    change, message = RENAMED[case]
    path = save(tmp_path, LlamaForCausalLM(llama_config()))
    rename(path, change)
    with pytest.raises(UserError, match=message):
        load(path)


def test_only_a_new_head_may_be_missing_from_a_scorer(tmp_path, tokenizer):
    path = save(tmp_path / "policy", LlamaForCausalLM(llama_config()))
    assert load_scorer(path, tokenizer).score.weight.shape == (1, 16)
    with pytest.raises(UserError, match="no scalar head"):
        load_reward_model(path)
    rename(path, lambda name: f"module.{name}")
    with pytest.raises(UserError, match="do not fit a LlamaForSequenceClassification"):
        load_scorer(path, tokenizer)
    scorer = LlamaForSequenceClassification(llama_config(num_labels=1))
    path = save(tmp_path / "scorer", scorer)
    rename(path, lambda name: None if name == "score.weight" else name)
    with pytest.raises(UserError, match=r"there is no score.weight \(1 do not fit\)"):
        load_scorer(path, tokenizer)


def test_a_family_that_can_have_no_head_is_refused(tmp_path, tokenizer):
    """Its configuration has no hidden_size."""
    path = save(tmp_path, make_model("blt", 13))
    with pytest.raises(UserError, match=r"^a BltForCausalLM can have no scalar head: Attr"):
        load_scorer(path, tokenizer)


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"vocab_size": 64, "pad_token_id": 40}])
def test_weights_of_another_shape_are_refused_where_there_is_padding(tmp_path, changes):
    path = save(tmp_path, LlamaForCausalLM(llama_config(pad_token_id=0)))
    file = Path(path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match="do not fit a LlamaForCausalLM: there is "):
        load_causal_lm(path)


def test_the_embedding_of_padding_is_what_was_saved(tmp_path, capsys):
    """transformers sets that of a Youtu to 0 whenever it opens one, and its head is tied to it."""
    model = make_model("youtu", len(WORDS))
    model.model.embed_tokens.weight.data[0] = 1.5
    path = save(tmp_path, model)
    policy = load_causal_lm(path)
    assert "sets model.embed_tokens.weight[0] of a YoutuForCausalLM to 0" in capsys.readouterr().out
    assert (policy.lm_head.weight[0] == 1.5).all()
    policy.model.embed_tokens.weight.data[0] = 0
    load_weights(policy, tmp_path)
    assert (policy.lm_head.weight[0] == 1.5).all()


def test_weights_that_are_not_used_are_said(tmp_path, tokenizer, capsys):
    path = save(tmp_path / "policy", LlamaForCausalLM(llama_config()))
    load_causal_lm(path)
    load_scorer(path, tokenizer)
    assert capsys.readouterr().out == ""
    file = Path(path) / "model.safetensors"
    weights = load_file(file) | {"v_head.summary.weight": torch.zeros(1, 16)}
    save_file(weights, file, metadata={"format": "pt"})
    load_causal_lm(path)
    assert "1 weights are not used, such as v_head.summary.weight" in capsys.readouterr().out
    path = save(tmp_path / "scorer", LlamaForSequenceClassification(llama_config(num_labels=1)))
    file = Path(path) / "model.safetensors"
    save_file(load_file(file) | {"score.bias": torch.ones(1)}, file, metadata={"format": "pt"})
    load_reward_model(path)
    assert "such as score.bias" in capsys.readouterr().out


def test_a_weight_of_another_shape_is_named(tmp_path):
    path = save(tmp_path, LlamaForCausalLM(llama_config()))
    file = Path(path) / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["lm_head.weight"][:4].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight of shape \(4, 16\), where .* \(13, 16\)"):
        load_causal_lm(path)


def test_what_a_folder_is_not_is_said(tmp_path, tokenizer):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="LoRA adapter"):
        load_causal_lm(str(tmp_path / "lora"))
    bart = BartConfig(vocab_size=13, d_model=16, encoder_layers=1, decoder_layers=1)
    path = save(tmp_path / "bart", BartForConditionalGeneration(bart))
    with pytest.raises(UserError, match="encoder-decoder"):
        load_causal_lm(path)
    bert = BertForSequenceClassification(BertConfig(**SIZES | HEADS, num_labels=1))
    path = save(tmp_path / "bert", bert)
    for load in (load_reward_model, lambda path: load_scorer(path, tokenizer)):
        with pytest.raises(UserError, match="BertForSequenceClassification, whose score is not"):
            load(path)
    two = save(tmp_path / "two", LlamaForSequenceClassification(llama_config(num_labels=2)))
    with pytest.raises(UserError, match="classifier with 2 labels"):
        load_reward_model(two)


def test_code_of_a_folder_runs_only_if_asked_for(tmp_path, tokenizer, monkeypatch):
    path = save(tmp_path, LlamaForCausalLM(llama_config()))
    (tmp_path / "modeling.py").write_text("raise SystemExit('it ran')\n")
    config = Path(path) / "config.json"
    auto_map = '{"auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"},'
    text = config.read_text().replace("{", auto_map, 1).replace('"llama"', '"unheard_of"')
    config.write_text(text)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for load in (load_causal_lm, load_reward_model):
        with pytest.raises(UserError, match=r"needs Python code .* --trust_remote_code true"):
            load(path)


FAMILIES = {
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES | HEADS)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)),
    # It has buffers that are not saved, and its trunk's weights go by other names in part.
    "falcon_h1": lambda: make_model("falcon_h1", len(WORDS)),
    "dory": lambda: make_model("dory", len(WORDS)),
    "llama4": lambda: make_model("llama4_text", len(WORDS)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_scorers_of_families_without_a_class_in_transformers(family, tmp_path, tokenizer):
    if family not in ("granite", "mamba") and family not in model_types():
        pytest.skip("this version of transformers does not have it")
    path = save(tmp_path / "policy", FAMILIES[family]())
    scorer = load_scorer(path, tokenizer)
    save_model(tmp_path / "scorer", scorer, tokenizer)
    again = load_reward_model(str(tmp_path / "scorer"))
    ids, mask = torch.tensor([[3, 4, 7], [5, 3, 6]]), torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(token_values(scorer, ids, mask), token_values(again, ids, mask))
    with torch.no_grad():
        again.score.weight.zero_()
    load_weights(again, tmp_path / "scorer")
    assert torch.equal(again.score.weight, scorer.score.weight)
    shared = value_head(load_causal_lm(path))
    assert not token_values(shared, ids, mask).any()


def test_a_reward_model_with_eos_as_pad_gets_a_pad_token(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    path = save(tmp_path / "policy", LlamaForCausalLM(llama_config()), tokenizer)
    tokenizer = load_tokenizer(path)
    model = load_learning_reward_model(path, tokenizer)
    assert tokenizer.pad_token == "<|pad|>" and model.config.pad_token_id == len(WORDS)
    save_model(tmp_path / "reward", model, tokenizer)
    there = LlamaForSequenceClassification.from_pretrained(tmp_path / "reward")
    ids = torch.tensor([[3, 4, 7, 2], [3, 4, 2, len(WORDS)]])
    scores = sequence_scores(model, ids, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    torch.testing.assert_close(there(ids).logits[:, 0], scores)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("family", ["llama", "granite", "mamba"])
def test_the_cards_code_gives_the_reward_models_score(
    family, pad, tmp_path, reward_config, monkeypatch, capsys
):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad
    make = FAMILIES.get(family, lambda: LlamaForCausalLM(llama_config()))
    path = save(tmp_path / "policy", make(), tokenizer)
    config = reward_config(
        model_name_or_path=path, output_dir=str(tmp_path / "reward"), max_steps=2, eval_steps=0
    )
    train_reward(config)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "reward/README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path / "reward")
    capsys.readouterr()
    exec(code.replace("The film is good.", "film is good . "), {})
    score, normalised = map(float, capsys.readouterr().out.split())
    model = load_reward_model(str(tmp_path / "reward"))
    ids = torch.tensor([[3, 5, 7, 6, 2]])
    expected = sequence_scores(model, ids, torch.ones_like(ids))
    assert score == pytest.approx(expected.item(), rel=1e-5)
    assert normalised == pytest.approx(normalise_scores(model, expected).item(), rel=1e-4)


def test_a_critic_is_read_right_or_not_at_all_where_eos_pads(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    path = save(tmp_path / "policy", LlamaForCausalLM(llama_config()), tokenizer)
    critic = load_scorer(path, tokenizer)
    save_model(tmp_path / "critic", critic, tokenizer)
    there = LlamaForSequenceClassification.from_pretrained(tmp_path / "critic")
    ids = torch.tensor([[3, 4, 7, 2]])
    value = token_values(critic, ids, torch.ones(1, 4, dtype=torch.bool))[0, -1]
    torch.testing.assert_close(there(ids).logits[0, 0], value)
    with pytest.raises(ValueError, match="batch sizes > 1"):
        there(ids.repeat(2, 1))


def test_a_reward_model_that_takes_eos_for_padding_is_read_before_it(tmp_path):
    """As elsewhere, where it was trained."""
    config = llama_config(num_labels=1, pad_token_id=2)
    path = save(tmp_path, LlamaForSequenceClassification(config))
    there = LlamaForSequenceClassification.from_pretrained(path)
    model = load_reward_model(path)
    ids = torch.tensor([[3, 4, 7, 2]])
    scores = sequence_scores(model, ids, torch.ones_like(ids), skipped=2)
    torch.testing.assert_close(there(ids).logits[:, 0], scores)


def test_longrope_is_refused_beyond_the_switch_of_its_frequencies(tokenizer):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = LlamaForCausalLM(llama_config(rope_parameters=rope, max_position_embeddings=64))
    check_fits(model, tokenizer, 8, "-")
    with pytest.raises(UserError, match="beyond the 8 positions"):
        check_fits(model, tokenizer, 9, "-")


def test_the_revision_is_that_of_model_and_tokenizer(tmp_path, reward_config, monkeypatch):
    asked = []

    def refuse(auto_class, path, **kwargs):
        asked.append((auto_class.__name__, kwargs["revision"]))
        raise UserError("not opened")

    path = save(tmp_path, LlamaForCausalLM(llama_config()))
    tokenizer = make_tokenizer()
    monkeypatch.setattr("rlhf.models.loading._open", refuse)
    for load in (
        lambda: load_tokenizer(path, None, "v2"),
        lambda: load_causal_lm(path, revision="v2"),
        lambda: load_scorer(path, tokenizer, None, "v2"),
        lambda: load_learning_reward_model(path, tokenizer, None, "v2"),
    ):
        with pytest.raises(UserError, match="not opened"):
            load()
    assert [revision for _, revision in asked] == ["v2"] * 4


def test_dtype(tmp_path, ppo_config):
    path = save(tmp_path / "policy", LlamaForCausalLM(llama_config()))
    half = ppo_config(output_dir="-", dtype="bfloat16")
    scorer = load_scorer(path, make_tokenizer(), half)
    assert scorer.dtype == torch.bfloat16 and scorer.score.weight.dtype == torch.float32
    save_model(tmp_path / "scorer", scorer, make_tokenizer())
    weight = scorer.score.weight.clone()
    with torch.no_grad():
        scorer.score.weight.zero_()
    load_weights(scorer, tmp_path / "scorer")
    assert torch.equal(scorer.score.weight, weight)
    assert load_causal_lm(path).dtype == torch.float32
    shutil.rmtree(tmp_path / "scorer")
