"""`rlhf evaluate`: two policies on the same prompts, compared by judges.

Both policies answer with the same random numbers, so that equal policies give equal answers. Each
judge scores all answers, and its verdict on a prompt is whether B's score is above A's.
"""

import json
from dataclasses import asdict
from math import isnan
from pathlib import Path
from statistics import correlation, fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf.config.inference import EvaluateConfig
from rlhf.errors import UserError
from rlhf.inference.intervals import CONFIDENCE, mean_interval, win_rate_interval
from rlhf.inference.policy import (
    Policy,
    check_output,
    exact_kl,
    read_prompts,
    text_prompts,
    write_output,
)
from rlhf.rewards.loading import check_rewards, for_tokenizer, make_rewards
from rlhf.rewards.scoring import Samples, score_apart, to_jsonl
from rlhf.run.files import disk_errors
from rlhf.run.progress import Display, is_live
from rlhf.run.terminal import printable, say

SIDES = ("a", "b")
NOTE = (
    f"with {100 * CONFIDENCE:g} % confidence intervals; with length: correlation of B - A in score "
    "and in length"
)


def run(config: EvaluateConfig) -> dict:
    """Writes all figures to `config.output_file`, and prompts, answers and scores beside it, as
    .jsonl; prints a table and returns the figures.

    Answers are written as soon as they are there, and again after each judge: should one fail, what
    came before it is not lost.
    """
    path = Path(config.output_file)
    pairs_path = path.with_suffix(".jsonl")
    for file in (path, pairs_path):
        check_output(file, config)
    policies = [Policy(name, config) for name in config.policies]
    first, second = (read_prompts(config, policy.tokenizer) for policy in policies)
    if first.prompts != second.prompts:  # beginnings of texts, cut at the tokens of each policy
        own = text_prompts(config, first.prompts, policies[1].tokenizer)
        second = own._replace(columns=first.columns)
    weights = [1.0] * len(config.reward_funcs)  # each is a judge by itself
    judges = make_rewards(config.reward_funcs, weights, policies[0].tokenizer, config)
    judges = [judges, for_tokenizer(judges, policies[1].tokenizer)]
    for policy, prompts, own in zip(policies, (first, second), judges, strict=True):
        check_rewards(own, prompts, policy.check(prompts))

    total = policies[0].num_passes(first) + policies[1].num_passes(second)
    with Display("evaluate", total) as display:
        samples = [
            policy.answer(prompts, display.advance)
            for policy, prompts in zip(policies, (first, second), strict=True)
        ]
    answers = [[answer | {"scores": {}} for answer in part.answers()] for part in samples]
    pairs = [
        {"prompt": prompt, "a": a, "b": b}
        for prompt, a, b in zip(first.prompts, *answers, strict=True)
    ]
    with disk_errors(f"write output_file {path}", "choose another one"):
        path.unlink(missing_ok=True)  # the figures of other answers
    write_output(pairs_path, to_jsonl(pairs))
    say(f"answers: {pairs_path}")
    scores = {}
    for both in zip(*judges, strict=True):
        name = both[0].name
        scores[name] = [
            score_apart(judge, part).tolist() for judge, part in zip(both, samples, strict=True)
        ]
        for side, values in zip(answers, scores[name], strict=True):
            for answer, value in zip(side, values, strict=True):
                answer["scores"][name] = value
        write_output(pairs_path, to_jsonl(pairs))
    figures = {
        "policies": dict(zip(SIDES, config.policies, strict=True)),
        "prompts": len(first.prompts),
        "confidence": CONFIDENCE,
        "judges": {name: judge_figures(name, *samples, *values) for name, values in scores.items()},
        "answers": {side: answer_figures(part) for side, part in zip(SIDES, samples, strict=True)},
        "kl_b_a": exact_kl(policies[1], policies[0], samples[1].responses),
        "config": asdict(config),
    }
    text = json.dumps(figures, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    write_output(path, text.encode("utf-8", "backslashreplace"))
    show(figures)
    say(f"figures: {path}")
    return figures


def judge_figures(
    name: str, a: Samples, b: Samples, scores_a: list[float], scores_b: list[float]
) -> dict[str, object]:
    """What a judge's scores, NaN where it says nothing, say of B against A.

    Pairs of which it does not score both answers are left out, and equal answers are a tie: their
    scores may differ in rounding, which depends on what else is in a batch. `length_correlation`
    is Pearson's, between what B's answer has more of, in characters, and how much higher it scores:
    a judge that likes length, or a policy that has learnt so, shows in it.
    """
    rows = [
        row
        for row, pair in enumerate(zip(scores_a, scores_b, strict=True))
        if not any(map(isnan, pair))
    ]
    if not rows:
        raise UserError(
            f"judge {name} scored no pair of answers, it returned None for one of each: give "
            "another in reward_funcs, or other prompts"
        )
    kept_a, kept_b = [scores_a[row] for row in rows], [scores_b[row] for row in rows]
    same_end = (a.responses.ended == b.responses.ended).tolist()
    differences = [
        0.0
        if a.completions[row] == b.completions[row] and same_end[row]
        else scores_b[row] - scores_a[row]
        for row in rows
    ]
    longer = [len(b.completions[row]) - len(a.completions[row]) for row in rows]
    results = [(1 + (d > 0) - (d < 0)) / 2 for d in differences]
    varied = len(set(longer)) > 1 and len(set(differences)) > 1
    return {
        "pairs": len(rows),
        "left_out": len(scores_a) - len(rows),
        "mean_a": fmean(kept_a),
        "mean_a_interval": mean_interval(kept_a),
        "mean_b": fmean(kept_b),
        "mean_b_interval": mean_interval(kept_b),
        "difference": fmean(differences),
        "difference_interval": mean_interval(differences),
        "win_rate": fmean(results),
        "win_rate_interval": win_rate_interval(results),
        "wins": results.count(1),
        "ties": results.count(0.5),
        "losses": results.count(0),
        "length_correlation": correlation(longer, differences) if varied else None,
    }


def answer_figures(samples: Samples) -> dict[str, float]:
    """Mean lengths of a policy's answers, and the share of them that ended by themselves."""
    return {
        "tokens": samples.responses.mask.sum(1).float().mean().item(),
        "characters": fmean(map(len, samples.completions)),
        "ended": samples.responses.ended.float().mean().item(),
    }


def show(figures: dict) -> None:
    """Prints a table on a terminal, elsewhere a line for each judge."""
    console = Console(highlight=False)
    rows = {name: _summary(judge) for name, judge in figures["judges"].items()}
    if is_live(console):
        table = Table("judge", *(escape(printable(name)) for name in rows), caption=NOTE)
        for key in next(iter(rows.values())):
            table.add_row(key, *(row[key] for row in rows.values()))
        console.print(table)
    else:
        for name, row in rows.items():
            say("  ".join([f"judge {name}", *(f"{key} {cell}" for key, cell in row.items())]))
    for side in SIDES:
        answers = figures["answers"][side]
        say(
            f"{side.upper()} {figures['policies'][side]}: {answers['tokens']:.1f} tokens, "
            f"{answers['characters']:.1f} characters, {answers['ended']:.0%} ended"
        )
    if figures["kl_b_a"] is not None:
        say(f"KL(B || A) {figures['kl_b_a']:.2f} nats per answer")


def _summary(judge: dict) -> dict[str, str]:
    cells = {}
    for key, name in (("mean_a", "A"), ("mean_b", "B"), ("difference", "B - A")):
        interval = judge[f"{key}_interval"]
        margin = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.3f}"
        cells[name] = f"{judge[key]:.3f}{margin}"
    low, high = judge["win_rate_interval"]
    cells["B wins"] = f"{judge['win_rate']:.3f} [{low:.3f}, {high:.3f}]"
    length = judge["length_correlation"]
    cells["with length"] = "-" if length is None else f"{length:+.2f}"
    return cells | {name: str(judge[name]) for name in ("pairs", "ties", "left_out")}
