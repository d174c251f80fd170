"""The configuration of a Llama with the words of the world."""

from transformers import LlamaConfig

from tests.rlhf.helpers.world import WORDS

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2} | IDS
HEADS = {"num_attention_heads": 2, "intermediate_size": 32}


def llama_config(**changes) -> LlamaConfig:
    return LlamaConfig(**SIZES | HEADS | changes)
