"""PPO (Schulman et al., 2017) against rewards, as in Ouyang et al. (2022).

Four models: the policy that learns, its frozen start as the reference, a reward model (or any other
reward), and a critic that gives the state before each response token a value.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from rlhf import distributed
from rlhf.config.ppo import PPOConfig
from rlhf.data.seam import decode
from rlhf.ppo.metrics import (
    NUM_COMPLETIONS,
    PLOTS,
    SHOWN,
    iteration_metrics,
    response_metrics,
    scored_answers,
    write_completions,
)
from rlhf.ppo.trainer import PPOTrainer
from rlhf.report.card import write_card
from rlhf.report.page import write_report
from rlhf.rewards.scoring import score_samples
from rlhf.rollout import Draws, sample_responses
from rlhf.run.generators import seed_all
from rlhf.run.metrics import MetricsLog, plot_metrics, to_floats
from rlhf.run.progress import Display, hooked, num_passes
from rlhf.run.safe_points import SafePoints, stoppable
from rlhf.run.saving import Checkpoints, is_due
from rlhf.run.terminal import say


@stoppable("ppo")
def train_ppo(
    config: PPOConfig, reward_funcs: Sequence[str | nn.Module | Callable] | None = None
) -> dict[str, float]:
    """Trains a policy and saves it, with its critic in the subfolder `critic`; returns the last
    metrics. `reward_funcs` may hold modules and functions, and replaces the configuration's."""
    start_time = time.perf_counter()
    seed_all(config.seed)
    trainer = distributed.together(lambda: PPOTrainer(config, reward_funcs))
    models = {"critic": trainer.model.critic, "": trainer.policy}
    checkpoints = Checkpoints(config, "ppo", trainer, models, trainer.tokenizer)
    metrics = checkpoints.resume()
    output_dir, total = checkpoints.run.output_dir, trainer.num_iterations
    safe_points = SafePoints(checkpoints, "ppo", trainer.iteration, metrics)
    policy, reference = trainer.policy, trainer.reference
    num_processes = distributed.world_size()
    sampling, micro_batches = passes(trainer.batch_size, config, num_processes)

    with MetricsLog(
        output_dir, "ppo", total, config.report_to, SHOWN, step=trainer.iteration
    ) as log:
        while trainer.iteration < total:
            start = time.perf_counter()
            rows = trainer.next_rows()
            # Until the update no weight moves: a signal ends the iteration as if it had not begun.
            with hooked(policy.register_forward_hook, safe_points.check):
                with log.phase("generate", sampling, policy.register_forward_hook):
                    responses = trainer.sample(trainer.prompts, rows, trainer.generator)
                safe_points.agree()
                sampled = time.perf_counter()
                with log.phase("score", micro_batches, reference.register_forward_hook):
                    batch = trainer.evaluate(rows, responses)
                safe_points.agree()
            evaluated = time.perf_counter()
            kl_coef, learning_rate = trainer.kl_controller.kl_coef, trainer.scheduler.get_last_lr()
            register = trainer.optimizer.register_step_post_hook
            with log.phase("update", trainer.steps_per_iteration, register):
                steps = trainer.update(batch)
            step = trainer.iteration
            if step == 1:
                is_fp32 = not config.bf16 and policy.dtype == torch.float32
                tell_first_ratio(steps[0]["policy/ratio_error"].item(), is_fp32)
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
                    "episodes": trainer.episodes,
                }
                log.write(step, figures)
                metrics |= figures
            if trainer.eval_prompts and is_due(config.eval_steps, step, total):
                count = len(trainer.eval_prompts.ids)
                both = sum(passes(count, config, num_processes))
                with log.phase("eval", both, policy.register_forward_hook):
                    figures = evaluate_policy(trainer)
                log.write(step, figures)
                metrics |= figures
            if config.save_steps and is_due(config.save_steps, step, total):
                checkpoints.save(step, metrics)
            safe_points.reached(step, metrics)

    metrics["iterations"] = total
    try:
        if config.load_best_model_at_end:
            checkpoints.load_best()
    finally:  # with the last model, if the best one is damaged
        from_options = reward_funcs is None
        distributed.from_main(lambda: finish(trainer, checkpoints, metrics, from_options))
    return metrics | {"seconds": time.perf_counter() - start_time}


def tell_first_ratio(error: float, is_fp32: bool) -> None:
    """Warns of a first minibatch whose ratios are not 1, up to rounding: the policy that is updated
    is then not the one that was sampled from."""
    limit = 1e-3 if is_fp32 else 16 * torch.finfo(torch.bfloat16).eps
    if error > limit:
        say(
            f"warning: a ratio of the first minibatch is off 1 by {error:.2g} (rounding explains "
            f"{limit:.2g}): the model's log-probs depend on the other rows of a batch, on padding, "
            "or on chance (dropout); such updates are not PPO's",
        )


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


def finish(
    trainer: PPOTrainer, checkpoints: Checkpoints, metrics: dict[str, float], from_options: bool
) -> None:
    """Leaves the models, plots, the completions of up to NUM_COMPLETIONS prompts (held-out ones if
    there are any), card and, unless report_to is none, report in the output folder. `from_options`
    tells whether the options name all rewards."""
    output_dir = checkpoints.run.output_dir
    checkpoints.save_models(output_dir)
    plot_metrics(output_dir, PLOTS)
    write_completions(output_dir, compare_completions(trainer))
    write_card(output_dir, "ppo", trainer.config, metrics, is_repeatable=from_options)
    if trainer.config.report_to != "none":
        write_report(output_dir)


def compare_completions(trainer: PPOTrainer) -> list[dict]:
    """What `write_completions` takes: how reference and policy answer, with the same draws."""
    config, prompts = trainer.config, trainer.eval_prompts or trainer.prompts
    rows = list(range(min(NUM_COMPLETIONS, len(prompts.ids))))
    ids = prompts.ids[: len(rows)]
    draws = Draws.of(len(rows), config, torch.Generator().manual_seed(config.seed))
    answers = []
    sampling, _ = passes(len(rows), config, 1)
    with Display("ppo completions", 2 * sampling) as display:
        for model in (trainer.reference, trainer.policy):
            with hooked(model.register_forward_hook, display.advance):
                responses = sample_responses(
                    model, trainer.stopping, trainer.decoding, ids, draws, config
                )
            samples = trainer.samples(prompts, rows, responses)
            answers.append(scored_answers(samples, score_samples(trainer.rewards, samples)))
    texts = decode(trainer.tokenizer, ids)
    return [
        {"prompt": prompt, "before": before, "after": after}
        for prompt, before, after in zip(texts, *answers, strict=True)
    ]


def passes(count: int, config: PPOConfig, num_processes: int) -> tuple[int, int]:
    """Passes of a model in each process that `count` responses take: to sample them, at most, and
    to score them."""
    tokens = num_passes(count, config.per_device_eval_batch_size, num_processes)
    scored = num_passes(count, config.per_device_train_batch_size, num_processes)
    return tokens * config.response_length, scored
