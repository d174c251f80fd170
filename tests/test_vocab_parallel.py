"""The vocabulary split over processes (gloo), judged by fp64 truth and the ops on whole rows."""

import datetime
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ppo_kernels
from ppo_kernels import dispatch, schemas, softmax_state
from tests import ROOT, emulator, interpreter
from tests.conftest import (
    DTYPES,
    EMULATED,
    assert_as_exact_as_eager,
    log_softmax_truth,
    loss_inputs,
    ppo_loss_truth,
    softmax_truth,
)

RANKS = 3
BACKENDS = ("reference", "native", EMULATED, "triton")
# Where the slices of a vocabulary of 7 and of 1031 begin and end, by the number of ranks.
CUTS = {
    7: {1: (0, 7), 2: (0, 4, 7), 3: (0, 3, 3, 7)},
    1031: {1: (0, 1031), 2: (0, 1000, 1031), 3: (0, 344, 688, 1031)},
}
# One for all rows, or one of each.
TEMPERATURES = {7: 0.8, 1031: torch.linspace(0.5, 2, 8)}
LOSS_OPTIONS = {
    "clip_high": 0.3,
    "dual_clip": 1.5,
    "entropy_coef": 0.1,
    "kl_coef": 0.2,
    "temperature": 0.8,
    "denominator": 5,
}


