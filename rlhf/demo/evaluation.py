"""A world's policies: what they answer, and how they compare before and after PPO, on prompts that
no stage has seen."""

from rlhf.inference.policy import Policy, exact_kl, text_prompts
from rlhf.rewards.scoring import Samples
from rlhf.run.progress import Display


def answer(policy: Policy, prompts: list[str], title: str) -> Samples:
    """A response to each prompt, with progress under the title."""
    tokenized = text_prompts(policy.config, prompts, policy.tokenizer)
    with Display(title, policy.num_passes(tokenized)) as display:
        return policy.answer(tokenized, display.advance)


def compare(
    before: Policy, after: Policy, prompts: list[str]
) -> tuple[list[str], list[str], float]:
    """Whole texts (prompt and response) of both policies, and the KL of the second to the first, as
    `exact_kl` has it."""
    answers = [answer(policy, prompts, "evaluation") for policy in (before, after)]
    texts = [
        [prompt + text for prompt, text in zip(prompts, part.completions, strict=True)]
        for part in answers
    ]
    return *texts, exact_kl(after, before, answers[1].responses)
