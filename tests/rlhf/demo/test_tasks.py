"""The built-in world, its gold score and labellers, and the world of labelled text."""

import math
import random
import re

import pytest
import torch

from rlhf.demo import labelled, reviews
from rlhf.demo.base import BOS, EOS, train_tokenizer
from rlhf.demo.judge import Judge
from rlhf.demo.labelled import Example
from rlhf.demo.lexicon import plural_verb
from rlhf.errors import UserError
from rlhf.rewards.functions import load_function
from tests.rlhf.helpers.demo import examples, write


def write_review(rng: random.Random) -> str:
    return reviews.write_opening(rng) + reviews.write_body(rng)


@pytest.fixture(scope="module")
def written() -> list[str]:
    rng = random.Random(0)
    return [write_review(rng) for _ in range(1000)]


# --- the reviews ------------------------------------------------------------------------------


def test_reviews_depend_on_the_seed_alone():
    first, again, other = (write_review(random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_reviews_are_varied_mixed_and_without_flaw(written):
    words = {word for text in written for word in re.findall(r"[\w'-]+", text.lower())}
    assert len(words) > 350
    assert len(set(written)) == len(written)
    mixed = 0
    for text in written:
        sentences = [s.strip() for s in re.findall(r"[^.]+\.", text)]
        assert all(reviews.is_grammatical(sentence) for sentence in sentences), text
        found = [pair for sentence in sentences for pair in reviews.opinions(sentence)]
        assert len({word for word, _ in found}) == len(found), text
        mixed += min(value for _, value in found) < 0 < max(value for _, value in found)
    assert mixed > 500
    scores = [reviews.gold_score(text) for text in written]
    assert abs(sum(scores) / len(scores)) < 0.1
    assert min(scores) < -0.7 and max(scores) > 0.7


def test_opening_carries_no_sentiment():
    rng = random.Random(3)
    assert all(reviews.opinions(reviews.write_opening(rng)) == [] for _ in range(300))


@pytest.mark.parametrize(
    ("sentence", "grammatical"),
    [
        ("The plot is superb.", True),
        ("Although I loved the songs, the pace drags.", True),
        ("In the end, it has an awful script.", True),
        ("The plot are superb.", False),
        ("The songs drags.", False),
        ("It has a awful script.", False),
        ("the plot is superb.", False),
        ("The plot is superb", False),
        ("Superb superb superb.", False),
        ("", False),
    ],
)
def test_grammar_knows_agreement_articles_and_punctuation(sentence, grammatical):
    assert reviews.is_grammatical(sentence) == grammatical


def test_plural_of_verb_phrases():
    assert plural_verb("misses the mark") == "miss the mark"
    assert plural_verb("drags") == "drag"
    assert plural_verb("takes your breath away") == "take your breath away"


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The plot is superb.", [("superb", 1.0)]),
        ("The plot is slightly dull.", [("dull", -0.25)]),
        ("The plot is utterly dull.", [("dull", -0.75)]),
        ("The plot is utterly awful.", [("awful", -1.0)]),
        ("The plot is not superb.", [("superb", -0.5)]),
        ("There is nothing dull about the plot.", [("dull", 0.25)]),
        ("The plot is neither superb nor awful.", [("superb", -0.5), ("awful", 0.5)]),
        ("The songs are not bad, but the pace drags.", [("bad", 0.25), ("drags", -0.5)]),
        ("I was bored to tears at times.", [("bored to tears", -1.0)]),
        ("It is worth the ticket.", [("it is worth the ticket", 0.5)]),
        ("The music is recorded in Oslo.", []),
    ],
)
def test_opinions_by_hand(sentence, expected):
    assert reviews.opinions(sentence) == expected


@pytest.mark.parametrize(
    ("text", "score"),
    [
        # Three opinions count in full: (1 + 0.5 - 0.5) / 3.
        ("The plot is superb and charming, but the pace drags.", 1 / 3),
        # One opinion counts for a third.
        ("The plot is superb.", 1 / 3),
        # The same opinion again adds nothing and makes its sentence flawed: 1/3 - 0.5 * 1/2.
        ("The plot is superb. The music is superb.", 1 / 3 - 0.25),
        # A neutral sentence said twice is a flaw too: 0 - 0.5 * 1/2.
        ("We watched this drama last week. We watched this drama last week.", -0.25),
        # Words without grammar: one opinion, every sentence flawed.
        ("superb superb superb", 1 / 3 - 0.5),
        ("", 0.0),
    ],
)
def test_gold_score_by_hand(text, score):
    assert reviews.gold_score(text) == pytest.approx(score)


def test_gold_is_a_reward_function_of_prompts_and_completions():
    source = "rlhf.demo.reviews:gold"
    prompts = ["The plot is superb", "We watched this drama last week."]
    completions = [" and charming, but the pace drags.", ""]
    assert load_function(source)(prompts, completions) == pytest.approx([1 / 3, 0.0])


def test_gold_score_cannot_be_won_by_repetition_or_broken_text():
    honest = "The plot is superb. The music is gripping. I loved the songs."
    assert reviews.gold_score(honest) == pytest.approx(1.0)
    for hack in (
        "superb " * 30,
        "The plot is superb. " * 10,
        "superb gripping loved brilliant wonderful",
        "The plot is superb gripping masterful perfect excellent.",
    ):
        assert reviews.gold_score(hack) <= 0.5 < reviews.gold_score(honest)


