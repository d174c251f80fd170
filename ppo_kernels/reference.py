"""Every op in plain PyTorch with autograd: the specification, and the only oracle.

Scans over time have a file of their own, reference_gae.py.

Half-precision inputs are computed in fp32, fp64 in fp64. Vocabulary-sized intermediates are made
freely here; that is what the other backends exist to avoid. A public docstring in the file of the
op family gives shapes, units and errors.
"""

import torch
import torch.distributed as dist

from ppo_kernels import checks

ESTIMATORS = ("k1", "k2", "k3", "abs")
# A log-ratio beyond it counts as it, with gradient 0: fp32 soon overflows.
_MOST_LOG_RATIO = 80.0


def accumulate(x):
    return x if x.dtype == torch.float64 else x.float()


def chained(upstream, derivative):
    """upstream · derivative, and 0 where either is, though the other may not be finite."""
    return torch.where((upstream == 0) | (derivative == 0), 0.0, upstream * derivative)


# Autograd multiplies an upstream gradient of 0 by what a NaN or an inf behind a mask has for a
# derivative. The functions below do not; they are differentiable twice.


class _Chained(torch.autograd.Function):
    """`value`, whose derivative in x is given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, value, derivative):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        (derivative,) = ctx.saved_tensors
        return chained(grad, derivative), None, None


class _Tanh(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (tanh,) = ctx.saved_tensors
        return torch.where(grad == 0, 0.0, torch.ops.aten.tanh_backward(grad, tanh))


class _LogSoftmax(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.log_softmax(x, -1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (log_p,) = ctx.saved_tensors
        grad_x = torch.ops.aten._log_softmax_backward_data(grad, log_p, -1, log_p.dtype)
        return torch.where((grad == 0).all(-1, keepdim=True), 0.0, grad_x)


class _Mean(torch.autograd.Function):
    """Σ_j p_j x_j of each row, without the terms of p_j = 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(log_p, x):
        p = log_p.exp()
        return (p * x.masked_fill(p == 0, 0.0)).sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        log_p, x = ctx.saved_tensors
        grad_x = chained(grad.unsqueeze(-1), log_p.exp())
        return chained(grad_x, x), grad_x


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        # Autocast may have lowered both.
        lowered = x.reshape(-1, x.shape[-1]).to(grad.dtype)
        lowered = torch.where((rows != 0).any(-1, keepdim=True), lowered, 0.0)
        grad_x = (rows @ weight.to(grad.dtype)).view(x.shape).to(x.dtype)
        grad_bias = None if ctx.bias_dtype is None else rows.sum(0).to(ctx.bias_dtype)
        return grad_x, (rows.t() @ lowered).to(weight.dtype), grad_bias


def _at_least_zero(x):
    """x, and 0 with its gradient where rounding made it negative."""
    return torch.where(x < 0, x - x.detach(), x)


def bounded(log_ratio):
    """A log-ratio as it is exponentiated: within ±80, NaN unless it is finite."""
    x = log_ratio.clamp(-_MOST_LOG_RATIO, _MOST_LOG_RATIO)
    return torch.where(log_ratio.isfinite(), x, torch.nan)


def _log_softmax(logits, temperature):
    logits = accumulate(logits)
    # Before they are scaled, which may take them beyond their range.
    top = logits.detach().amax(-1, keepdim=True)
    logits = logits - torch.where(top == -torch.inf, 0.0, top)
    if isinstance(temperature, torch.Tensor):
        checks.refuse_temperature(temperature)
        temperature = temperature.detach().to(logits.dtype).unsqueeze(-1)
    return _LogSoftmax.apply(logits / temperature)


def _counted(mask, logits, tokens, temperature):
    """The arguments with harmless values at masked-out positions."""
    if mask is None:
        return logits, tokens, temperature
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.masked_fill(~mask, 1.0)
    return logits.masked_fill(~mask.unsqueeze(-1), 0.0), tokens.masked_fill(~mask, 0), temperature


def _within(mask, *results):
    return results if mask is None else tuple(x.masked_fill(~mask, 0) for x in results)


