"""The built-in world: short movie reviews, their true quality, and people who rank them.

A review is an opening without sentiment, which serves as the prompt, and two or three sentences of
praise and blame. `gold_score` is the quality that the labellers perceive with noise; evaluations
read it too, and no model learns from it.
"""

import math
import random
import re
from collections.abc import Sequence
from functools import cache

from rlhf.demo import lexicon

# Low: labellers seldom disagree except on answers of nearly the same quality.
LABELLER_TEMPERATURE = 0.03
OPINIONS_FOR_FULL_WEIGHT = 3


def _with_article(words: Sequence[str]) -> list[str]:
    return [f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in words]


# Alternatives of each symbol; <symbol> inside an alternative is expanded in turn.
GRAMMAR: dict[str, Sequence[str]] = {
    "opening": (
        "I saw this <genre> in <place> <occasion>.",
        "We watched this <genre> <occasion>.",
        "This <genre> by <name> follows a <role> who <goal>.",
        "In this <genre>, a <role> <goal>.",
        "<name> directed this <genre> in <place>.",
        "<name> plays a <role> who <goal>.",
        "The <film> tells of a <role> and a <role> in <place>.",
    ),
    "clause": (
        "the <singular> is <predicate>",
        "the <plural> are <predicate>",
        "the <singular> <verb>",
        "the <plural> <plural_verb>",
        "the <singular> <verb> <circumstance>",
        "the <plural> <plural_verb> <circumstance>",
        "both the <singular> and the <plural> are <predicate>",
        "I found the <aspect> <judgement>",
        "I <attitude> the <aspect>",
        "I was <feeling> <circumstance>",
        "the <aspect> left me <feeling>",
        "the <film> is <a_noun>",
        "the <singular> is <a_noun>",
        "the <film> is <adverb> <task>",
        "it has <an_adjective> <part>",
        "it has <adjective> <plural>",
        "<name> gives <an_adjective> performance as the <role>",
        "there is nothing <adjective> about the <aspect>",
        "the <singular> is neither <adjective> nor <adjective>",
        "<verdict>",
    ),
    "judgement": ("<adjective>", "<degree> <adjective>", "<adjective> and <adjective>"),
    "predicate": (
        "<judgement>",
        "<judgement>",
        "<adjective> <circumstance>",
        "not <adjective>",
        "hardly <adjective>",
        "never <adjective>",
    ),
    "lead_in": ("", "", "", "Still, ", "Even so, ", "In the end, ", "To be fair, ", "For me, "),
    "aspect": ("<singular>", "<plural>"),
    "adjective": tuple(lexicon.ADJECTIVES),
    "an_adjective": _with_article(tuple(lexicon.ADJECTIVES)),
    "a_noun": _with_article(tuple(lexicon.NOUNS)),
    "feeling": tuple(lexicon.FEELINGS),
    "adverb": tuple(lexicon.ADVERBS),
    "verb": tuple(lexicon.VERBS),
    "plural_verb": tuple(map(lexicon.plural_verb, lexicon.VERBS)),
    "attitude": tuple(lexicon.ATTITUDES),
    "verdict": tuple(lexicon.VERDICTS),
    "degree": tuple(lexicon.DEGREES),
    "genre": lexicon.GENRES,
    "name": lexicon.NAMES,
    "place": lexicon.PLACES,
    "role": lexicon.ROLES,
    "goal": lexicon.GOALS,
    "occasion": lexicon.OCCASIONS,
    "singular": lexicon.SINGULAR,
    "plural": lexicon.PLURAL,
    "part": lexicon.PARTS,
    "film": lexicon.FILMS,
    "circumstance": lexicon.CIRCUMSTANCES,
    "task": lexicon.TASKS,
}
# How clauses make a sentence, and whether the second clause agrees with the first (1) or not (-1).
SENTENCES = (
    ("<lead_in><clause>.", 1),
    ("<lead_in><clause>.", 1),
    ("<lead_in><clause>, and <clause>.", 1),
    ("<lead_in><clause>, but <clause>.", -1),
    ("Although <clause>, <clause>.", -1),
)

_SYMBOL = re.compile(r"<(\w+)>")
_SENTENCE = re.compile(r"[^.!?]+[.!?]*")
_SENTIMENT = (
    lexicon.ADJECTIVES
    | lexicon.NOUNS
    | lexicon.FEELINGS
    | lexicon.ADVERBS
    | lexicon.VERBS
    | {lexicon.plural_verb(verb): value for verb, value in lexicon.VERBS.items()}
    | lexicon.ATTITUDES
    | {verdict.lower(): value for verdict, value in lexicon.VERDICTS.items()}
)
# The longest expression first, so that "bored to tears" is not read as "bored".
_OPINION = re.compile(rf"\b(?:{'|'.join(sorted(_SENTIMENT, key=len, reverse=True))})\b")


def _expand(template: str, rng: random.Random) -> str:
    return _SYMBOL.sub(lambda found: _expand(rng.choice(GRAMMAR[found[1]]), rng), template)


