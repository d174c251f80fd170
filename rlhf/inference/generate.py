"""`rlhf generate`: a model's completions of prompts, in a JSONL file."""

from pathlib import Path

from rlhf.config.inference import GenerateConfig
from rlhf.errors import UserError
from rlhf.inference.policy import Policy, check_output, read_prompts, text_prompts, write_output
from rlhf.rewards.scoring import to_jsonl
from rlhf.run.progress import Display
from rlhf.run.terminal import say

NUM_SHOWN = 3
KEYS = ("completion", "tokens", "ended")


def run(config: GenerateConfig) -> list[dict]:
    """Writes a line `prompt`, `completion`, `tokens`, `ended`, and the data's other columns, for
    each completion to `config.output_file`; returns them.

    A prompt's completions stand one after the other. `tokens` counts the one that ended the
    completion, `ended` tells whether there is one; `completion` is without special tokens.
    """
    path = Path(config.output_file)
    check_output(path, config)
    policy = Policy(config.model_name_or_path, config)
    if config.prompt:
        prompts = text_prompts(config, config.prompt[: config.num_prompts], policy.tokenizer)
    else:
        prompts = read_prompts(config, policy.tokenizer)
    if taken := sorted(prompts.columns.keys() & set(KEYS)):
        raise UserError(
            f"{config.dataset_name} has a column {taken[0]!r}, which in output_file is the model's "
            "own: rename it"
        )
    policy.check(prompts)

    each = range(len(prompts.ids))
    prompts = prompts.rows([row for row in each for _ in range(config.num_completions)])
    with Display("generate", policy.num_passes(prompts)) as display:
        samples = policy.answer(prompts, display.advance)
    rows = [
        {"prompt": prompt, **answer} | {name: prompts.columns[name][i] for name in prompts.columns}
        for i, (prompt, answer) in enumerate(zip(prompts.prompts, samples.answers(), strict=True))
    ]
    write_output(path, to_jsonl(rows))
    for row in range(min(NUM_SHOWN, len(rows))):
        say(samples.describe(row))
    say(f"{path}: {len(rows)} completions, {sum(row['ended'] for row in rows)} ended")
    return rows