def token_logprobs_and_entropy(logits, tokens, mask=None, *, temperature=1.0):
    logits, tokens, temperature = _counted(mask, logits, tokens, temperature)
    checks.refuse_out_of_range(tokens, logits.shape[-1])
    log_p = _log_softmax(logits, temperature)
    logprobs = log_p.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
    return _within(mask, logprobs, _at_least_zero(_Mean.apply(log_p, -log_p)))


def kept_token_logprobs_and_entropy(
    logits, tokens, kept_ids, kept_offsets, mask=None, *, temperature=1.0
):
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    rows = torch.arange(tokens.numel(), device=tokens.device)
    rows = rows.repeat_interleave(kept_offsets.diff(), output_size=kept_ids.numel())
    kept = torch.zeros((tokens.numel(), logits.shape[-1]), dtype=torch.bool, device=tokens.device)
    kept[rows, kept_ids.long()] = True
    logits = logits.masked_fill(~kept.view(logits.shape), -torch.inf)
    return token_logprobs_and_entropy(logits, tokens, mask, temperature=temperature)


@torch.no_grad()
def token_statistics(logits, tokens, mask=None, *, temperature=1.0):
    logits, tokens, temperature = _counted(mask, logits, tokens, temperature)
    logprobs, entropy = token_logprobs_and_entropy(logits, tokens, temperature=temperature)
    log_p = _log_softmax(logits, temperature)
    p = log_p.exp()
    deviation = log_p.masked_fill(p == 0, 0.0) + entropy.unsqueeze(-1)
    chosen = logits.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
    top1 = (chosen == logits.amax(-1)) & ~logprobs.isnan()
    varentropy = (p * deviation.square()).sum(-1)
    sum_sq_probs = p.square().sum(-1).clamp(max=1.0)
    return _within(mask, logprobs, entropy, p.amax(-1), sum_sq_probs, top1, varentropy)


def _kept_scores(scores, top_k, top_p, min_p):
    """The scores with -inf for what transformers' warpers remove, one after the other."""
    if top_k is not None:
        least = scores.topk(min(top_k, scores.shape[-1])).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ascending, order = scores.sort(stable=True)
        cumulative = ascending.softmax(-1).cumsum(-1)
        removed = cumulative <= 1.0 - top_p
        removed[..., -1] = False
        scores = scores.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    if min_p is not None:
        probabilities = scores.softmax(-1)
        removed = probabilities < min_p * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(removed, -torch.inf)
    return scores


@torch.no_grad()
def sample_tokens(
    logits, uniforms, mask=None, *, temperature=1.0, top_k=None, top_p=None, min_p=None
):
    z = accumulate(logits)
    counted = torch.ones_like(uniforms, dtype=torch.bool) if mask is None else mask
    # A product: `torch.full` would compile anew for each number.
    tau = torch.ones_like(uniforms, dtype=z.dtype) * temperature
    bad = counted & ~((tau >= 0) & (tau < torch.inf))
    checks.refuse_where(bad, tau, "temperature must be finite and >= 0")
    in_range = (uniforms >= 0) & (uniforms < 1)
    checks.refuse_where(counted & ~in_range, uniforms, "uniforms must be in [0, 1)")
    tau = tau.to(z.dtype)
    greedy = tau == 0
    scores = z / tau.masked_fill(greedy | ~counted, 1.0).unsqueeze(-1)
    scores = torch.where(counted.unsqueeze(-1), scores, 0.0)
    top = scores.amax(-1)
    checks.refuse_where(
        counted & ~top.isfinite(),
        top,
        "logits / temperature must have a finite maximum and no NaN where a token is drawn",
    )
    kept = _kept_scores(scores, top_k, top_p, min_p)
    cumulative = kept.softmax(-1).cumsum(-1)
    total = cumulative[..., -1:].contiguous()
    threshold = uniforms.to(z.dtype).unsqueeze(-1) * total
    drawn = torch.searchsorted(cumulative, threshold, right=True)
    # A number next to 1 may round to it.
    drawn = torch.minimum(drawn, torch.searchsorted(cumulative, total)).squeeze(-1)
    tokens = torch.where(greedy, scores.argmax(-1), drawn)
    logprobs = kept.log_softmax(-1).gather(-1, tokens.clamp(max=z.shape[-1] - 1).unsqueeze(-1))
    logprobs = torch.where(greedy, 0.0, logprobs.squeeze(-1))
    # Where nothing can be drawn and nobody waits to look.
    undefined = bad | ~in_range | ~top.isfinite()
    tokens = tokens.masked_fill(undefined, z.shape[-1]).masked_fill(~counted, 0)
    return tokens, logprobs.masked_fill(undefined, torch.nan).masked_fill(~counted, 0.0)


