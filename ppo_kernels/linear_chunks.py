"""How the ops of `ppo_kernels.linear` run over chunks of tokens, by the kernels of a backend."""

import functools
import math

import torch

from ppo_kernels import checks, schemas
from ppo_kernels.dispatch import kernels

# Of the logits of a chunk. On a CPU products of fewer rows are slower; not measured on GPUs.
CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 512 << 20}
# Rows of a head to one product on a CPU: 192 tokens' logits of 128,256 from D = 512 take a fifth
# less time in such pieces than at once (MKL, two cores of Zen 4).
BLOCK = 2048


class _Head:
    """A head on one chunk of tokens after another, and the gradients that they add up to.

    `counted` (...) says which tokens take part. On a CPU they are picked. On a GPU, where that
    would wait for the device, the hidden states of the others are taken as 0.
    """

    def __init__(self, backend, hidden, weight, bias, head_scalars, logits_dtype, counted=None):
        self.shape, self.hidden = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
        self.weight, self.bias, self.dtype = weight, bias, logits_dtype
        self.counted = None if counted is None else counted.flatten()
        self.picks = backend == "native" and hidden.device.type == "cpu"
        logit_scale, softcap = head_scalars.tolist()
        # The kernels see W h + b, and the scale is in their temperature; or they see tanh.
        self.capped = softcap < math.inf
        self.logits_per_seen = softcap if self.capped else logit_scale
        self.slope = logit_scale / softcap if self.capped else 1.0
        self.grad_hidden = self.grad_weight = self.grad_bias = None

    def check(self, tokens, temperatures):
        """What kernels would name by its place in a chunk."""
        if self.counted is not None:
            out = ~self.counted.view(tokens.shape)
            tokens = tokens.masked_fill(out, 0)
            temperatures = None if temperatures is None else temperatures.masked_fill(out, 1.0)
        checks.refuse_out_of_range(tokens, self.weight.shape[0])
        if temperatures is not None:
            checks.refuse_temperature(temperatures)

    def of_seen(self, temperatures, scalars):
        """Those of the kernels on what they see; in `scalars` the temperature comes first."""
        factors = torch.ones_like(scalars)
        factors[0] /= self.logits_per_seen
        if temperatures is not None:
            temperatures = temperatures.double() / self.logits_per_seen
        return temperatures, scalars * factors

    def want(self, grad_hidden, grad_weight, grad_bias, sum_dtype, hidden_dtype=None):
        """Make room for gradients; returns whether there are any."""
        if grad_hidden:
            self.grad_hidden = self.hidden.new_zeros(self.hidden.shape, dtype=hidden_dtype)
        if grad_weight:
            self.grad_weight = self.weight.new_zeros(self.weight.shape, dtype=sum_dtype)
        if grad_bias:
            self.grad_bias = torch.zeros_like(self.bias, dtype=schemas.result_dtype(self.bias))
        return grad_hidden or grad_weight or grad_bias

    def chunks(self, chunk_bytes, buffers=1):
        """(indices of tokens, their hidden states, what the kernels see of their logits), the last
        in a buffer that the next chunk takes; the caller needs `buffers` of that size in all."""
        picked, n = None, self.hidden.shape[0]
        if self.counted is not None and self.picks:
            picked = self.counted.nonzero()[:, 0]
            n = picked.shape[0]
        vocabulary = self.weight.shape[0]
        most = max(1, chunk_bytes // (buffers * vocabulary * self.dtype.itemsize))
        rows = math.ceil(n / max(1, math.ceil(n / most)))
        buffer = self.hidden.new_empty((rows, vocabulary), dtype=self.dtype)
        for begin in range(0, n, max(1, rows)):
            chunk = slice(begin, min(begin + rows, n))
            if picked is not None:
                chunk = picked[chunk]
            hidden = self.hidden[chunk].to(self.dtype)
            if self.counted is not None and not self.picks:
                hidden = hidden.masked_fill(~self.counted[chunk, None], 0.0)
            yield chunk, hidden, self.seen(hidden, buffer[: hidden.shape[0]])

    def seen(self, hidden, out):
        whole = hidden.device.type != "cpu" and self.dtype == self.weight.dtype
        block = out.shape[1] if whole else BLOCK
        for begin in range(0, out.shape[1], block):
            rows = slice(begin, begin + block)
            product, weight = out[:, rows], self.weight[rows].t().to(self.dtype)
            if self.bias is None:
                torch.mm(hidden, weight, out=product)
            else:
                torch.addmm(self.bias[rows].to(self.dtype), hidden, weight, out=product)
            if self.capped:
                product.mul_(self.slope).tanh_()
        return out

    def add(self, chunk, hidden, grad, tanh, scale=None):
        """Add what `grad` brings, the gradient in what the kernels saw, which was `tanh` if there
        is a softcap; if it was multiplied by `scale`, a tensor, that is undone in fp32. It is spent
        afterwards."""

        def unscaled(product):
            return product if scale is None else product.float() / scale

        if self.capped:
            torch.ops.aten.tanh_backward.grad_input(grad, tanh, grad_input=grad)
        if self.grad_hidden is not None:
            product = unscaled(self.in_hidden(grad)).mul_(self.slope)
            self.grad_hidden[chunk] = product.to(self.grad_hidden.dtype)
        if self.grad_bias is not None:
            total = unscaled(grad.sum(0, dtype=self.grad_bias.dtype))
            self.grad_bias.add_(total, alpha=self.slope)
        if self.grad_weight is None:
            return
        if self.grad_weight.dtype == grad.dtype:
            self.grad_weight.addmm_(grad.t(), hidden, alpha=self.slope)
            return
        for begin in range(0, grad.shape[1], BLOCK):
            rows = slice(begin, begin + BLOCK)
            product = unscaled(grad[:, rows].t() @ hidden)
            self.grad_weight[rows].add_(product, alpha=self.slope)

    def in_hidden(self, grad):
        """The gradient in hidden states, without the slope."""
        if grad.dtype == self.weight.dtype:
            return torch.mm(grad, self.weight)
        total = grad.new_zeros((grad.shape[0], self.weight.shape[1]))
        for begin in range(0, grad.shape[1], BLOCK):
            rows = slice(begin, begin + BLOCK)
            total.addmm_(grad[:, rows], self.weight[rows].to(grad.dtype))
        return total

    def gradients(self):
        """Those in hidden, weight and bias; empty where nobody wants them."""
        grads = self.grad_hidden, self.grad_weight, self.grad_bias
        shapes = self.shape, self.weight.shape, self.weight.shape[:1]
        return tuple(
            self.hidden.new_empty(0) if grad is None else grad.view(shape)
            for grad, shape in zip(grads, shapes, strict=True)
        )


def _at(chunk, *per_token):
    return [None if x is None else x.flatten()[chunk] for x in per_token]


def _token_logprobs(
    backend,
    hidden,
    weight,
    bias,
    head_scalars,
    tokens,
    mask,
    temperatures,
    scalars,
    logits_dtype,
    chunk_bytes,
):
    head = _Head(backend, hidden, weight, bias, head_scalars, logits_dtype, mask)
    if head.picks:
        head.check(tokens, temperatures)
    temperatures, scalars = head.of_seen(temperatures, scalars)
    real = schemas.result_dtype(hidden)
    shapes = tokens.shape, tokens.shape, (*tokens.shape, 2)
    made = hidden.new_empty if mask is None else hidden.new_zeros
    results = tuple(made(shape, dtype=real) for shape in shapes)
    for chunk, _, seen in head.chunks(chunk_bytes):
        per_token = _at(chunk, tokens, mask, temperatures)
        parts = kernels(backend).token_logprobs(seen, *per_token, scalars)
        for result, part in zip(results, parts, strict=True):
            result.view(-1, *part.shape[1:])[chunk] = part
    return results


def _token_logprobs_backward(
    backend,
    grad_logprobs,
    grad_entropy,
    hidden,
    weight,
    bias,
    head_scalars,
    tokens,
    entropy,
    softmax_stats,
    temperatures,
    scalars,
    grad_hidden,
    grad_weight,
    grad_bias,
    sum_dtype,
    logits_dtype,
    chunk_bytes,
):
    upstream = [x != 0 for x in (grad_logprobs, grad_entropy) if x is not None]
    counted = functools.reduce(torch.logical_or, upstream)
    head = _Head(backend, hidden, weight, bias, head_scalars, logits_dtype, counted)
    head.want(grad_hidden, grad_weight, grad_bias, sum_dtype)
    temperatures, scalars = head.of_seen(temperatures, scalars)
    stats = softmax_stats.view(-1, 2)
    for chunk, part, seen in head.chunks(chunk_bytes, buffers=2):
        upstream = _at(chunk, grad_logprobs, grad_entropy)
        known = *_at(chunk, tokens, entropy), stats[chunk], *_at(chunk, temperatures), scalars
        grad = kernels(backend).token_logprobs_backward(*upstream, seen, *known)
        head.add(chunk, part, grad, seen)
    return head.gradients()


def _gradient_in_place(backend, logits, tokens, results, temperatures, scalars):
    """Write the gradient that `ppo_loss` left to its backward, times a power of two; returns that.

    It takes the sum of the rows' largest factors to between 2^7 and 2^8: fp16 holds small rows
    beside a large one, and products with weights and hidden states up to 256.
    """
    *_, entropy, stats, g, h = results
    factors = torch.maximum(g.abs(), h.abs())
    scaled = factors / (scalars[0] if temperatures is None else temperatures)
    total = torch.where(factors > 0, scaled, 0.0).sum()
    exponent = (8 - torch.frexp(total).exponent).clamp(max=126)
    scale = torch.ldexp(torch.ones_like(total), exponent).to(g.dtype)
    kernels(backend).token_logprobs_backward_(
        g * scale, h * scale, logits, tokens, entropy, stats, temperatures, scalars
    )
    return scale


def _ppo_loss(
    backend,
    hidden,
    weight,
    bias,
    head_scalars,
    *arguments,
):
    *inputs, scalars, kl_estimator = arguments[:-6]
    *wanted, sum_dtype, logits_dtype, chunk_bytes = arguments[-6:]
    tokens, old_logprobs, advantages, mask, ref_logprobs, denominator, temperatures = inputs
    head = _Head(backend, hidden, weight, bias, head_scalars, logits_dtype, mask)
    if head.picks:
        head.check(tokens, temperatures)
        checks.refuse_infinite(
            mask, old_logprobs=old_logprobs, advantages=advantages, ref_logprobs=ref_logprobs
        )
    sum_dtype = torch.promote_types(sum_dtype, schemas.unscaled_dtype(weight))
    dtypes = sum_dtype, schemas.unscaled_dtype(hidden)
    differentiable = head.want(*wanted, *dtypes)
    scaled = differentiable and logits_dtype == torch.float16
    in_place = differentiable and not scaled
    op = kernels(backend).ppo_loss_ if in_place else kernels(backend).ppo_loss
    if denominator is None:
        counts = torch.ones_like(tokens) if mask is None else mask
        denominator = counts.sum(dtype=torch.float64)
    temperatures, scalars = head.of_seen(temperatures, scalars)
    real = schemas.result_dtype(hidden)
    logprobs, entropy = (hidden.new_zeros(tokens.shape, dtype=real) for _ in range(2))
    means = hidden.new_zeros(6, dtype=torch.float64)
    keeps_tanh = head.capped and differentiable
    for chunk, part, seen in head.chunks(chunk_bytes, buffers=1 + keeps_tanh):
        tanh = seen.clone() if keeps_tanh else None
        per_token = _at(chunk, tokens, old_logprobs, advantages, mask, ref_logprobs)
        own = _at(chunk, temperatures)
        try:
            results = op(seen, *per_token, denominator, *own, scalars, kl_estimator)
        except ValueError:
            # It names a token by its place in the chunk.
            scored = kernels(backend).token_logprobs(
                head.seen(part, seen), per_token[0], per_token[3], *own, scalars
            )
            logprobs.view(-1)[chunk] = scored[0]
            checks.check_logprobs(logprobs, tokens)
            raise
        means += torch.stack(results[:6])
        logprobs.view(-1)[chunk], entropy.view(-1)[chunk] = results[6:8]
        if scaled:
            scale = _gradient_in_place(backend, seen, per_token[0], results, *own, scalars)
            head.add(chunk, part, seen, tanh, scale)
        elif differentiable:
            head.add(chunk, part, seen, tanh)
    return *(x.clone() for x in means.to(real)), logprobs, entropy, *head.gradients()


OPS = {
    "linear_token_logprobs": _token_logprobs,
    "linear_token_logprobs_backward": _token_logprobs_backward,
    "linear_ppo_loss": _ppo_loss,
}
_libraries: list[torch.library.Library] = []


def register(backend):
    """Implement the ops in the namespace of a backend, by its own kernels."""
    library = torch.library.Library(schemas.NAMESPACE[backend], "IMPL")
    for name, function in OPS.items():

        def implementation(*arguments, function=function):
            # The inputs are of the dtype that autocast asks for.
            device = next(x.device for x in arguments if x is not None)
            with torch.autocast(device.type, enabled=False):
                return function(backend, *arguments)

        library.impl(name, implementation, "CompositeExplicitAutograd")
    _libraries.append(library)


register("native")
register("triton")
