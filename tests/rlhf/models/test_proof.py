"""What a model must prove before it is trained, and the ways of sampling that follow from it."""

import inspect

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    FalconH1Config,
    FalconH1ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from rlhf.config.ppo import PPOConfig
from rlhf.data.padding import pad
from rlhf.errors import UserError
from rlhf.models.generation import Decoding, Stopping, cache_keyword, generate
from rlhf.models.loading import load_scorer
from rlhf.models.proof import prove_causal, prove_policy, prove_scorer
from tests.rlhf.helpers.tiny_llama import HEADS, IDS, SIZES, llama_config


def build(model_class, config_class, **options) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(config_class(**options)).eval()


# The keyword of a cache in this version of transformers.
NAME = cache_keyword(LlamaForCausalLM)
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
EXPERTS |= {"shared_expert_intermediate_size": 8}
MAMBA_PART = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
RIGHT = {
    "llama": lambda: LlamaForCausalLM(llama_config()).eval(),
    "gpt2": lambda: build(
        GPT2LMHeadModel, GPT2Config, vocab_size=13, n_embd=16, n_layer=2, n_head=2
    ),
    "granite": lambda: build(GraniteForCausalLM, GraniteConfig, **SIZES | HEADS),
    "mixtral": lambda: build(
        MixtralForCausalLM, MixtralConfig, **SIZES | HEADS, num_key_value_heads=1, sliding_window=4
    ),
    "mamba": lambda: build(MambaForCausalLM, MambaConfig, **SIZES, state_size=4),
    "qwen3-next": lambda: build(
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        **SIZES | HEADS | LINEAR | EXPERTS,
        num_key_value_heads=1,
        head_dim=8,
    ),
    "falcon-h1": lambda: build(
        FalconH1ForCausalLM,
        FalconH1Config,
        **SIZES | HEADS | MAMBA_PART,
        num_key_value_heads=1,
        head_dim=8,
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_families_that_are_right_sample_with_their_cache(name, tokenizer, capsys):
    """Greedy responses, of which some end early, are those of transformers' own generate."""
    model = RIGHT[name]()
    decoding = prove_policy(model, name)
    # Older ones want a further argument, or a cache of a class of their own.
    has_cache = name not in ("mamba", "falcon-h1") or NAME == "cache"
    if has_cache:
        assert decoding == Decoding(cache_keyword(model), masks_steps=name != "mamba")
    assert ("sampling does without" in capsys.readouterr().out) != has_cache
    prompt_ids, prompt_mask = pad([[3], [4, 5, 6], [3, 5], [9, 4]], 0, "left")
    # The responses of three rows are cut short, so that the batch is.
    max_lengths = torch.tensor([2, 6, 2, 1])
    config = PPOConfig(
        **dict.fromkeys(("model_name_or_path", "dataset_name", "output_dir"), "-"),
        reward_funcs=["-"],
    )
    responses = generate(
        model,
        prompt_ids,
        prompt_mask,
        uniforms=torch.full((4, 6), 0.5, dtype=torch.float64),
        max_lengths=max_lengths,
        stopping=Stopping(tokenizer, config),
        decoding=decoding,
        temperature=1e-5,
        pad_token_id=0,
    )
    for row, length in enumerate(responses.lengths):
        prompt = prompt_ids[row, prompt_mask[row]][None]
        own = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=int(length),
            eos_token_id=2,
            pad_token_id=0,
        )
        assert torch.equal(responses.tokens[row, :length], own[0, prompt.shape[1] :])


def test_without_a_cache_the_responses_are_the_same(tokenizer):
    model = RIGHT["llama"]()
    prompt_ids, prompt_mask = pad([[3], [4, 5, 6], [3, 5], [9, 4]], 0, "left")
    config = PPOConfig(
        **dict.fromkeys(("model_name_or_path", "dataset_name", "output_dir"), "-"),
        reward_funcs=["-"],
    )
    uniforms = torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    responses = [
        generate(
            model,
            prompt_ids,
            prompt_mask,
            uniforms=uniforms,
            max_lengths=torch.tensor([8, 3, 1, 2]),
            stopping=Stopping(tokenizer, config),
            decoding=decoding,
            temperature=1.0,
            pad_token_id=0,
        )
        for decoding in (Decoding(NAME), Decoding(None), Decoding(NAME, drops_rows=False))
    ]
    for other in responses[1:]:
        assert torch.equal(responses[0].tokens, other.tokens)
        assert torch.equal(responses[0].lengths, other.lengths)


BERT = SIZES | HEADS | {"is_decoder": False}
WRONG = {
    "bert": (lambda: build(BertLMHeadModel, BertConfig, **BERT), "see later tokens"),
    "bidirectional": (
        lambda: LlamaForCausalLM(llama_config(is_causal=False)).eval(),
        "see later tokens",
    ),
    "bart": (
        lambda: build(
            BartForCausalLM,
            BartConfig,
            vocab_size=13,
            d_model=16,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=16,
            is_decoder=True,
            is_encoder_decoder=False,
        ),
        "padding before a row",
    ),
    "rwkv": (
        lambda: build(RwkvForCausalLM, RwkvConfig, **SIZES, attention_hidden_size=16),
        "padding before a row",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_models_that_cannot_be_policies_are_refused(name):
    make, reason = WRONG[name]
    if name == "bidirectional" and NAME != "cache":
        pytest.skip("a Llama of this version of transformers is always causal")
    model = make()
    with pytest.raises(UserError, match=f"path cannot be used, {type(model).__name__}: .*{reason}"):
        prove_policy(model, "path")
    if reason == "see later tokens":
        with pytest.raises(UserError, match=reason):
            prove_causal(model, "path")
    else:
        prove_causal(model, "path")


class PositionBlind(LlamaForCausalLM):
    """A model that does not look at the positions that it is given: absolute ones, by column."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        embeddings = self.get_input_embeddings()(input_ids)
        embeddings = embeddings + torch.linspace(0, 1, input_ids.shape[1])[:, None]
        return super().forward(inputs_embeds=embeddings, **kwargs)


def test_ignored_positions_are_found():
    with pytest.raises(UserError, match="padding before a row"):
        prove_policy(PositionBlind(llama_config()).eval(), "path")


class Forgetful(LlamaForCausalLM):
    """A model that swallows its cache, as one with **kwargs and another name for it would."""

    def forward(self, input_ids, cache=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, **kwargs)


class Uncut(LlamaForCausalLM):
    """A model that keeps something for each row of its batch."""

    def forward(self, input_ids, **kwargs):
        if kwargs.get(NAME) is not None and len(input_ids) != self.rows:
            raise RuntimeError("another batch than before")
        self.rows = len(input_ids)
        return super().forward(input_ids, **kwargs)

    forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)


def test_slower_ways_are_taken_and_said(capsys):
    assert prove_policy(Forgetful(llama_config()).eval(), "path") == Decoding(None)
    assert "sampling does without" in capsys.readouterr().out
    model = Uncut(llama_config()).eval()
    assert prove_policy(model, "path") == Decoding(NAME, drops_rows=False)
    assert "responses that have ended stay" in capsys.readouterr().out


def test_a_scorer_must_be_blind_to_padding(world, tokenizer):
    prove_scorer(load_scorer(str(world / "llama"), tokenizer), "path")
    prove_scorer(load_scorer(str(world / "gpt2"), tokenizer), "path")


def test_eos_ids_of_the_generation_config_end_a_response(tokenizer):
    config = PPOConfig(
        **dict.fromkeys(("model_name_or_path", "dataset_name", "output_dir"), "-"),
        reward_funcs=["-"],
        stop_token=["."],
        stop_strings=["is is"],
    )
    stopping = Stopping(tokenizer, config, GenerationConfig(eos_token_id=[7, 2]))
    assert stopping.ids.tolist() == [IDS["eos_token_id"], 7, 6]
    assert stopping.describe() == "a response ends with '<eos>', 'good', '.', 'is is'"
    assert Stopping(tokenizer, config, GenerationConfig(eos_token_id=7)).ids.tolist() == [2, 7, 6]
    assert Stopping(tokenizer, config, GenerationConfig()).ids.tolist() == [2, 6]
    unknown = GenerationConfig(eos_token_id=[50256, 7])
    assert Stopping(tokenizer, config, unknown).ids.tolist() == [2, 7, 6]
