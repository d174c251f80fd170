"""The API of TRL 0.11 and before: queries, responses and scores in, statistics out.

For scripts and tutorials that were written for it, which run here with only their imports changed::

    from rlhf.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    model = AutoModelForCausalLMWithValueHead.from_pretrained("gpt2")
    trainer = PPOTrainer(PPOConfig(batch_size=16, mini_batch_size=4), model, tokenizer=tokenizer)
    responses = trainer.generate(queries, return_prompt=False, max_new_tokens=16, do_sample=True)
    stats = trainer.step(queries, responses, scores)

Names, defaults, formulas and the keys of the statistics are those of TRL 0.11.4, on the same seeds
its figures too (`tests/rlhf/classic` holds both). What it did wrong is right here:

- Dropout is off, where TRL sampled with it after the first `step`; a tokenizer that pads on the
  left moves no position in `step`; no EOS in a prompt is taken for the one that ends a response.
- `PPOConfig.temperature` divides the logits in `step` as it does in sampling; TRL had none.
- A minibatch counts by its tokens, so that `gradient_accumulation_steps` changes nothing but
  memory; one beyond `ratio_threshold` takes no part, where TRL let Adam's momentum step.
- `max_grad_norm` clips every step, where TRL clipped the first alone.
- Nothing outside of the responses enters the advantages: TRL let in the padding's rewards of 0,
  which `whiten_rewards` moves, and took a token that `response_masks` leaves out for a state of
  value 0, where it is skipped here. There `ppo/policy/advantages` is 0, `ppo/policy/ratio` 1.
- `use_score_scaling` works, which raised.

One process on one device; no encoder-decoder models and no PEFT. For several GPUs: `rlhf ppo`.

Not here, of what scripts may call: accelerate's part in training (`accelerator.prepare`,
`backward`, `gather`, `log`, trackers); the trainer's inner steps (`batched_forward_pass`,
`compute_rewards`, `compute_advantages`, `loss`, `train_minibatch`, `record_step_stats`,
`gather_stats`, `prepare_model_inputs`) and `create_model_card`; the model's `is_peft_model` and
`compute_reward_score`; `AutoModelForSeq2SeqLMWithValueHead`; and of `trl.core` all but
`LengthSampler` and `respond_to_batch`. `generate` takes no `num_return_sequences` for a list of
queries and no `return_dict_in_generate`.
"""

from rlhf.classic.config import LengthSampler, PPOConfig
from rlhf.classic.generation import respond_to_batch
from rlhf.classic.model import AutoModelForCausalLMWithValueHead, create_reference_model
from rlhf.classic.trainer import PPOTrainer

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "create_reference_model",
    "respond_to_batch",
]
