"""TRL's GRPO trainer on the ops of ppo_kernels.

Needs TRL: `pip install trl==1.12.0 requests`, then `python examples/trl_grpo.py`.
"""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from ppo_kernels.integrations import patch

# A small model and tokenizer; they stand for yours.
words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(998))])}
tokenizer = Tokenizer(models.WordLevel(words))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
)
config = LlamaConfig(
    vocab_size=1000,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def brevity(completions, **columns):
    return [-len(text.split()) / 16 for text in completions]


trainer = GRPOTrainer(
    LlamaForCausalLM(config),
    brevity,
    args=GRPOConfig(
        output_dir="runs/trl",
        max_steps=3,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=16,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
    processing_class=tokenizer,
    train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(64)]}),
)
with patch("trl"):
    trainer.train()
