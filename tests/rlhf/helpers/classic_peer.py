"""Three steps of TRL 0.11.4's PPOTrainer on a tiny GPT-2, and the statistics of the last.

The weights are given by a formula and dropout is off, so that the figures hang on nothing but the
rules of PPO. `python tests/rlhf/helpers/classic_peer.py` prints them where TRL is installed::

    pip install trl==0.11.4 "transformers<4.47" torch==2.13.0 "numpy<2.3" rich
"""

import json
from types import ModuleType

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = ("<pad>", "<eos>", "a", "b", "c", "d", "e", "f", "g", "h", "i")
EQUAL = (
    [[3, 4, 5], [6, 7, 8], [9, 10, 3], [4, 6, 8]],
    [[5, 6, 7, 2], [8, 9, 9, 10], [3, 3, 4, 5], [10, 1, 2, 6]],
)
RAGGED = (
    [[3, 4, 5], [6], [9, 10, 3, 4, 5], [4, 6]],
    [[5, 6, 7, 2, 5], [8, 9], [3], [10, 1, 2]],
)
SCORES = ([1.0, -0.5, 0.25, 2.0], [0.5, 1.5, -1.0, 0.0], [2.0, 0.0, -0.5, 1.0])
# Rows, and options beside a batch of 4 and a learning rate of 1e-2.
CASES = {
    "equal": (EQUAL, {"mini_batch_size": 4}),
    "ragged": (RAGGED, {"mini_batch_size": 2, "adap_kl_ctrl": False}),
    "whitened": (
        EQUAL,
        {"mini_batch_size": 1, "whiten_rewards": True, "kl_penalty": "full", "gamma": 0.9},
    ),
    "scaled": (
        RAGGED,
        {
            "mini_batch_size": 4,
            "use_score_scaling": True,
            "use_score_norm": True,
            "score_clip": 0.5,
            "kl_penalty": "mse",
            "early_stopping": True,
            "target_kl": 0.005,
        },
    ),
    "accumulated": (
        EQUAL,
        {
            "mini_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "kl_penalty": "abs",
            "horizon": 100,
            "use_score_scaling": True,
        },
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def make_model(api: ModuleType, phase: float, dropout: float = 0.0):
    """A GPT-2 with a value head; its weights are sines of their index and of `phase`."""
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = api.AutoModelForCausalLMWithValueHead.from_pretrained(
        GPT2LMHeadModel(config), summary_dropout_prob=dropout
    )
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name != "lm_head.weight":  # which is wte.weight
                index = torch.arange(weight.numel(), dtype=torch.float64)
                wave = 0.3 * torch.sin(0.7 * index + phase + len(name))
                if "ln_" in name and name.endswith("weight"):
                    wave += 1
                weight.copy_(wave.reshape(weight.shape))
    return model


def run(api: ModuleType, case: str) -> dict:
    """The statistics of the third step."""
    (queries, responses), options = CASES[case]
    config = api.PPOConfig(batch_size=4, learning_rate=1e-2, **options)
    trainer = api.PPOTrainer(config, make_model(api, 0.0), make_model(api, 0.5), make_tokenizer())
    for scores in SCORES:
        rows = ([torch.tensor(x) for x in values] for values in (queries, responses, scores))
        stats = trainer.step(*rows)
    return stats


def main() -> None:
    import trl
    from trl.trainer.utils import RunningMoments

    class Number(float):
        """0.11.4 calls .to() of the moments, which are floats: its use_score_scaling raises."""

        def to(self, **kwargs):
            return torch.tensor(float(self), **kwargs)

    update = RunningMoments.update

    def update_as_numbers(self, scores):
        moments = update(self, scores)
        self.mean, self.std = Number(self.mean), Number(self.std)
        return moments

    RunningMoments.update = update_as_numbers
    for case in CASES:
        stats = run(trl, case)
        figures = {
            name: float(f"{value:.6g}")
            for name, value in stats.items()
            if isinstance(value, float) and not name.startswith("time/")
        }
        print(case, json.dumps(figures))
        print(case, json.dumps([round(float(x), 5) for x in stats["objective/kl_dist"]]))


if __name__ == "__main__":
    main()
