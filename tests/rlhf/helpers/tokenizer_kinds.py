"""Tokenizers of every kind that policies have, trained on a few lines."""

import json

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPECIAL = [UNK, BOS, EOS]
LINES = [
    "the film was good . it isn't bad, it's \"fine\" !",
    "the plot was weak ?\n\nthe end",
    "film films filming 0 1 yes no",
    "[INST] the film [/INST] was ok",
]


def _finish(tokenizer: Tokenizer, bos: bool, eos: bool, **options) -> PreTrainedTokenizerFast:
    single = [BOS] * bos + ["$A"] + [EOS] * eos
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, SPECIAL.index(token)) for token in (BOS, EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        **options,
    )


def _train(tokenizer: Tokenizer, kind: type, size: int, **options) -> None:
    trainer = kind(vocab_size=size, show_progress=False, **options)
    tokenizer.train_from_iterator(LINES * 4, trainer)


def byte_level(bos=False, eos=False, prefix_space=False, **options) -> PreTrainedTokenizerFast:
    """As GPT-2 and Qwen have it; with BOS as Llama 3; with a space in front as RoBERTa."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(
        *(tokenizer, trainers.BpeTrainer, 320), special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    return _finish(tokenizer, bos, eos, **options)


def sentencepiece(scheme="always", bos=True, eos=False, legacy=False) -> PreTrainedTokenizerFast:
    """Metaspace with bytes for what is unknown: Llama 2 and Mistral (always, first), Gemma (never);
    `legacy` as older conversions have it, by a normalizer."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(tokenizer, trainers.BpeTrainer, 360, special_tokens=SPECIAL + single_bytes)
    state = json.loads(tokenizer.to_str())
    # The bytes are ordinary tokens, of which no text is cut out.
    state["added_tokens"] = [x for x in state["added_tokens"] if x["content"] in SPECIAL]
    if legacy:
        state["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    return _finish(tokenizer, bos, eos)


def wordpiece(**options) -> PreTrainedTokenizerFast:
    """As BERT has it, in small letters; what it decodes has other spaces than what it encoded."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    _train(tokenizer, trainers.WordPieceTrainer, 120, special_tokens=SPECIAL)
    return _finish(tokenizer, True, True, **options)


def unigram() -> PreTrainedTokenizerFast:
    """As T5 has it: without BOS, and with EOS after all that it encodes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    _train(tokenizer, trainers.UnigramTrainer, 90, special_tokens=SPECIAL, unk_token=UNK)
    return _finish(tokenizer, False, True)


KINDS = {
    "gpt2": byte_level,
    "gpt2, cleanup": lambda: byte_level(clean_up_tokenization_spaces=True),
    "llama3": lambda: byte_level(bos=True),
    "roberta": lambda: byte_level(prefix_space=True),
    "bos and eos": lambda: byte_level(bos=True, eos=True),
    "always": sentencepiece,
    "first": lambda: sentencepiece("first"),
    "never": lambda: sentencepiece("never"),
    "no bos": lambda: sentencepiece(bos=False),
    "added eos": lambda: sentencepiece(eos=True),
    "legacy": lambda: sentencepiece(legacy=True),
    "wordpiece": wordpiece,
    "wordpiece, cleanup": lambda: wordpiece(clean_up_tokenization_spaces=True),
    "unigram": unigram,
}
LOSSY = ("wordpiece", "wordpiece, cleanup")
