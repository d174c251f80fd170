"""PPO (Schulman et al., 2017) against rewards, as in Ouyang et al. (2022).

Four models: the policy that learns, its frozen start as the reference, a reward model (or any other
reward), and a critic that gives the state before each response token a value.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import set_seed

from rlhf import distributed
from rlhf.config import PPOConfig
from rlhf.iteration import (
    PLOTS,
    SHOWN,
    iteration_metrics,
    response_metrics,
    write_completions,
)
from rlhf.metrics import MetricsLog, plot_metrics, to_floats
from rlhf.rollout import Draws, sample_responses
from rlhf.saving import Checkpoints, is_due
from rlhf.scores import score_samples
from rlhf.trainer import PPOTrainer

NUM_SHOWN_COMPLETIONS = 16


def train_ppo(
    config: PPOConfig, reward_funcs: Sequence[str | nn.Module | Callable] | None = None
) -> dict[str, float]:
    """Trains a policy and saves it, with its critic in the subfolder `critic`; returns the last
    metrics. `reward_funcs` may hold modules and functions, and replaces the configuration's."""
    start_time = time.perf_counter()
    set_seed(config.seed)
    trainer = distributed.together(lambda: PPOTrainer(config, reward_funcs))
    models = {"critic": trainer.model.critic, "": trainer.policy}
    checkpoints = Checkpoints(config, "ppo", trainer, models, trainer.tokenizer)
    output_dir, total = checkpoints.run.output_dir, trainer.num_iterations
    metrics = checkpoints.resume()

    with MetricsLog(
        output_dir, "ppo", total, config.report_to, SHOWN, step=trainer.iteration
    ) as log:
        while trainer.iteration < total:
            start = time.perf_counter()
            rows = trainer.next_rows()
            responses = trainer.sample(trainer.prompts, rows, trainer.generator)
            sampled = time.perf_counter()
            batch = trainer.evaluate(rows, responses)
            evaluated = time.perf_counter()
            kl_coef, learning_rate = trainer.kl_controller.kl_coef, trainer.scheduler.get_last_lr()
            steps = trainer.update(batch)
            step = trainer.iteration
            log.advance()
            if is_due(config.logging_steps, step, total):
                figures = to_floats(iteration_metrics(batch, steps))
                end = time.perf_counter()
                figures |= {
                    "time/generate": sampled - start,
                    "time/evaluate": evaluated - sampled,
                    "time/update": end - evaluated,
                    "tokens_per_second": int(responses.mask.sum()) / (end - start),
                    "kl_coef": kl_coef,
                    "lr": learning_rate[0],
                    "episodes": step * trainer.batch_size,
                }
                log.write(step, figures)
                metrics |= figures
            if trainer.eval_prompts and is_due(config.eval_steps, step, total):
                figures = evaluate_policy(trainer)
                log.write(step, figures)
                metrics |= figures
            if config.save_steps and is_due(config.save_steps, step, total):
                checkpoints.save(step, metrics)

    try:
        if config.load_best_model_at_end:
            checkpoints.load_best()
    finally:  # with the last model, if the best one is damaged
        distributed.from_main(lambda: finish(trainer, checkpoints))
    return metrics | {"iterations": total, "seconds": time.perf_counter() - start_time}


def evaluate_policy(trainer: PPOTrainer) -> dict[str, float]:
    """Metrics `eval/*` of one response to each held-out prompt, drawn alike every time."""
    prompts = trainer.eval_prompts
    count = len(prompts.ids)
    rows = [row % count for row in range(count + -count % distributed.world_size())]
    generator = torch.Generator().manual_seed(trainer.config.seed)
    responses = trainer.sample(prompts, rows, generator)
    experience, scores = trainer.observe(prompts, rows, responses)
    figures = response_metrics(
        responses.rows(slice(count)),
        experience.rows(slice(count)),
        scores.apply(lambda values: values[:count]),
    )
    return {
        f"eval/{name.removeprefix('objective/').removeprefix('tokens/')}": value
        for name, value in to_floats(figures).items()
    }


def finish(trainer: PPOTrainer, checkpoints: Checkpoints) -> None:
    """Leaves the models, completions and plots in the output folder."""
    output_dir = checkpoints.run.output_dir
    checkpoints.save_models(output_dir)
    config, prompts = trainer.config, trainer.prompts
    rows = list(range(min(NUM_SHOWN_COMPLETIONS, len(prompts.ids))))
    draws = Draws.of(len(rows), config, torch.Generator().manual_seed(config.seed))
    columns = []
    for model in (trainer.reference, trainer.policy):
        responses = sample_responses(
            model, trainer.tokenizer, trainer.stopping, prompts.ids[: len(rows)], draws, config
        )
        samples = trainer.samples(prompts, rows, responses)
        scores = score_samples(trainer.rewards, samples)
        totals = (scores.scores + scores.token_scores.sum(1)).tolist()
        columns.append(list(zip(totals, samples.completions, strict=True)))
    texts = [
        trainer.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts.ids[: len(rows)]
    ]
    write_completions(output_dir / "completions.md", texts, *columns)
    plot_metrics(output_dir, PLOTS)
