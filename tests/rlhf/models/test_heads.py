"""Log-probs and loss from hidden states: the figures of the logits, which then never exist."""

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.errors import UserError
from rlhf.models import heads
from rlhf.models.generation import Stopping
from rlhf.models.heads import HiddenHead, LogitsHead, make_head
from rlhf.models.loading import load_causal_lm
from rlhf.ppo.trainer import PPOTrainer
from rlhf.rollout import Responses
from rlhf.run.state import save_model
from tests.rlhf.helpers.ppo import collect
from tests.rlhf.helpers.world import WORDS

# More rows than the tokenizer has words: those are no tokens.
VOCABULARY = len(WORDS) + 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "gpt2-tied": ("GPT2LMHeadModel", GPT2),
    "gemma2-softcap": ("Gemma2ForCausalLM", {"final_logit_softcapping": 2.0}),
    "cohere-scale": ("CohereForCausalLM", {"logit_scale": 0.25}),
    "granite-scaling": ("GraniteForCausalLM", {"logits_scaling": 3.0}),
    "phi-bias": ("PhiForCausalLM", {}),
}


@pytest.fixture
def save(tmp_path, tokenizer):
    """Saves a model of a family, its head's bias not 0, and returns its folder."""

    def make(family: str) -> str:
        name, changes = FAMILIES[family]
        torch.manual_seed(0)
        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**SIZES | changes))
        if (bias := model.get_output_embeddings().bias) is not None:
            torch.nn.init.normal_(bias)
        save_model(tmp_path / family, model, tokenizer)
        return str(tmp_path / family)

    return make


@pytest.fixture
def make_trainer(save, ppo_config, tmp_path, trained_sft):
    def make(family: str, logits_from: str, share_trunk: bool = False, **changes) -> PPOTrainer:
        options = {
            "model_name_or_path": save(family),
            # Cohere and Granite have no scorers.
            "critic_model_path": None if share_trunk else str(trained_sft),
            "share_trunk": share_trunk,
            "output_dir": str(tmp_path / "run"),
            "logits_from": logits_from,
            "temperature": 0.8,
            "entropy_coef": 0.05,
            "num_mini_batches": 1,
            "num_ppo_epochs": 2,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 1e9,
        }
        config = ppo_config(**options | changes)
        torch.manual_seed(0)  # for the critic's new head
        return PPOTrainer(config, [lambda completions: [float(len(text)) for text in completions]])

    return make


def update(trainer: PPOTrainer) -> tuple:
    """The experience of a batch, the metrics of its update, and the gradients of each step."""
    gradients = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    )
    batch = collect(trainer)
    return batch.responses.tokens, batch.experience, trainer.update(batch), gradients


@pytest.mark.parametrize(
    ("family", "share_trunk"),
    [*((family, False) for family in FAMILIES), ("llama", True), ("gpt2-tied", True)],
)
def test_hidden_states_give_what_logits_give(make_trainer, family, share_trunk):
    """Also where EOS and rows that are no tokens are suppressed."""
    options = {"share_trunk": share_trunk, "min_response_length": 3 * ("softcap" not in family)}
    trainers = [make_trainer(family, kind, **options) for kind in ("logits", "hidden")]
    assert [type(t.model.head) for t in trainers] == [LogitsHead, HiddenHead]
    (tokens, *logits), (same_tokens, *hidden) = map(update, trainers)
    assert torch.equal(tokens, same_tokens)
    torch.testing.assert_close(hidden, logits, atol=2e-5, rtol=1e-4)


def test_gradient_checkpointing_on_hidden_states(make_trainer):
    plain, checkpointed = (
        update(make_trainer("llama", "hidden", gradient_checkpointing=on)) for on in (False, True)
    )
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


def test_bf16_hidden_states_are_as_near_as_bf16_logits(make_trainer):
    """Of log-probs, to those in fp32: the largest error is at most half as much again."""
    family, errors = "cohere-scale", []
    truth = collect(make_trainer(family, "logits"))
    for kind in ("logits", "hidden"):
        trainer = make_trainer(family, kind, bf16=True)
        experience = trainer.observe(trainer.prompts, trainer.next_rows(), truth.responses)[0]
        errors.append((experience.logprobs - truth.experience.logprobs).abs().max())
    assert 1e-5 < errors[1] < 1.5 * errors[0]


class Bent(LlamaForCausalLM):
    """Logits that no matrix makes of the hidden states."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + outputs.logits.sin()
        return outputs


@pytest.fixture
def stopping(tokenizer, ppo_config):
    return Stopping(tokenizer, ppo_config(output_dir="-", min_response_length=2))


def test_a_head_that_does_otherwise_keeps_its_logits(monkeypatch, stopping, save, capsys):
    monkeypatch.setattr(heads, "LARGE_VOCABULARY", VOCABULARY)
    capped = load_causal_lm(save("gemma2-softcap"))
    for model, reason in ((Bent(LlamaConfig(**SIZES)), "Bent makes"), (capped, "soft cap")):
        assert type(make_head("auto", model, stopping)) is LogitsHead
        assert reason in capsys.readouterr().out
        with pytest.raises(UserError, match=f"logits_from hidden.*{reason}"):
            make_head("hidden", model, stopping)
        assert type(make_head("logits", model, stopping)) is LogitsHead


def test_a_soft_cap_that_small_logits_cannot_prove_is_no_rule():
    small = SIZES | {"initializer_range": 0.02, "final_logit_softcapping": 30.0}
    assert heads.find_rule(LlamaForCausalLM(LlamaConfig(**small))) is None


def test_auto_takes_hidden_states_of_large_vocabularies(stopping, capsys):
    for size, expected in ((31_999, LogitsHead), (32_000, HiddenHead)):
        model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": size}))
        assert type(make_head("auto", model, stopping)) is expected
    assert capsys.readouterr().out == ""


def test_no_pass_holds_logits_of_all_tokens(monkeypatch, make_trainer):
    """At V = 32,000, where hidden states are the default, the largest tensor of an evaluation and
    an update stays below the logits of a micro-batch; with `logits` it is as large."""
    monkeypatch.setitem(FAMILIES, "large", ("LlamaForCausalLM", {"vocab_size": 32_000}))
    size, length = 16, 60
    torch.manual_seed(0)
    tokens = torch.randint(3, 32_000, (size, length))
    prompt_ids, every = torch.full((size, 2), 3), torch.ones(size, length, dtype=torch.bool)
    responses = Responses(prompt_ids, every[:, :2], tokens, every, every[:, 0])
    largest, results = [], []
    for kind in ("logits", "auto"):
        trainer = make_trainer(
            "large",
            kind,
            share_trunk=True,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=1,
            num_ppo_epochs=1,
            response_length=length,
        )
        trainer.stopping.vocab_size = 32_000  # as if the tokenizer knew them all
        with torch.profiler.profile(profile_memory=True) as profile:
            batch = trainer.evaluate(trainer.next_rows(), responses)
            steps = trainer.update(batch)
        events = profile.profiler.kineto_results.events()
        largest.append(max(e.nbytes() for e in events if e.name() == "[memory]"))
        results.append((batch.experience, steps))
    whole = size * length * 32_000 * 4
    assert largest[0] >= whole > largest[1] > 0
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)
