"""What other packages have for the same ops, where they can be imported; their code is not here.

Liger's losses have no entropy, and its GRPO loss one advantage for a sequence, whose last logits it
leaves out: it takes part with less to do. So does PufferLib, whose advantages come without returns.
Its C++ for the CPU, one file of version 3, is compiled here alone.
"""

import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Setting
from ppo_kernels import reference


def _trl_kernel():
    """From `trl/kernels/logprob_entropy.py`, without the rest of TRL, which needs much more."""
    spec = importlib.util.find_spec("trl")
    path = Path(spec.submodule_search_locations[0], "kernels", "logprob_entropy.py")
    spec = importlib.util.spec_from_file_location("trl_logprob_entropy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.selective_log_softmax_and_entropy


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


PACKAGES = ("trl", "liger_kernel", "torchrl", "pufferlib")


def installed() -> bool:
    return any(map(_installed, PACKAGES))


def versions() -> str:
    """ "trl 1.12.0, torchrl": those that are importable, with their version where it is known."""
    names = {}
    for name in filter(_installed, PACKAGES):
        try:
            names[name] = f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            names[name] = name
    return ", ".join(names.values())


def _trl_on_cpu(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return selective_log_softmax(logits, tokens), entropy_from_logits(logits)


def _liger_cross_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return (-liger_cross_entropy(logits, tokens, reduction="none"),)


def logprobs(setting: Setting) -> dict[str, Callable]:
    """Functions of (logits, tokens) that give log-probs and, Liger's aside, entropies."""
    functions = {}
    if not setting.peers:
        return functions
    if _installed("trl"):
        functions["trl"] = _trl_on_cpu if setting.name == "cpu" else _trl_kernel()
    if _installed("liger_kernel") and setting.name != "cpu":
        functions["liger"] = _liger_cross_entropy
    return functions


class LigerLoss:
    """The GRPO loss and its gradient: of `logits` (tokens, V) as sequences, in place or not."""

    def __init__(self, logits, tokens, old_logprobs, advantages, *, inplace: bool):
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        sequences = math.gcd(tokens.shape[0], 8)

        def scored(x: Tensor) -> Tensor:
            return x.view(sequences, -1)[:, :-1].contiguous()

        self.loss = triton_grpo_loss
        self.leaf = logits.detach().view(sequences, -1, logits.shape[-1]).requires_grad_()
        self.old_logprobs, self.tokens = scored(old_logprobs), scored(tokens)
        self.advantages = advantages.view(sequences, -1)[:, 0].contiguous()
        self.inplace = inplace

    def __call__(self) -> tuple[Tensor, ...]:
        loss, *_ = self.loss(
            self.leaf,
            self.old_logprobs,
            None,
            self.tokens,
            self.advantages,
            temperature=1.0,
            beta=0.0,
            eps_low=0.2,
            eps_high=0.2,
            inplace=self.inplace,
            loss_type="bnpo",
            reduce=True,
        )
        return loss, *torch.autograd.grad(loss, self.leaf)

    def check(self, logprobs: Tensor) -> None:
        """Raises AssertionError unless the loss is that of these log-probs (tokens,)."""
        sequences = len(self.advantages)
        loss, *_ = reference.clipped_policy_loss(
            logprobs.view(sequences, -1)[:, :-1],
            self.old_logprobs,
            self.advantages[:, None].expand_as(self.old_logprobs),
        )
        torch.testing.assert_close(self()[0].detach(), loss, rtol=1e-2, atol=1e-3)


def liger_losses(
    setting: Setting, logits, tokens, old_logprobs, advantages, *, inplace: bool
) -> dict[str, LigerLoss]:
    """Empty where Liger cannot take part: on a CPU, and with one token."""
    if not (setting.peers and _installed("liger_kernel")):
        return {}
    if setting.name == "cpu" or len(tokens) < 2:
        return {}
    return {"liger": LigerLoss(logits, tokens, old_logprobs, advantages, inplace=inplace)}


@functools.cache
def _pufferlib_gae() -> Callable:
    from torch.utils.cpp_extension import load

    (folder,) = importlib.util.find_spec("pufferlib").submodule_search_locations
    source = Path(folder, "extensions", "pufferlib.cpp")
    load("pufferlib_cpp", [str(source)], extra_cflags=["-O3"], is_python_module=False)
    return torch.ops.pufferlib.compute_puff_advantage


def gae(setting: Setting, rewards, values, dones, *, gamma, lam) -> dict[str, Callable]:
    """Functions that give advantages and, PufferLib's aside, returns. `dones` may be None."""
    functions = {}
    if not setting.peers or setting.name != "cpu":
        return functions
    ends = torch.zeros_like(rewards, dtype=torch.bool) if dones is None else dones
    before = rewards.new_zeros(len(rewards), 1)
    if _installed("torchrl"):
        from torchrl.objectives.value import functional

        following = torch.cat([values[:, 1:], before], dim=1)
        inputs = [x[..., None] for x in (values, following, rewards, ends, ends)]
        loop, vectorised = (
            functional.generalized_advantage_estimate,
            functional.vec_generalized_advantage_estimate,
        )
        functions["torchrl"] = lambda: [x[..., 0] for x in loop(gamma, lam, *inputs)]
        functions["torchrl_vec"] = lambda: [x[..., 0] for x in vectorised(gamma, lam, *inputs)]
    if _installed("pufferlib"):
        function = _pufferlib_gae()
        # The value at t has its reward and done at t + 1; the last column has no advantage.
        columns = [(values, before), (before, rewards), (before, ends.float())]
        padded = [torch.cat(pair, dim=1) for pair in columns]
        ratio = torch.ones_like(padded[0])  # importance: with ratio and clips at 1 it is plain GAE

        def pufferlib():
            advantages = torch.empty_like(ratio)
            function(*padded, ratio, advantages, gamma, lam, 1.0, 1.0)
            return (advantages[:, :-1],)

        functions["pufferlib"] = pufferlib
    return functions
