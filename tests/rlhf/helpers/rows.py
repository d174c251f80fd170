"""Rows of data, tokenizers that have a character for a token, and what is read of the rows."""

from itertools import islice

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.data.batches import Batches
from rlhf.data.loaders import Text, load_prompts, load_rankings, load_texts
from rlhf.errors import UserError

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzINST[]/?! \n"
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and\nassistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)


def characters(chat_template: str | None, eos: str, adds_bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        additional_special_tokens=list(SPECIAL),
        chat_template=chat_template,
    )


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


UNUSED = {"model_name_or_path": "unused", "dataset_name": "unused", "output_dir": "unused"}


def texts(path: str, tokenizer, **changes) -> list[Text]:
    return load_texts(SFTConfig(**UNUSED | changes), path, "train", tokenizer)


def rankings(path: str, tokenizer, **changes) -> list[list[list[int]]]:
    rows = load_rankings(RewardConfig(**UNUSED | changes), path, "train", tokenizer)
    return [row.answers for row in rows]


def prompts(path: str, tokenizer, **changes):
    config = PPOConfig(**UNUSED | {"reward_funcs": ["unused"]} | changes)
    return load_prompts(config, path, "train", tokenizer)


def fails(load, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def take(batches: Batches, count: int | None = None) -> list[list[list[int]]]:
    """The next `count` batches, or all that are left."""
    taken = []
    for batch in islice(batches, count):
        taken.append(batch)
        batches.advance()
    return taken
