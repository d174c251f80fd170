"""An independent judge of sentiment: logistic regression on the words and word pairs of a text."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.demo.labelled import Example

MIN_TEXTS_PER_FEATURE = 2
L2 = 1.0


def features(text: str) -> set[str]:
    """The words of a text and its pairs of neighbouring words."""
    words = re.findall(r"[a-z0-9'-]+|[!?]", text.lower())
    return {*words, *map(" ".join, pairwise(words))}


class Judge:
    """Says whether a text is positive.

    A linear model over the presence of n-grams, each scaled by its naive-Bayes log-count ratio
    (Wang and Manning, ACL 2012), which on short texts is hard to beat. It shares neither data nor
    architecture nor tokenizer with the reward model.
    """

    def __init__(self, examples: Sequence[Example]):
        found = [features(example.text) for example in examples]
        counts = Counter(feature for row in found for feature in row)
        kept = [feature for feature, count in counts.items() if count >= MIN_TEXTS_PER_FEATURE]
        self.index = {feature: i for i, feature in enumerate(kept)}
        labels = torch.tensor([float(example.positive) for example in examples])
        rows = self._rows(found)

        indices, offsets = rows
        of_row = labels.repeat_interleave(offsets.diff(append=torch.tensor([len(indices)])))
        positive = 1 + torch.bincount(indices, of_row, len(kept))
        negative = 1 + torch.bincount(indices, 1 - of_row, len(kept))
        ratio = (positive / positive.sum()).log() - (negative / negative.sum()).log()
        scale = torch.ones_like(ratio, requires_grad=True)
        self.bias = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [scale, self.bias], max_iter=50, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            self.weight = ratio * scale
            penalty = L2 * (scale - 1).square().sum() / (2 * len(examples))
            value = F.binary_cross_entropy_with_logits(self._logits(rows), labels) + penalty
            value.backward()
            return value

        optimizer.step(loss)
        self.weight = (ratio * scale).detach()

    def _rows(self, found: Sequence[set[str]]) -> tuple[Tensor, Tensor]:
        """The known features of all texts end to end, and where each text's begin."""
        rows = [[self.index[f] for f in sorted(row) if f in self.index] for row in found]
        starts = torch.tensor([0, *map(len, rows)]).cumsum(0)[:-1]
        return torch.tensor([i for row in rows for i in row], dtype=torch.long), starts

    def _logits(self, rows: tuple[Tensor, Tensor]) -> Tensor:
        indices, offsets = rows
        return F.embedding_bag(indices, self.weight[:, None], offsets, mode="sum")[:, 0] + self.bias

    @torch.no_grad()
    def positive(self, texts: Sequence[str]) -> Tensor:
        """Tells whether each text is judged positive, (texts,) bool."""
        return self._logits(self._rows([features(text) for text in texts])) > 0

    def accuracy(self, examples: Sequence[Example]) -> float:
        truth = torch.tensor([example.positive for example in examples])
        return (
            (self.positive([example.text for example in examples]) == truth).float().mean().item()
        )
