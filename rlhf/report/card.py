"""The model card of a stage's output folder: what the hub shows of a model, and what it is for."""

from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCardData
from transformers import AutoConfig, AutoModelForSequenceClassification

import ppo_kernels
from rlhf.config.training import TrainConfig
from rlhf.data.hub import may_be_hub_id
from rlhf.models.loading import scorer_class
from rlhf.report.charts import MAIN_METRICS, describe, find_judges, finite
from rlhf.run.files import GO_ON, disk_errors, write_file
from rlhf.run.folder import CARD_FILE

# What the model is, its tag and its pipeline on the hub.
KINDS = {
    "sft": ("causal language model, fine-tuned on examples", "sft", "text-generation"),
    "reward": ("reward model, trained on preferences", "reward-model", "text-classification"),
    "ppo": ("causal language model, trained with PPO against rewards", "ppo", "text-generation"),
}
SAMPLE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer("The film", return_tensors="pt")
output = model.generate(
    **inputs, do_sample=True, top_k=0, temperature={temperature}, max_new_tokens={length}
)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
SCORE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".")
inputs = tokenizer("The film is good."{eos}, return_tensors="pt")
score = model(**inputs).logits.item()
print(score, (score - model.config.reward_mean) / model.config.reward_std)
"""
# For a model that transformers has no such class of.
SCORE_BY_HAND = """\
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModel.from_pretrained(".")
head = load_file("model.safetensors")["score.weight"]
inputs = tokenizer("The film is good."{eos}, return_tensors="pt")
score = (model(**inputs).last_hidden_state[0, -1].float() @ head[0]).item()
print(score, (score - model.config.reward_mean) / model.config.reward_std)
"""
TEXT = """\
---
{front_matter}
---

# {title}

A {kind}. It started from `{base}` and learnt from `{data}`{rewards}, with seed {seed}.

## Training

The stage `rlhf {stage}` made it: every option is in [`{stage}.yaml`]({stage}.yaml), every metric in
[`metrics.jsonl`](metrics.jsonl). {again}
Versions: ppo_kernels {ppo_kernels}, torch {torch}, transformers {transformers}.

## Results

The last value of each figure.

| figure | metric | value |
|---|---|---|
{results}

{plots}

## Use

In this folder; elsewhere give its path, or its name on the hub, in place of the dot.

```python
{code}```

{critic}## Limits

{limits}
"""
AGAIN = """\
With this folder's path for FOLDER,
`rlhf {stage} --config FOLDER/{stage}.yaml --output_dir ANOTHER` does so again, with as many
processes and started where this run was: relative paths in the file begin there."""
IN_PYTHON = "Rewards that were given in Python, not as options, are in no file."
CRITIC = """\
The folder [`critic`](critic) holds PPO's critic, {critic}: its head's output at a token
is the value of the state after it. Sampling does not need it.

"""
POLICY_LIMITS = """\
It says what resembles its data or scored well, true or not. Nothing here has measured its safety or
its bias, nor how it does on other kinds of prompts."""
REWARD_LIMITS = """\
Its scores order answers to one prompt and mean nothing by themselves. A policy that is trained
against it for long finds answers that it scores too high."""


def write_card(
    folder: Path,
    stage: str,
    config: TrainConfig,
    metrics: dict[str, float],
    *,
    is_repeatable: bool = True,
) -> None:
    """Writes the model card `README.md` of a finished stage, sft, reward or ppo, into its output
    folder.

    `metrics` are the last ones, where None and what is not finite show as a dash. Of models and
    data that are local files the card has the last part of the path only, and of plots and the
    critic what lies in the folder. `is_repeatable` tells that the configuration is all of the run,
    which is not so where rewards were given in Python.
    """
    kind, tag, pipeline = KINDS[stage]
    on_hub = {
        name: name if may_be_hub_id(name) and not Path(name).exists() else None
        for name in (config.model_name_or_path, config.dataset_name)
    }
    front_matter = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["rlhf", tag, "ppo_kernels"],
        base_model=on_hub[config.model_name_or_path],
        datasets=on_hub[config.dataset_name],
    )
    rewards = [name for name in metrics if name.startswith("rewards/")]
    judges = find_judges(rewards, getattr(config, "reward_weights", None))
    if stage == "reward":
        template = SCORE if is_classifier(folder) else SCORE_BY_HAND
        code = template.format(eos=" + tokenizer.eos_token" if config.append_eos else "")
    else:
        code = SAMPLE.format(
            temperature=getattr(config, "temperature", 1.0),
            length=getattr(config, "response_length", 64),
        )
    text = TEXT.format(
        front_matter=front_matter.to_yaml(),
        title=folder.resolve().name,
        kind=kind,
        base=on_hub[config.model_name_or_path] or Path(config.model_name_or_path).resolve().name,
        data=on_hub[config.dataset_name] or Path(config.dataset_name).resolve().name,
        rewards=listed(" for ", [name for name in rewards if name not in judges])
        + listed(", judged by ", judges),
        seed=config.seed,
        stage=stage,
        again=AGAIN.format(stage=stage) if is_repeatable else IN_PYTHON,
        ppo_kernels=ppo_kernels.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        results="\n".join(results(stage, metrics, judges)),
        plots="\n".join(f"![{plot.stem}]({plot.name})" for plot in sorted(folder.glob("*.png"))),
        code=code,
        critic=critic_text(folder / "critic") if (folder / "critic").is_dir() else "",
        limits=REWARD_LIMITS if stage == "reward" else POLICY_LIMITS,
    )
    with disk_errors(f"write {folder / CARD_FILE}", GO_ON):
        write_file(folder / CARD_FILE, text.encode())


def critic_text(folder: Path) -> str:
    known = "an `AutoModelForSequenceClassification` with one label"
    by_hand = "a model for `AutoModel` with a further weight, `score.weight`"
    return CRITIC.format(critic=known if is_classifier(folder) else by_hand)


def is_classifier(folder: Path) -> bool:
    """Tells whether transformers has a class that opens a scorer's folder."""
    return scorer_class(AutoConfig.from_pretrained(folder)) is AutoModelForSequenceClassification


def listed(start: str, rewards: list[str]) -> str:
    names = ", ".join(f"`{name.removeprefix('rewards/')}`" for name in rewards)
    return names and start + names


def results(stage: str, metrics: dict[str, float | None], judges: list[str]) -> list[str]:
    """Rows of the table: the figures that the report shows first, then held-out ones."""
    shown = [name for name in MAIN_METRICS[stage] if name in metrics]
    shown += [name for name in metrics if name.startswith("eval/") and name not in shown]
    rows = []
    for name in shown:
        title, about = describe(stage, name, judges)
        value = finite(metrics[name])
        shown_value = "–" if value is None else f"{value:.4g}"
        rows.append(f"| {title}{about and f', {about}'} | `{name}` | {shown_value} |")
    return rows