def _pattern(template: str) -> str:
    """The regular expression of everything `_expand` can make of the template."""
    parts = _SYMBOL.split(template)  # text and symbols take turns
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = (f"(?:{'|'.join(map(_pattern, GRAMMAR[symbol]))})" for symbol in parts[1::2])
    return "".join(parts)


@cache
def _any_sentence() -> re.Pattern[str]:
    templates = dict.fromkeys(("<opening>", *(template for template, _ in SENTENCES)))
    return re.compile("|".join(map(_pattern, templates)))


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def is_grammatical(sentence: str) -> bool:
    """Tells whether the world's grammar can write this sentence."""
    lowered = sentence[:1].lower() + sentence[1:]
    return any(
        _any_sentence().fullmatch(form) and _capitalised(form) == sentence
        for form in (sentence, lowered)
    )


def opinions(sentence: str) -> list[tuple[str, float]]:
    """The sentence's opinions in order: (expression, sentiment in [-1, 1]).

    A degree just before the expression scales its sentiment (`lexicon.DEGREES`); a negator within
    the two words before turns it round and halves it: "not superb" is worth -0.5.
    """
    found = []
    sentence = sentence.lower()
    for match in _OPINION.finditer(sentence):
        before = re.findall(r"\w+", sentence[: match.start()].rpartition(",")[2])[-2:]
        value = _SENTIMENT[match[0]]
        if before:
            value *= lexicon.DEGREES.get(before[-1], 1.0)
        if any(word in lexicon.NEGATORS for word in before):
            value *= -0.5
        found.append((match[0], max(-1.0, min(1.0, value))))
    return found


def gold_score(text: str) -> float:
    """How good a review says the film is, and how well it says it, in [-1, 1].

    score = mean sentiment of the different opinions · min(1, their number / 3)
            − half the share of flawed sentences,   clipped to [-1, 1]

    A sentence is flawed when the grammar cannot write it (broken words, no full stop, wrong
    agreement) or when it repeats an opinion word or a whole sentence of the same text. Praise
    without grammar costs half a point, and one word of praise said over and over, which counts as
    one opinion in flawed sentences, ends below 0.
    """
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(text)]
    values: dict[str, float] = {}
    seen: set[str] = set()
    flawed = 0
    for sentence in sentences:
        found = dict(opinions(sentence))
        repeated = sentence in seen or len(found) < len(opinions(sentence))
        flawed += repeated or not found.keys().isdisjoint(values) or not is_grammatical(sentence)
        values = found | values
        seen.add(sentence)
    if not sentences:
        return 0.0
    weight = min(1.0, len(values) / OPINIONS_FOR_FULL_WEIGHT)
    sentiment = math.fsum(values.values()) / max(len(values), 1)
    return max(-1.0, min(1.0, weight * sentiment - 0.5 * flawed / len(sentences)))


def gold(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The gold score of each prompt with its completion: the reward function
    `rlhf.demo.reviews:gold`."""
    return [gold_score(p + c) for p, c in zip(prompts, completions, strict=True)]


def _clause(rng: random.Random, sign: int) -> str:
    while True:
        clause = _expand("<clause>", rng)
        if all(value * sign > 0 for _, value in opinions(clause)):
            return clause


def write_sentence(rng: random.Random, leaning: float) -> str:
    """A sentence whose (first) clause praises with probability `leaning`."""
    template, agreement = rng.choice(SENTENCES)
    sign = 1 if rng.random() < leaning else -1
    first, *more = template.split("<clause>")
    sentence = _expand(first, rng) + _clause(rng, sign) + more[0]
    for rest in more[1:]:
        sentence += _clause(rng, sign * agreement) + rest
    return _capitalised(sentence)


def write_opening(rng: random.Random) -> str:
    return _expand("<opening>", rng)


def write_body(rng: random.Random) -> str:
    """What follows the opening: two or three sentences by a reviewer of random leaning, who uses
    no opinion word twice."""
    leaning = rng.betavariate(0.7, 0.7)
    sentences: list[str] = []
    length = rng.randint(2, 3)
    used: set[str] = set()
    while len(sentences) < length:
        sentence = write_sentence(rng, leaning)
        words = [word for word, _ in opinions(sentence)]
        if used.isdisjoint(words) and len(set(words)) == len(words):
            sentences.append(sentence)
            used.update(words)
    return " " + " ".join(sentences)


def rank(texts: Sequence[str], rng: random.Random) -> list[int]:
    """One labeller's order of the texts, best first.

    Plackett-Luce: of those left, text i comes next with probability proportional to
    exp(gold_score(i) / LABELLER_TEMPERATURE), so that of two texts i is preferred to j with the
    Bradley-Terry probability σ((gold_i − gold_j) / LABELLER_TEMPERATURE). Adding Gumbel noise to
    the scaled scores and sorting draws exactly that.
    """
    noisy = [
        gold_score(text) / LABELLER_TEMPERATURE - math.log(rng.expovariate(1.0)) for text in texts
    ]
    return sorted(range(len(texts)), key=noisy.__getitem__, reverse=True)
