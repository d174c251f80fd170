"""Tiny random models of every class in transformers' causal mapping.

A configuration is its class's default with every known size cut down, and with one layer of each
kind that the default has; OVERRIDES holds what a class needs beyond that.
"""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
POSITIONS = 64
# The most that a configuration's field of this name may be.
SIZES = {
    **dict.fromkeys(
        (
            *("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "embedding_size"),
            *("word_embed_proj_dim", "attention_hidden_size", "lru_width", "input_embedding_size"),
            *("output_embedding_size", "out_hidden_size", "hidden_size_global"),
            *("mamba_d_ssm", "d_ff", "ext_pw_out_channel", "depthwise_separable_out_channel"),
            *("nemo_conv_channels",),
        ),
        32,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"),
            *("ffn_hidden_size", "dff", "dim_ff", "feed_forward_size", "d_inner", "shared_mlp"),
            *("intermediate_size_mlp", "dense_intermediate_size", "shared_intermediate_size"),
            *("expert_ffn_hidden_size", "mlp_dim"),
        ),
        64,
    ),
    **dict.fromkeys(
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size", "router_hidden_size"),
            *("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"),
            *("q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank"),
            *("hc_lowrank", "ple_embed_dim", "laurel_rank", "hidden_size_per_layer_input"),
        ),
        16,
    ),
    **dict.fromkeys(
        (
            *("head_dim", "dim_head", "d_head", "d_kv", "attention_head_dim", "kv_channels"),
            *(
                "qk_nope_head_dim",
                "v_head_dim",
                "swa_head_dim",
                "index_head_dim",
                "global_head_dim",
            ),
            *("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head"),
            *("mamba_head_dim", "mamba_headdim", "attention_head_size", "swa_v_head_dim"),
            *("state_size", "ssm_state_size", "mamba_d_state", "mamba_dt_rank", "time_step_rank"),
            *("d_rel", "loop_gate_rank", "gated_norm_rank", "rotary_dim", "num_buckets"),
            *("mamba_chunk_size", "chunk_size", "block_multiple_of", "index_topk"),
            *("index_block_size", "sliding_window", "attention_window_size", "local_attention"),
            *("sliding_window_size", "attention_chunk_size", "window_size", "rel_extent"),
        ),
        8,
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
            *("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"),
            *("num_decoder_attention_heads", "num_encoder_attention_heads"),
            *("linear_num_heads", "linear_num_value_heads", "num_local_experts", "num_experts"),
            *("n_routed_experts", "moe_num_experts", "qk_rope_head_dim", "num_query_groups"),
        ),
        4,
    ),
    **dict.fromkeys(
        (
            *("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"),
            *("linear_num_key_heads", "n_groups", "mamba_n_groups", "n_mamba_heads", "hc_mult"),
            *("hc_count", "n_group", "num_expert_group", "num_experts_per_tok", "moe_top_k"),
            *("num_experts_per_token", "moe_k", "moe_topk", "encoder_layers", "depth", "o_groups"),
            *("num_encoder_layers", "zero_expert_num", "num_codebooks", "conf_num_hidden_layers"),
        ),
        2,
    ),
    **dict.fromkeys(("topk_group", "num_nextn_predict_layers", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_dense_layers", "num_kv_shared_layers", "num_global_layers"), 1),
    **dict.fromkeys(
        (
            *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
            *("max_target_positions", "max_source_positions", "model_max_length"),
        ),
        POSITIONS,
    ),
    "qk_head_dim": 12,
    # Of few heads the scores of many keys are all 0, and which are the highest is chance.
    "index_n_heads": 16,
}
LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"),
    *("num_decoder_layers",),
)
HEADS = {
    "num_key_value_heads": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
    "num_kv_heads": "num_attention_heads",
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
QSA = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
    **{"indexer_compress_ratio": 2, "output_gate_type": "silu"},
}
DOTS3 = {
    **{"head_dim": 12, "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    **{"swa_qk_rope_head_dim": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
    # All keys: of two that score 0, as half do, it is chance which one is kept.
    "index_topk": 64,
}
# By model type, fields that the rules above leave wrong.
OVERRIDES: dict[str, dict] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {
        **{"num_hidden_layers": 2, "num_key_value_heads": 2, "num_attention_heads": 4},
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_theta": 10000.0, "rope_type": "default"}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dory": {
        **{"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2},
        **{"n_output_layers": 1, "layer_types": ["sliding_attention", "full_attention"] * 2},
    },
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": DOTS3,
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "num_kv_shared_layers": 2,
    },
    "granitemoehybrid": MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"initializer_range": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_hidden_layers": 4, "expert_ffn_hidden_size": 16},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 13, "shape_vocab_size": 13},
    "xmod": {"default_language": "en_XX"},
    # Half of the width must be a multiple of 64.
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "zamba": {
        **{"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1},
        **{"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
        **{"attention_hidden_size": 64, "attention_head_dim": 16},
    },
    "zamba2": {
        **{"n_mamba_heads": 8, "attention_hidden_size": 64, "attention_head_dim": 16},
        **{"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    },
}


# Why a class of the mapping cannot be built, or not by itself.
DRAFTS = "drafts for another model, whose keys and values it needs"
DECODER = "transformers' mapping names a class that does not take this configuration"
NOT_BUILT = {
    "emu3": "saved alone, its text part is of a type that the mapping lacks",
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": DRAFTS,
    "gemma4_unified_assistant": DRAFTS,
    "mllama": "saved alone, its text part is of a type that the mapping lacks",
    "musicgen": DECODER,
    "musicgen_melody": DECODER,
}


def tiny_config(kind: type[PreTrainedConfig], vocab_size: int, **overrides) -> PreTrainedConfig:
    default = kind()
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    values = {}
    layers = next((name for name in LAYERS if isinstance(fields.get(name), int)), None)
    kept = _layers_to_keep(fields, fields[layers]) if layers else []
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            more = overrides.pop(name, {})
            values[name] = tiny_config(type(value), vocab_size, **more)
        elif name == layers:
            values[name] = len(kept)
        elif isinstance(value, list | tuple) and layers and len(value) == fields[layers]:
            is_index = list(value) == list(range(len(value)))
            values[name] = [i if is_index else value[old] for i, old in enumerate(kept)]
        elif name == "head_dim" and value is not None and value == fields.get("qk_rope_head_dim"):
            values[name] = min(value, SIZES["qk_rope_head_dim"])
        elif name in HEADS and value in (1, fields.get(HEADS[name])):
            values[name] = min(value, SIZES[HEADS[name]])
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            values[name] = min(value, SIZES[name])
        elif name.endswith("vocab_size") or name == "vocab_size_per_layer_input":
            values[name] = vocab_size
        elif name == "rope_parameters" and "original_max_position_embeddings" in (value or {}):
            half = SIZES["max_position_embeddings"] // 2
            values[name] = value | {"original_max_position_embeddings": half}
        elif name in SPECIAL:
            values[name] = SPECIAL[name]
        elif name in ("initializer_range", "init_std"):
            values[name] = 0.2
    return kind(**values | overrides)


def _layers_to_keep(fields: dict, count: int) -> list[int]:
    """The first layer of each kind by the lists that have an entry a layer; two layers at least."""
    lists = [
        x
        for x in fields.values()
        if isinstance(x, list | tuple) and len(x) == count and list(x) != list(range(count))
    ]
    seen = {}
    for index, of_layer in enumerate(zip(*lists, strict=True)):
        seen.setdefault(str(of_layer), index)
    kept = sorted(seen.values())
    return kept if len(kept) > 1 else list(range(min(2, count)))


def model_types() -> list[str]:
    """Those of the classes that can be built."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_BUILT]


def make_model(model_type: str, vocab_size: int) -> PreTrainedModel:
    kind = CONFIG_MAPPING[model_type]
    config = tiny_config(kind, vocab_size, **OVERRIDES.get(model_type, {}))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