def test_labellers_follow_bradley_terry_and_plackett_luce(monkeypatch):
    scores = {"a": 0.06, "b": 0.03, "c": 0.0, "d": -0.03}
    monkeypatch.setattr(reviews, "gold_score", scores.__getitem__)
    rng, texts, count = random.Random(0), list(scores), 20_000
    rankings = [reviews.rank(texts, rng) for _ in range(count)]
    weight = [math.exp(score / reviews.LABELLER_TEMPERATURE) for score in scores.values()]
    for i in range(4):
        first = sum(ranking[0] == i for ranking in rankings) / count
        assert first == pytest.approx(weight[i] / sum(weight), abs=0.015)
        for j in range(i):
            before = sum(ranking.index(i) < ranking.index(j) for ranking in rankings) / count
            assert before == pytest.approx(weight[i] / (weight[i] + weight[j]), abs=0.015)


# --- tokenizer --------------------------------------------------------------------------------


def test_tokenizer_keeps_text_and_splits_where_prompts_end(written):
    tokenizer = train_tokenizer(written, 600)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    rng = random.Random(5)
    for _ in range(20):
        opening, rest = reviews.write_opening(rng), reviews.write_body(rng)
        ids = tokenizer(opening + rest).input_ids
        assert ids[0] == tokenizer.convert_tokens_to_ids(BOS)
        assert tokenizer.decode(ids, skip_special_tokens=True) == opening + rest
        answer = tokenizer(rest, add_special_tokens=False).input_ids
        assert tokenizer(opening).input_ids + answer == ids
    assert tokenizer.decode(tokenizer("naïve ☃").input_ids[1:]) == "naïve ☃"


# --- labelled text ----------------------------------------------------------------------------


def rows_of(made: list[Example]) -> list[dict]:
    return [{"text": text, "label": labelled.LABELS[positive]} for text, positive in made]


def test_read_examples_drops_texts_that_occur_twice(tmp_path):
    rows = rows_of(examples(60))
    assert labelled.read_examples(write(tmp_path / "x.jsonl", rows + rows[:10])) == examples(60)


def test_split_is_disjoint_complete_balanced_and_seeded():
    made = examples(400)
    parts = labelled.split(made, random.Random(0))
    assert [len(part) for part in parts] == [200, 160, 40]
    assert sorted(example for part in parts for example in part) == sorted(made)
    assert all(sum(e.positive for e in part) == len(part) // 2 for part in parts)
    assert parts == labelled.split(made, random.Random(0)) != labelled.split(made, random.Random(1))


def test_preference_pairs_put_the_positive_text_first():
    made = examples(40)
    positive = {example.text for example in made if example.positive}
    pairs = labelled.preference_pairs(made, 3, random.Random(0))
    assert len(pairs) == 3 * 20
    assert all(pair["prompt"] == "" for pair in pairs)
    ended = [pair for pair in pairs if pair["chosen"].endswith(EOS)]
    assert 0 < len(ended) < len(pairs)
    assert ended == [pair for pair in pairs if pair["rejected"].endswith(EOS)]
    assert {pair["chosen"].removesuffix(EOS) for pair in pairs} == positive
    rejected = {pair["rejected"].removesuffix(EOS) for pair in pairs}
    assert rejected == {e.text for e in made} - positive


def test_prompts_are_the_first_two_to_eight_tokens():
    made = examples(100)
    tokenizer = train_tokenizer([example.text for example in made], 400)
    drawn = labelled.prompts(made, 300, tokenizer, random.Random(0))
    assert all(any(e.text.startswith(prompt) for e in made) for prompt in drawn)
    lengths = {len(tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in drawn}
    assert lengths == set(range(2, 9))


def test_judge_learns_the_words_that_tell_the_labels_apart():
    made = examples(400)
    judge = Judge(made[:300])
    assert judge.accuracy(made[300:]) > 0.95
    assert judge.positive(["a good thing", "a bad thing", "fine", ""]).tolist()[:3] == [
        True,
        False,
        True,
    ]
    flipped = Judge([Example(text, not positive) for text, positive in made[:300]])
    assert flipped.accuracy(made[300:]) < 0.05


def test_judge_needs_no_global_randomness():
    made = examples(100)
    torch.manual_seed(0)
    first = Judge(made)
    torch.manual_seed(1)
    assert torch.equal(first.weight, Judge(made).weight)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "empty"),
        ('{"text": "a", "label": "positive"}\nnot json', "line 2"),
        ('{"text": "a"}', "label"),
        ('{"label": "positive"}', "text"),
        ('{"text": "a", "label": "neutral"}', "'neutral'"),
        ('{"text": "a", "label": 1}', "row 1"),
        ('{"text": "  ", "label": "positive"}', "text must be"),
        ("[1, 2]", "row 1"),
    ],
)
def test_bad_file_is_a_user_error_of_one_line(tmp_path, content, named):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(named)) as error:
        labelled.read_examples(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_one_label_only_and_too_few_are_user_errors(tmp_path):
    positive = [row for row in rows_of(examples(100)) if row["label"] == "positive"]
    with pytest.raises(UserError, match="0 negative"):
        labelled.read_examples(write(tmp_path / "one.jsonl", positive))
    with pytest.raises(UserError, match="at least 20"):
        labelled.read_examples(write(tmp_path / "few.jsonl", rows_of(examples(30))))


def test_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        labelled.read_examples(tmp_path / "none.jsonl")
