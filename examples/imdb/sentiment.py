"""Sentiment classifiers as reward functions: `examples/imdb/sentiment.py:MODEL`, where MODEL is the
folder or hub id of a classifier with a label POSITIVE, such as lvwerra/distilbert-imdb.

The score of a completion is the classifier's raw score (its logit) of that label for the prompt
with the completion.
"""

from collections.abc import Callable
from pathlib import Path

import transformers

from rlhf.data.hub import may_be_hub_id
from rlhf.errors import UserError, one_line
from rlhf.models.passes import default_device

LABEL = "POSITIVE"


def __getattr__(model: str) -> Callable[[list[str], list[str]], list[float]]:
    """The reward function of the model, which takes the place of a name in this module.

    What looks like a name, as Python's own tools and typing errors ask for, is no model's, unless
    there is such a folder: nothing is looked up on the hub for it.
    """
    if model.startswith("_") or (model.isidentifier() and not Path(model).is_dir()):
        raise AttributeError(f"module {__name__} has no attribute {model!r}")
    score = positive_scorer(model)

    def sentiment(prompts: list[str], completions: list[str]) -> list[float]:
        return score([prompt + text for prompt, text in zip(prompts, completions, strict=True)])

    return sentiment


def positive_scorer(model: str) -> Callable[[list[str]], list[float]]:
    """What gives the raw scores of texts for the label POSITIVE. Raises UserError for a model that
    cannot be opened or has no such label."""
    if not Path(model).is_dir() and not may_be_hub_id(model):
        raise UserError(f"there is no folder {model!r}: give that of a classifier, or a hub id")
    try:
        classify = transformers.pipeline("sentiment-analysis", model=model, device=default_device())
    except Exception as error:  # a damaged folder raises whatever its reader raises
        raise UserError(f"cannot open the classifier {model!r}: {one_line(error)}") from error
    labels = list(classify.model.config.id2label.values())
    if LABEL not in labels:
        raise UserError(f"the classifier {model!r} must have a label {LABEL}, it has {labels}")

    def score(texts: list[str]) -> list[float]:
        outputs = classify(
            texts, top_k=None, function_to_apply="none", truncation=True, batch_size=64
        )
        return [
            next(label["score"] for label in output if label["label"] == LABEL)
            for output in outputs
        ]

    return score
