"""Saved policies and their answers to prompts: what `rlhf generate`, `rlhf evaluate` and the demo
share, and the output files of the former two."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

import torch
from transformers import PreTrainedTokenizerBase

from ppo_kernels import kl_divergence
from rlhf.config.fields import ResponseOptions
from rlhf.config.inference import InferenceConfig
from rlhf.data.loaders import Prompts, cut_prompts, load_prompts, prompt_ids
from rlhf.errors import UserError
from rlhf.models.generation import Stopping
from rlhf.models.heads import LogitsHead
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.passes import autocast, check_fits, freeze
from rlhf.models.proof import prove_policy
from rlhf.rewards.scoring import Samples
from rlhf.rollout import Draws, Responses, sample_responses
from rlhf.run.files import disk_errors, write_file
from rlhf.run.folder import is_run_name, local_inputs
from rlhf.run.progress import hooked, num_passes
from rlhf.run.terminal import say


class Policy:
    """A saved policy that answers prompts; the same seed gives every policy the same draws."""

    def __init__(self, path: str, config: ResponseOptions):
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        revision = getattr(config, "revision", None)  # of one model; evaluate has two
        self.tokenizer = load_tokenizer(path, config, revision)
        self.model = freeze(load_causal_lm(path, config, revision=revision, frozen=True))
        self.stopping = Stopping(self.tokenizer, config, self.model.generation_config)
        self.decoding = prove_policy(self.model, path)
        say(f"{path}: {self.stopping.describe()}")

    def check(self, prompts: Prompts) -> int:
        """The most tokens of prompt and response. Raises UserError if the model has too few
        positions for them."""
        longest = max(map(len, prompts.ids)) + self.config.response_length
        remedy = "lower max_prompt_length or response_length"
        check_fits(self.model, self.tokenizer, longest, remedy)
        return longest

    def num_passes(self, prompts: Prompts) -> int:
        """Passes of the model that the answers take at most."""
        size = self.config.per_device_eval_batch_size
        return num_passes(len(prompts.ids), size, 1) * self.config.response_length

    def answer(self, prompts: Prompts, advance: Callable[[], None]) -> Samples:
        """A response to each prompt; `advance` is called after each pass of the model."""
        draws = Draws.of(len(prompts.ids), self.config, self.generator)
        with hooked(self.model.register_forward_hook, advance):
            responses = sample_responses(
                self.model, self.stopping, self.decoding, prompts.ids, draws, self.config
            )
        return Samples.of(self.tokenizer, prompts, responses)


@torch.no_grad()
def exact_kl(policy: Policy, reference: Policy, responses: Responses) -> float | None:
    """KL(policy || reference) in nats per response: the exact divergence of the next-token
    distributions, summed over each of the policy's responses, mean over these. None for policies
    with different vocabularies, and at temperature 0, where it has no finite value."""
    same_tokens = policy.tokenizer.get_vocab() == reference.tokenizer.get_vocab()
    if not same_tokens or policy.config.temperature == 0:
        return None
    config, head, total = policy.config, LogitsHead(policy.stopping), 0.0
    rows = torch.arange(len(responses.tokens), device=responses.tokens.device)
    for _, part in responses.by_length(rows, config.per_device_eval_batch_size):
        with autocast(config.bf16):
            logits, ref_logits = (
                # A model may have more rows than their tokenizer has tokens.
                head(side.model, *part.inputs)[0].logits[..., : policy.stopping.vocab_size]
                for side in (policy, reference)
            )
            kl = kl_divergence(logits, ref_logits, temperature=config.temperature)
        total += kl[part.mask].sum().item()
    return total / len(rows)


def read_prompts(config: InferenceConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """The first `config.num_prompts` prompts of the data set."""
    prompts = load_prompts(config, config.dataset_name, config.dataset_split, tokenizer)
    return prompts.rows(range(len(prompts.ids))[: config.num_prompts])


def text_prompts(
    config: ResponseOptions, texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> Prompts:
    ids = cut_prompts(tokenizer, prompt_ids(tokenizer, texts), config, "prompt")
    return Prompts(ids, texts, {})


def check_output(path: Path, config: InferenceConfig) -> None:
    """Raises UserError if a file cannot be written there, if it would be (in) the data set or one
    of a model's files or a judge's, or if it is there and may not be replaced. Leaves nothing
    behind."""
    with disk_errors(f"write output_file {path}", "choose another one"):
        for option, name in local_inputs(vars(config)):
            source, place = Path(name).resolve(), path.resolve()
            is_own = place == source or option == "dataset_name" or is_run_name(place.name)
            if place.is_relative_to(source) and is_own:
                raise UserError(
                    f"output_file {path} must not be {option} {name}, nor a file of it: choose "
                    "another one"
                )
        if path.is_dir():
            raise UserError(f"output_file {path} is a folder: choose a file in it")
        if path.exists() and not path.is_file():
            raise UserError(f"output_file {path} is not a regular file: choose another one")
        if path.exists() and not config.overwrite:
            raise UserError(
                f"output_file {path} exists: choose another one, or replace it with --overwrite"
            )
        # Folders that are not there yet are made with the file, in the last that is.
        with TemporaryFile(dir=next(filter(os.path.lexists, path.absolute().parents))):
            pass


def write_output(path: Path, content: bytes) -> None:
    with disk_errors(f"write output_file {path}", "choose another one"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
