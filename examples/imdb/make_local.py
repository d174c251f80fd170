"""Stand-ins for what the examples here fetch from the hub, made of a file of labelled texts.

`python examples/imdb/make_local.py DATA FOLDER` reads DATA, with columns `text` and `label`
("positive" or "negative"), and leaves in FOLDER what the hub has as lvwerra/gpt2-imdb (`gpt2`, a
small GPT-2 tuned on the texts, and as it was before, `gpt2-untrained`), lvwerra/distilbert-imdb
(`distilbert`, a classifier of their sentiment) and stanfordnlp/imdb (`imdb`, the data as `datasets`
saves it).
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
)

from rlhf.config.training import SFTConfig
from rlhf.data.padding import pad
from rlhf.demo.base import MAX_LENGTH, train_tokenizer
from rlhf.demo.labelled import Example, read_examples
from rlhf.errors import UserError
from rlhf.models.passes import default_device
from rlhf.run.state import save_model
from rlhf.sft import train_sft

BATCH_SIZE = 32
FOLDERS = ("gpt2-untrained", "gpt2", "distilbert", "imdb")
REMEDY = "free some space or choose another folder"


def make_local(
    examples: list[Example],
    folder: Path,
    *,
    hidden_size: int = 128,
    vocab_size: int = 2000,
    num_epochs: int = 3,
    learning_rate: float = 1e-3,
) -> float:
    """Makes the four folders, the policy at `learning_rate`; returns the classifier's accuracy on
    a tenth of the texts that it has not seen."""
    for name in FOLDERS:
        if (folder / name).exists():
            raise UserError(f"{folder / name} is there already: remove it or choose another folder")
    torch.manual_seed(0)
    tokenizer = train_tokenizer((example.text for example in examples), vocab_size)
    special = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    heads = hidden_size // 32
    gpt2 = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=MAX_LENGTH,
        n_embd=hidden_size,
        n_layer=2,
        n_head=heads,
        **special,
    )
    save_model(folder / "gpt2-untrained", GPT2LMHeadModel(gpt2), tokenizer, remedy=REMEDY)
    _save_data(examples, folder / "imdb")
    train_sft(
        SFTConfig(
            model_name_or_path=folder / "gpt2-untrained",
            dataset_name=folder / "imdb",
            output_dir=folder / "gpt2",
            per_device_train_batch_size=BATCH_SIZE,
            num_train_epochs=num_epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            save_steps=0,
            report_to="none",
        )
    )
    distilbert = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        dim=hidden_size,
        hidden_dim=4 * hidden_size,
        n_layers=2,
        n_heads=heads,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    classifier = DistilBertForSequenceClassification(distilbert).to(default_device())
    count = len(examples) // 10
    _train_classifier(classifier, tokenizer, examples[count:], num_epochs)
    save_model(folder / "distilbert", classifier, tokenizer, remedy=REMEDY)
    return _accuracy(classifier, tokenizer, examples[:count])


def _save_data(examples: list[Example], path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = {
        "text": [example.text for example in examples],
        "label": [int(example.positive) for example in examples],
    }
    DatasetDict({"train": Dataset.from_dict(rows, features)}).save_to_disk(path)


def _logits(
    model: DistilBertForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits (B, 2) of the texts, and their labels (B,)."""
    rows = tokenizer([x.text for x in examples], truncation=True, max_length=MAX_LENGTH).input_ids
    ids, mask = (x.to(model.device) for x in pad(rows, tokenizer.pad_token_id))
    labels = torch.tensor([int(example.positive) for example in examples], device=model.device)
    return model(input_ids=ids, attention_mask=mask.long()).logits, labels


def _train_classifier(
    model: DistilBertForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    num_epochs: int,
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(examples)).split(BATCH_SIZE):
            batch = [examples[row] for row in rows.tolist()]
            nn.functional.cross_entropy(*_logits(model, tokenizer, batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def _accuracy(
    model: DistilBertForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
) -> float:
    logits, labels = _logits(model, tokenizer, examples)
    return (logits.argmax(1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="file of labelled texts")
    parser.add_argument("folder", type=Path, help="where to put the four folders")
    arguments = parser.parse_args(argv)
    accuracy = make_local(read_examples(arguments.data), arguments.folder)
    print(f"{arguments.folder}: the classifier is right on {accuracy:.1%} of texts it has not seen")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
