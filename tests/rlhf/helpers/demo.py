"""The demo in its smallest size, and labelled texts."""

import json
import random

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.demo import command as demo
from rlhf.demo.labelled import Example

REVIEWS = demo.ReviewsSizes(
    num_reviews=200,
    num_rankings=32,
    num_heldout_rankings=8,
    num_prompts=32,
    num_eval_prompts=16,
    vocab_size=600,
    hidden_size=32,
    num_layers=1,
    response_length=12,
    sft_steps=6,
    reward_steps=4,
    total_episodes=128,
)


def check_models(output_dir):
    tokenizer = AutoTokenizer.from_pretrained(output_dir / "ppo")
    inputs = tokenizer(["The film"], return_tensors="pt")
    policy = AutoModelForCausalLM.from_pretrained(output_dir / "ppo")
    generated = policy.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert generated.shape == (1, inputs["input_ids"].shape[1] + 3)
    scorer = AutoModelForSequenceClassification.from_pretrained(output_dir / "reward")
    assert scorer(**inputs).logits.shape == (1, 1)
    before = AutoModelForCausalLM.from_pretrained(output_dir / "sft").state_dict()
    after = policy.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def examples(count: int) -> list[Example]:
    rng = random.Random(0)
    neutral = [f"word{i}" for i in range(50)]
    made = []
    for i in range(count):
        positive = i % 2 == 0
        words = [*rng.sample(neutral, 6), rng.choice(("good", "fine") if positive else ("bad",))]
        rng.shuffle(words)
        made.append(Example(" ".join([*words, str(i)]), positive))
    return made


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)