def rows(vocabulary, dtype):
    """(logits, ref_logits, tokens, upstreams): what may stand in one slice and not in another."""
    torch.manual_seed(vocabulary)
    logits, ref_logits = 3 * torch.randn(2, 8, vocabulary)
    part = max(CUTS[vocabulary][2][1], CUTS[vocabulary][3][2])
    logits[1, :part] = ref_logits[1, :part] = -torch.inf
    logits[2, part:] = -torch.inf
    ref_logits[3, : vocabulary // 2] += 60
    logits[4, -1] = 80  # the others are as good as excluded
    logits[5] += 1000
    logits[6] = torch.finfo(torch.float16).min
    logits[6, 2] = ref_logits[6, 2] = 1
    tokens = torch.tensor([0, vocabulary - 1, 2, 1, vocabulary - 2, 3, 2, vocabulary // 2])
    return logits.to(dtype), ref_logits.to(dtype), tokens, torch.randn(3, 8)


def rows_with_nothing_in_a_slice():
    """(logits, ref_logits, tokens): the slices of the last ranks, in one, the other or both."""
    logits, ref_logits = torch.zeros(7, 7), torch.zeros(7, 7)
    logits[[0, 2, 3], 4:] = -torch.inf
    ref_logits[[1, 2], 4:] = -torch.inf
    logits[4, 4:] = torch.nan
    logits[5] = -torch.inf
    logits[6, 4:], ref_logits[6, 4:] = -2000, -torch.inf  # a probability that underflows
    return logits, ref_logits, torch.tensor([0, 6, 1, 5, 1, 0, 3])


def loss_of(vocabulary):
    """Arguments of the loss; the rows that do not count hold what may not be looked at."""
    torch.manual_seed(0)
    inputs = loss_inputs(2, 5, vocabulary)
    inputs["logits"][~inputs["mask"]] = torch.nan
    inputs["tokens"][~inputs["mask"]] = -100
    return inputs


class Rank:
    """What the processes do; a method is a case, run for each backend and number of ranks."""

    def __init__(self, group, ranks, backend):
        self.group, self.ranks, self.backend = group, ranks, backend
        self.rank = dist.get_rank(group)

    def cut(self, logits):
        """(this rank's slice as a leaf, what says where it is): a view of strided rows."""
        begin, end = CUTS[logits.shape[-1]][self.ranks][self.rank : self.rank + 2]
        place = {"group": self.group, "backend": self.backend}
        return logits[..., begin:end].detach().requires_grad_(), place | {"vocab_start": begin}

    def scores(self, vocabulary, dtype):
        logits, _, tokens, (g, h, _) = rows(vocabulary, dtype)
        leaf, place = self.cut(logits)
        scored = ppo_kernels.vocab_parallel_token_logprobs_and_entropy(
            leaf, tokens, temperature=TEMPERATURES[vocabulary], **place
        )
        (scored.logprobs * g + scored.entropy * h).sum().backward()
        return {"same": [x.detach() for x in scored], "grad": leaf.grad}

    def kl(self, vocabulary, dtype):
        logits, ref_logits, _, (*_, g) = rows(vocabulary, dtype)
        leaf, place = self.cut(logits)
        ref, _ = self.cut(ref_logits)
        del place["vocab_start"]
        kl = ppo_kernels.vocab_parallel_kl_divergence(
            leaf, ref, temperature=TEMPERATURES[vocabulary], **place
        )
        (kl * g).sum().backward()
        assert ref.grad is None
        return {"same": [kl.detach()], "grad": leaf.grad}

    def excluded(self):
        """Scores and KL of `rows_with_nothing_in_a_slice`."""
        logits, ref_logits, tokens = rows_with_nothing_in_a_slice()
        leaf, place = self.cut(logits)
        scored = ppo_kernels.vocab_parallel_token_logprobs_and_entropy(leaf, tokens, **place)
        del place["vocab_start"]
        ref, _ = self.cut(ref_logits)
        kl = ppo_kernels.vocab_parallel_kl_divergence(leaf, ref, **place)
        return {"same": [*(x.detach() for x in scored), kl.detach()], "grad": leaf.detach()}

    def loss(self):
        inputs = loss_of(7)
        leaf, place = self.cut(inputs.pop("logits"))
        loss = ppo_kernels.vocab_parallel_ppo_loss(leaf, **inputs, **place, **LOSS_OPTIONS)
        loss.loss.backward()
        assert not any(x.requires_grad for x in loss[1:])
        return {"same": [x.detach() for x in loss], "grad": leaf.grad}

    def head(self):
        """hidden @ weight.T with a DTensor's weight sharded over the vocabulary."""
        mesh = dist.device_mesh.DeviceMesh.from_group(self.group, "cpu")
        hidden, weight = head()
        hidden = hidden.requires_grad_()
        weight = distribute_tensor(weight, mesh, (Shard(0),)).requires_grad_()
        logits = DTensor.from_local(hidden, mesh) @ weight.T
        inputs = loss_of(7)
        del inputs["logits"]
        loss = ppo_kernels.vocab_parallel_ppo_loss(
            logits, **inputs, backend=self.backend, **LOSS_OPTIONS
        )
        kl = ppo_kernels.vocab_parallel_kl_divergence(
            logits, logits.detach() * 0.5, backend=self.backend
        )
        (loss.loss + kl.sum()).backward()
        assert weight.grad.placements == (Shard(0),)
        same = [loss.loss.detach(), hidden.grad, weight.grad.full_tensor()]
        return {"same": same, "grad": weight.grad.to_local()}

    def no_tokens(self):
        leaf, place = self.cut(torch.zeros(0, 7))
        tokens, empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        loss = ppo_kernels.vocab_parallel_ppo_loss(leaf, tokens, empty, empty, **place)
        loss.loss.backward()
        return {"same": [x.detach() for x in loss], "grad": leaf.grad}

    def errors(self):
        """Messages, each of all ranks; a rank left waiting would end the run."""
        scored = ppo_kernels.vocab_parallel_token_logprobs_and_entropy
        inputs = loss_of(7)
        leaf, place = self.cut(inputs.pop("logits"))
        ordinary, _ = self.cut(torch.randn(2, 5, 7))
        tokens = torch.full((2, 5), 5)
        odd = tokens.clone()
        odd[1, 2] = 7
        impossible = torch.zeros(2, 5, 7)
        impossible[0, 1, 5] = -torch.inf
        calls = {
            "unowned": lambda: scored(ordinary, odd, **place),
            "shared": lambda: scored(torch.zeros(2, 5, 7), odd - 1, **place | {"vocab_start": 0}),
            "unowned and counted": lambda: ppo_kernels.vocab_parallel_ppo_loss(
                leaf,
                **inputs | {"tokens": inputs["tokens"].masked_fill(inputs["mask"], 8)},
                **place,
            ),
            "impossible": lambda: ppo_kernels.vocab_parallel_ppo_loss(
                self.cut(impossible)[0], tokens, torch.zeros(2, 5), torch.zeros(2, 5), **place
            ),
            "differentiated twice": lambda: torch.autograd.grad(
                scored(ordinary, tokens, **place).entropy.sum(), ordinary, create_graph=True
            ),
        }
        mesh = dist.device_mesh.DeviceMesh.from_group(self.group, "cpu")
        whole = torch.zeros(2, 5, 7)
        sharded = {dim: distribute_tensor(whole, mesh, (Shard(dim),)) for dim in (1, 2)}
        calls |= {
            "group twice": lambda: scored(sharded[2], tokens, group=self.group),
            "start twice": lambda: scored(sharded[2], tokens, vocab_start=0),
            "other dimension": lambda: scored(sharded[1], tokens),
        }
        messages = {}
        for name, call in calls.items():
            try:
                call()
            except (ValueError, RuntimeError) as error:
                messages[name] = f"{type(error).__name__}: {error}"
        return {"messages": messages}


def head():
    torch.manual_seed(1)
    return torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)


SCORED = [(7, dtype) for dtype in DTYPES] + [(1031, torch.float32)]
CASES = [("loss",), ("excluded",), ("head",), ("no_tokens",), ("errors",)]
CASES += [(name, *arguments) for name in ("scores", "kl") for arguments in SCORED]


def runs(backend, ranks, case, *arguments):
    """Triton's interpreter takes its time, and what is the same for all kernels runs on one."""
    if case in ("head", "no_tokens", "errors"):
        return backend in ("reference", "native") and (case != "errors" or ranks > 1)
    narrow = arguments in ((), *((7, dtype) for dtype in (torch.float32, torch.bfloat16)))
    return backend != "triton" or (ranks == RANKS and narrow)


def every(name):
    """(backend, number of ranks, case, its arguments) of all runs of a case."""
    return pytest.mark.parametrize(
        "run",
        [
            (backend, ranks, *case)
            for backend in BACKENDS
            for ranks in (1, 2, RANKS)
            for case in CASES
            if case[0] == name and runs(backend, ranks, *case)
        ],
        ids=lambda run: "-".join(map(str, run)),
    )


def backends():
    """Those that run here, "native" being the emulator while it is that one's turn."""
    for backend in BACKENDS:
        if backend == EMULATED:
            try:
                emulator.load().device(shared_per_sm=12 << 10)
            except emulator.Unavailable:
                continue
            native = schemas.NAMESPACE["native"], dispatch._MISSING["native"]
            schemas.NAMESPACE["native"], dispatch._MISSING["native"] = "ppo_kernels_emulated", None
            yield backend, "native"
            schemas.NAMESPACE["native"], dispatch._MISSING["native"] = native
        elif dispatch.why_not(backend, "cpu") is None:
            yield backend, backend


def run(folder, rank):
    """All cases on one of RANKS processes; what comes of them goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=300),
    )
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in (1, 2, RANKS)}
    results = {}
    for backend, name in backends():
        for ranks, group in groups.items():
            for case in CASES if rank < ranks else ():
                if runs(backend, ranks, *case):
                    result = getattr(Rank(group, ranks, name), case[0])(*case[1:])
                    results[(backend, ranks, *case)] = result
    torch.save(results, f"{folder}/rank-{rank}")
    dist.destroy_process_group()


def main(folder):
    """Forked, so that PyTorch and kernels are loaded once."""
    interpreter.prepare()
    for _ in backends():
        pass
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            try:
                run(folder, rank)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitpid(child, 0)[1] for child in children) != 0)


@pytest.fixture(scope="module")
def all_found(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.test_vocab_parallel", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank-{rank}") for rank in range(RANKS)]


@pytest.fixture
def found(run, all_found, request):
    """What the ranks of a run found."""
    backend, ranks, *_ = run
    if not any(backend == key[0] for key in all_found[0]):
        pytest.skip(f"{backend} cannot run here")
    request.node.user_properties.append(("backend", backend))
    return [x[run] for x in all_found[:ranks]]


def joined(results):
    """The results, bitwise the same on all ranks, and their slices of the gradient as one."""
    for other in results[1:]:
        for mine, others in zip(results[0]["same"], other["same"], strict=True):
            assert torch.equal(mine.nan_to_num(7), others.nan_to_num(7))
    return *results[0]["same"], torch.cat([x["grad"] for x in results], -1)


@every("scores")
def test_scores(run, found):
    *_, vocabulary, dtype = run
    results = joined(found)
    logits, _, tokens, (g, h, _) = rows(vocabulary, dtype)
    temperature = TEMPERATURES[vocabulary]
    own = torch.as_tensor(temperature).expand(8).double()[:, None]
    logprobs, entropy, grad_logprobs, grad_entropy = softmax_truth(logits, tokens, own)
    truth = logprobs, entropy, g[:, None] * grad_logprobs + h[:, None] * grad_entropy
    leaf = logits.clone().requires_grad_()
    whole = ppo_kernels.token_logprobs_and_entropy(
        leaf, tokens, temperature=temperature, backend="reference"
    )
    (whole.logprobs * g + whole.entropy * h).sum().backward()
    for result, eager, true in zip(
        results, (*(x.detach() for x in whole), leaf.grad), truth, strict=True
    ):
        assert result.dtype == eager.dtype
        assert_as_exact_as_eager(result, eager, true)
    assert (results[-1][logits == -torch.inf] == 0).all()


@every("kl")
def test_kl(run, found):
    *_, vocabulary, dtype = run
    kl, grad = joined(found)
    logits, ref_logits, _, (*_, g) = rows(vocabulary, dtype)
    leaf = logits.double().requires_grad_()
    truth = ppo_kernels.kl_divergence(
        leaf, ref_logits.double(), temperature=TEMPERATURES[vocabulary], backend="reference"
    )
    (truth * g).sum().backward()
    assert_as_exact_as_eager(kl, truth.detach().float(), truth.detach(), scale=kl.abs().max())
    assert_as_exact_as_eager(grad, leaf.grad.to(dtype), leaf.grad, scale=kl.abs().max())


@every("excluded")
def test_slices_without_probability(found):
    """Uniform over 4 or 7 tokens; NaN in one slice, and nothing in any, are not hidden."""
    logprobs, entropy, kl, _ = joined(found)
    four, seven, nan, inf = math.log(4), math.log(7), math.nan, math.inf
    truth = (
        [-four, -seven, -four, -inf, nan, nan, -four],
        [four, seven, four, four, nan, nan, four],
        [seven - four, inf, 0, seven - four, nan, nan, 0],
    )
    for result, true in zip((logprobs, entropy, kl), truth, strict=True):
        torch.testing.assert_close(result, torch.tensor(true), atol=1e-6, rtol=0, equal_nan=True)


@every("loss")
def test_loss(found):
    *fields, grad = joined(found)
    inputs = loss_of(7)
    truth, grad_truth = ppo_loss_truth(**inputs, **LOSS_OPTIONS)
    for name, field, true in zip(truth._fields, fields, truth, strict=True):
        torch.testing.assert_close(field.double(), true, atol=2e-6, rtol=2e-6, msg=name)
    torch.testing.assert_close(grad.double(), grad_truth, atol=1e-6, rtol=1e-5)
    assert (grad[~inputs["mask"]] == 0).all()


@every("head")
def test_gradient_of_a_sharded_head(found):
    loss, grad_hidden, grad_weight, _ = joined(
        [{"same": x["same"], "grad": x["grad"].T} for x in found]
    )
    hidden, weight = (x.requires_grad_() for x in head())
    logits = hidden @ weight.T
    inputs = loss_of(7) | {"logits": logits}
    truth = ppo_kernels.ppo_loss(**inputs, **LOSS_OPTIONS, backend="reference").loss
    kl = ppo_kernels.kl_divergence(logits, logits.detach() * 0.5, backend="reference")
    (truth + kl.sum()).backward()
    for result, true in zip(
        (loss, grad_hidden, grad_weight), (truth, hidden.grad, weight.grad), strict=True
    ):
        torch.testing.assert_close(result, true.detach(), atol=1e-12, rtol=1e-12)


@every("no_tokens")
def test_no_tokens(found):
    *fields, grad = joined(found)
    assert [x.sum().item() for x in fields] == [0] * 8
    assert grad.shape == (0, 7)


@every("errors")
def test_errors_come_to_all_ranks(run, found):
    messages = [x["messages"] for x in found]
    assert all(x == messages[0] for x in messages)
    one_slice = "ValueError: tokens must be in one rank's slice of the vocabulary, got"
    expected = {
        "unowned": f"{one_slice} 7 at [1, 2], which 0 have",
        "shared": f"{one_slice} 4 at [0, 0], which {run[1]} have",
        "unowned and counted": f"{one_slice} 8 at [0, 0], which 0 have",
        "impossible": "ValueError: tokens must have finite log-probability, got -inf for token 5",
        "differentiated twice": "RuntimeError: ppo_kernels ops can be differentiated once",
        "group twice": "ValueError: group must be left out with DTensor logits, which tell it, got",
        "start twice": "ValueError: vocab_start must be left out with DTensor logits, got 0",
        "other dimension": "ValueError: logits must be sharded on the last dimension of a 1-D mesh",
    }
    assert messages[0].keys() == expected.keys()
    for name, message in expected.items():
        assert messages[0][name].startswith(message)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(3, 5).int()}, TypeError, "logits must be float32"),
        ({"logits": torch.tensor(0.0)}, ValueError, r"logits must have shape \(\.\.\., V_local\)"),
        ({"tokens": torch.zeros(3)}, TypeError, "tokens must be an int64 or int32.*float32"),
        ({"tokens": torch.zeros(2).long()}, ValueError, r"tokens must have shape \(3,\)"),
        ({"vocab_start": None}, ValueError, "vocab_start must be given with plain logits.*None"),
        ({"vocab_start": 0.0}, TypeError, "vocab_start must be a whole number, got 0.0"),
        ({"vocab_start": -1}, ValueError, "vocab_start must be >= 0, got -1"),
        ({"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_are_named(arguments, error, message):
    """Before any rank waits for another: there is no process group here."""
    logits, tokens = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    good = {"logits": logits, "tokens": tokens, "vocab_start": 0} | arguments
    with pytest.raises(error, match=message):
        ppo_kernels.vocab_parallel_token_logprobs_and_entropy(**good)
    with pytest.raises(error, match=message):
        ppo_kernels.vocab_parallel_ppo_loss(
            **good, old_logprobs=torch.zeros(tokens.shape), advantages=torch.zeros(tokens.shape)
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"old_logprobs": torch.ones(2)}, ValueError, r"old_logprobs must have shape \(3,\)"),
        ({"advantages": None}, TypeError, "advantages must be a tensor, got NoneType"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be a bool tensor.*float32"),
        ({"clip_low": 2}, ValueError, "clip_low must be <= 1, got 2"),
        ({"entropy_coef": -1}, ValueError, "entropy_coef must be >= 0, got -1"),
        ({"kl_coef": 1}, ValueError, "ref_logprobs must be given when kl_coef > 0"),
        ({"kl_coef": -1}, ValueError, "kl_coef must be >= 0, got -1"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of k1, k2, k3, abs"),
        ({"ref_logprobs": torch.ones(2)}, ValueError, r"ref_logprobs must have shape \(3,\)"),
        ({"denominator": -1.0}, ValueError, "denominator must be >= 0, got -1.0"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_of_the_loss_are_named(arguments, error, message):
    good = {"logits": torch.zeros(3, 5), "tokens": torch.zeros(3).long(), "vocab_start": 0}
    good |= {"old_logprobs": torch.zeros(3), "advantages": torch.zeros(3)}
    with pytest.raises(error, match=message):
        ppo_kernels.vocab_parallel_ppo_loss(**good | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ref_logits": torch.zeros(3, 4)}, ValueError, r"ref_logits must have shape \(3, 5\)"),
        ({"ref_logits": torch.zeros(3, 5).half()}, TypeError, "ref_logits must have dtype .*16"),
        ({"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_of_the_kl_are_named(arguments, error, message):
    good = {"logits": torch.zeros(3, 5), "ref_logits": torch.zeros(3, 5)}
    with pytest.raises(error, match=message):
        ppo_kernels.vocab_parallel_kl_divergence(**good | arguments)


def test_a_token_of_no_rank_or_two_is_nan():
    """What says it on a GPU, where nothing raises; the states are of logits 0 on 2 and 3 tokens."""
    two, three = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    has, has_not = torch.tensor([0.0]), torch.tensor([math.inf])
    for owners in ((has_not, has_not), (has, has_not), (has, has)):
        states = torch.stack([torch.cat(x) for x in zip((two, three), owners, strict=True)])
        logprob, entropy, *_ = softmax_state.merged(states, 1.0)
        expected = -math.log(5) if owners[0] is not owners[1] else math.nan
        assert logprob.item() == pytest.approx(expected, nan_ok=True)
        assert entropy.item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("ids", (torch.int64, torch.int32))
@pytest.mark.parametrize("vocabulary", (11, 600))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_token_elsewhere_leaves_the_gradient_of_the_probabilities(fused, vocabulary, ids, dtype):
    """(-g p_j - h p_j (log p_j + H)) / τ, and no other row changes."""
    logits = (2 * torch.randn(3, vocabulary)).to(dtype)
    tokens = torch.tensor([1, 2, 3], dtype=ids)
    upstream, numbers = torch.randn(2, 3), dispatch.scalars(0.7)
    op = dispatch.kernels(fused)
    _, entropy, stats = op.token_logprobs(logits, tokens, None, None, numbers)
    rest = entropy, stats, None, numbers
    here = op.token_logprobs_backward(*upstream, logits, tokens, *rest)
    tokens[1] = schemas.ELSEWHERE
    result = op.token_logprobs_backward(*upstream, logits, tokens, *rest)
    assert torch.equal(result[[0, 2]], here[[0, 2]])
    log_p = log_softmax_truth(logits[1], 0.7)
    p, h = log_p.exp(), -(log_p.exp() * log_p).sum()
    truth = -p * (upstream[0, 1] + upstream[1, 1] * (log_p + h)) / 0.7
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(result[1].double(), truth, atol=tolerance, rtol=tolerance)


if __name__ == "__main__":
    main(sys.argv[1])