def linear_logits(hidden, weight, bias=None, softcap=None, logit_scale=1.0):
    logits = logit_scale * _Linear.apply(hidden, weight, bias)
    return logits if softcap is None else softcap * _Tanh.apply(logits / softcap)


def kl_divergence(logits, ref_logits, mask=None, *, temperature=1.0):
    if mask is not None:
        ref_logits = ref_logits.masked_fill(~mask.unsqueeze(-1), 0.0)
        logits, _, temperature = _counted(mask, logits, mask, temperature)
    log_p = _log_softmax(logits, temperature)
    log_q = _log_softmax(ref_logits.detach(), temperature)
    return _at_least_zero(_Mean.apply(log_p, log_p - log_q))


def kl_estimate(logprobs, ref_logprobs, *, estimator):
    log_ratio = accumulate(logprobs) - accumulate(ref_logprobs)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        value, derivative = 0.5 * log_ratio.square(), log_ratio
    elif estimator == "k3":
        x = bounded(log_ratio)
        value = torch.expm1(-x) + x
        derivative = torch.where(x == log_ratio, -torch.expm1(-x), 0.0)
    else:
        value, derivative = log_ratio.abs(), log_ratio.sign()
    return _Chained.apply(log_ratio, value.detach(), derivative)


def _masked_sum(x, mask):
    return x.sum() if mask is None else torch.where(mask, x, 0.0).sum()


def _denominator(x, mask, denominator):
    """The count to divide by; 1 where it is 0, so that an empty mask gives 0 and not 0/0."""
    if denominator is None:
        denominator = x.numel() if mask is None else mask.sum()
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.to(x.dtype)
    # A product: a copy to the device would wait.
    denominator = torch.ones((), dtype=x.dtype, device=x.device) * denominator
    if checks.value_checks_run(denominator) and not denominator >= 0:
        raise ValueError(f"denominator must be >= 0, got {denominator.item()}")
    return torch.where(denominator == 0, 1.0, denominator)


def masked_mean(x, mask=None, denominator=None):
    x = accumulate(x)
    return _masked_sum(x, mask) / _denominator(x, mask, denominator)


@torch.no_grad()
def masked_whiten(x, mask=None, *, eps=1e-8, group=None):
    x = accumulate(x)
    # From the least on: what is equal has then no variance at all.
    counted = x if mask is None else torch.where(mask, x, torch.inf)
    least = counted.amin() if x.numel() > 0 else x.new_full((), torch.inf)
    if group is not None:
        least = _all_reduce(least, group, dist.ReduceOp.MIN)
    x = x - least
    total, count = _masked_sum(x, mask), _masked_sum(torch.ones_like(x), mask)
    if group is not None:
        total, count = _all_reduce(torch.stack([total, count]), group)
    count = count.clamp(min=1.0)
    centred = x - total / count
    squares = _masked_sum(centred.square(), mask)
    if group is not None:
        squares = _all_reduce(squares, group)
    variance = squares / count + eps
    whitened = centred * torch.where(variance == 0, 0.0, torch.rsqrt(variance))
    return whitened if mask is None else torch.where(mask, whitened, 0.0)


def _all_reduce(x, group, op=dist.ReduceOp.SUM):
    dist.all_reduce(x, op, group=group)
    return x


def log_ratio(logprobs, old_logprobs):
    logprobs = accumulate(logprobs)
    return logprobs - old_logprobs.detach().to(logprobs.dtype)


def policy_terms(log_ratio, advantages, mask, clip_low, clip_high, dual_clip):
    """Per token: the clipped loss, the estimate of KL(old || new), and whether clipping acts."""
    advantages = advantages.detach().to(log_ratio.dtype)
    if mask is not None:
        log_ratio = log_ratio.masked_fill(~mask, 0.0)
        advantages = advantages.masked_fill(~mask, 0.0)
    log_ratio = bounded(log_ratio)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    # Chosen: at a tie `torch.maximum` would give each side half of the gradient.
    loss = torch.where(clipped > unclipped, clipped, unclipped)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        loss = torch.where((advantages < 0) & (loss > bound), bound, loss)
    approx_kl = (torch.expm1(log_ratio) - log_ratio).detach()
    return loss, approx_kl, (clipped > unclipped).to(log_ratio.dtype)


def clipped_policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask=None,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    denominator=None,
):
    checks.refuse_infinite(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    moved = log_ratio(logprobs, old_logprobs)
    terms = policy_terms(moved, advantages, mask, clip_low, clip_high, dual_clip)
    return tuple(masked_mean(x, mask, denominator) for x in terms)


def value_loss(values, old_values, returns, mask=None, clip=None, denominator=None):
    values = accumulate(values)
    old_values = old_values.detach().to(values.dtype)
    returns = returns.detach().to(values.dtype)
    if mask is not None:
        values, old_values, returns = (
            x.masked_fill(~mask, 0.0) for x in (values, old_values, returns)
        )
    loss = 0.5 * (values - returns).square()
    clipped = torch.zeros_like(loss)
    if clip is not None:
        move = values - old_values
        held_loss = 0.5 * (old_values + move.clamp(-clip, clip) - returns).square()
        acts = (move.abs() > clip) & (held_loss > loss)
        clipped = acts.to(values.dtype)
        loss = torch.where(acts, held_loss, loss)
    return masked_mean(loss, mask, denominator), masked_mean(clipped, mask, denominator)


def ppo_loss(logits, inputs, objective):
    tokens, old_logprobs, advantages, mask, ref_logprobs, denominator, temperature = inputs
    *clipping, entropy_coef, kl_coef, kl_estimator = objective
    logits, tokens, temperature = _counted(mask, logits, tokens, temperature)
    checks.refuse_infinite(
        mask, old_logprobs=old_logprobs, advantages=advantages, ref_logprobs=ref_logprobs
    )
    logprobs, token_entropy = token_logprobs_and_entropy(logits, tokens, temperature=temperature)
    checks.refuse_impossible(logprobs, tokens)
    moved = log_ratio(logprobs, old_logprobs)
    terms = policy_terms(moved, advantages, mask, *clipping)
    policy_loss, approx_kl, clip_fraction = (masked_mean(x, mask, denominator) for x in terms)
    entropy = masked_mean(token_entropy, mask, denominator)
    if ref_logprobs is None:
        kl = torch.zeros_like(policy_loss)
    else:
        ref_logprobs = ref_logprobs.to(logprobs.dtype)
        kl_terms = kl_estimate(logprobs, ref_logprobs, estimator=kl_estimator)
        kl = masked_mean(kl_terms, mask, denominator)
    loss = policy_loss - entropy_coef * entropy + kl_coef * kl
    if mask is not None:
        logprobs, token_entropy = (x.masked_fill(~mask, 0.0) for x in (logprobs, token_entropy))
    scalars = (policy_loss, entropy, kl, approx_kl, clip_fraction)
    return loss, *(x.detach() for x in (*scalars, logprobs, token_entropy))


def ppo_loss_(logits, inputs, objective):
    """The results, and the gradient before it is rounded to the logits' type."""
    # Inference mode has no autograd, and tensors made in it take none.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = logits.detach().to(accumulate(logits).dtype, copy=True).requires_grad_()
        constants = (x.clone() if isinstance(x, torch.Tensor) else x for x in inputs)
        loss, *rest = ppo_loss(leaf, constants, objective)
        (grad,) = torch.autograd.grad(loss, leaf)
    logits.detach().copy_(grad)
    return (loss.detach(), *rest), grad
