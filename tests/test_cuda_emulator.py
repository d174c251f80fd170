"""The emulator of CUDA: right kernels are right in every order of threads, wrong ones are found."""

import ctypes
import re

import pytest
import torch

from tests import emulator
from tests.emulator import mutations

SEEDS = range(20)
# As in tests/emulator/samples.cu.
FAULTS = [
    "none",
    "no_barrier_after_write",
    "no_barrier_before_reuse",
    "too_little_shared_memory",
    "divergent_shuffle",
    "exited_lane",
    "no_first_cluster_barrier",
    "no_second_cluster_barrier",
    "no_last_cluster_barrier",
    "no_fence_cluster",
    "wait_after_read",
    "nobody_waits",
    "no_barriers_ready",
    "no_barrier_init",
    "no_syncthreads_after_init",
    "misaligned_copy",
    "order_of_blocks",
    "flag_before_value",
    "no_wait_for_flag",
    "plain_flag",
    "some_do_not_come",
    "trap",
    "misaligned_access",
]


class Samples(emulator.Emulator):
    """Each sample gives (right, message): whether its result is, and what went wrong or None."""

    def _call(self, name, *arguments):
        arguments = [ctypes.c_void_p(x.data_ptr()) if torch.is_tensor(x) else x for x in arguments]
        function = getattr(self.library, f"sample_{name}")
        function.restype = ctypes.c_char_p
        message = function(*arguments)
        return message and message.decode()

    def reduce(self, fault="none", blocks=3, threads=128):
        x, out = numbers(blocks, 2, threads), torch.zeros(blocks, threads)
        message = self._call("reduce", x, out, blocks, threads, FAULTS.index(fault))
        return bool((out == x.sum((1, 2))[:, None]).all()), message

    def exchange(self, fault="none", blocks=12, threads=64):
        x, out = numbers(blocks // 4, 4, threads), torch.zeros(blocks // 4, 4, threads)
        message = self._call("exchange", x, out, blocks, threads, FAULTS.index(fault))
        return torch.equal(out, x.roll(1, 1) + x.roll(-1, 1)), message

    def copy(self, fault="none", blocks=5, threads=64):
        x, out = numbers(blocks, threads), torch.zeros(blocks, threads)
        message = self._call("copy", x, out, blocks, threads, FAULTS.index(fault))
        return torch.equal(out, x), message

    def chain(self, fault="none", blocks=20, threads=32):
        x, out = numbers(blocks), torch.zeros(blocks)
        state = torch.zeros(1 + blocks, dtype=torch.int32)
        message = self._call("chain", x, out, state, blocks, threads, FAULTS.index(fault))
        return torch.equal(out, x.cumsum(0)), message

    def vectors(self, fault="none"):
        x, out = numbers(33, 4), torch.zeros(32, 4)
        message = self._call("vectors", x, out, FAULTS.index(fault))
        return torch.equal(out, x[:32]), message

    def shuffles(self, x, width):
        out = torch.zeros(5, 64, dtype=torch.int64)
        assert self._call("shuffles", x, out, width) is None
        return out

    def meet(self, blocks=1, threads=32, cluster=1, shared=0, times=1):
        return self._call("meet", blocks, threads, cluster, ctypes.c_size_t(shared), times)


def numbers(*shape):
    """Small integers, whose sums are exact in any order."""
    return torch.randint(1, 9, shape, dtype=torch.float32)


@pytest.fixture(scope="module")
def library():
    try:
        path = emulator.build([emulator.HERE / "samples.cu"], "samples")
    except emulator.Unavailable as error:
        pytest.skip(str(error))
    return Samples(path)


@pytest.fixture
def samples(library):
    yield library
    library.device()


@pytest.mark.parametrize("name", ["reduce", "exchange", "copy", "chain", "vectors"])
def test_right_in_every_order(samples, name):
    for seed in SEEDS:
        samples.seed(seed)
        assert getattr(samples, name)() == (True, None), seed


@pytest.mark.parametrize(
    "name, fault",
    [
        ("reduce", "no_barrier_after_write"),
        ("reduce", "no_barrier_before_reuse"),
        ("exchange", "no_second_cluster_barrier"),
        ("copy", "wait_after_read"),
        ("chain", "flag_before_value"),
        ("chain", "no_wait_for_flag"),
    ],
)
def test_wrong_result_in_some_order(samples, name, fault):
    results = []
    for seed in SEEDS:
        samples.seed(seed)
        results.append(getattr(samples, name)(fault))
    assert (False, None) in results


@pytest.mark.parametrize(
    "name, fault, message",
    [
        ("reduce", "trap", "__trap()"),
        ("reduce", "too_little_shared_memory", "beyond its 12 bytes of shared memory"),
        ("reduce", "divergent_shuffle", "divergent warp"),
        ("reduce", "some_do_not_come", "deadlock"),
        ("exchange", "no_first_cluster_barrier", "may not have started"),
        ("exchange", "no_fence_cluster", "without fence_cluster"),
        ("copy", "nobody_waits", "nobody has waited"),
        ("copy", "no_barriers_ready", "before barriers_ready"),
        ("copy", "no_barrier_init", "uninitialised barrier"),
        ("copy", "misaligned_copy", "misaligned bulk_copy"),
        ("vectors", "misaligned_access", "misaligned address in"),
    ],
)
def test_found_in_every_order(samples, name, fault, message):
    for seed in SEEDS:
        samples.seed(seed)
        got = getattr(samples, name)(fault)[1]
        assert got is not None and message in got
        assert getattr(samples, name)() == (True, None), "not usable after an error"


@pytest.mark.parametrize(
    "name, fault, messages",
    [
        ("reduce", "exited_lane", {"exits", "have exited"}),
        ("exchange", "no_last_cluster_barrier", {"has exited"}),
        ("copy", "no_syncthreads_after_init", {"uninitialised barrier"}),
        ("chain", "order_of_blocks", {"deadlock"}),
        ("chain", "plain_flag", {"not set by store_release"}),
    ],
)
def test_found_in_some_order(samples, name, fault, messages):
    found = []
    for seed in SEEDS:
        samples.seed(seed)
        found.append(getattr(samples, name)(fault)[1])
    assert any(found)
    assert all(any(x in text for x in messages) for text in found if text)


def test_what_is_left_out_does_nothing(samples):
    lines = (emulator.HERE / "samples.cu").read_text().splitlines()
    place = 1 + next(i for i, x in enumerate(lines) if "no_barrier_after_write) __sync" in x)
    samples.leave_out(f"samples.cu:{place}")
    results = []
    for seed in SEEDS:
        samples.seed(seed)
        results.append(samples.reduce())
    assert (False, None) in results and samples.left_out() > 0
    samples.leave_out(None)
    assert samples.reduce() == (True, None) and samples.left_out() == 0


def test_mutations_know_what_synchronises():
    assert mutations.unknown() == set()


def test_an_error_says_who_and_where(samples):
    message = samples.reduce("trap", blocks=1)[1]
    place = r"block \(0, 0, 0\), thread \(\d+, 0, 0\), at .*samples\.cu:\d+ \(.*reduce\("
    assert re.search(place, message)


@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(samples, width):
    x = torch.randint(-(2**60), 2**60, (64,))
    shuffled, xor, up, down, ballot = samples.shuffles(x, width)
    for i in range(64):
        warp, lane = x[i // 32 * 32 :][:32], i % 32
        first = lane // width * width
        last = first + width - 1
        assert shuffled[i] == warp[first + (i + 1) % width]
        assert xor[i] == warp[lane if lane ^ 5 > last else lane ^ 5]
        assert up[i] == warp[lane if lane - 3 < first else lane - 3]
        assert down[i] == warp[lane if lane + 3 > last else lane + 3]
        assert ballot[i] == sum(int(y > 0) << j for j, y in enumerate(warp))


def test_a_seed_repeats_the_order(samples):
    def switches(seed):
        before = samples.switches()
        samples.seed(seed)
        samples.chain()
        return samples.switches() - before

    assert switches(3) == switches(3)
    assert len({switches(seed) for seed in SEEDS}) > 1


def test_limits_of_a_launch(samples):
    launches = samples.launches()
    assert samples.meet(threads=1024, shared=48 << 10, cluster=8, blocks=8) is None
    assert samples.launches() == launches + 1 and samples.last_cluster() == 8
    assert samples.meet() is None
    assert samples.last_cluster() == 1 and samples.largest_cluster() == 8
    assert samples.meet(threads=1025) == "invalid configuration argument"
    assert samples.meet(cluster=16, blocks=16) == "invalid configuration argument"
    assert samples.meet(cluster=2, blocks=3) == "invalid configuration argument"
    # More would have to be asked for with cudaFuncSetAttribute.
    assert samples.meet(shared=(48 << 10) + 1) == "invalid argument"
    samples.device(8, 101376, 102400)
    assert samples.meet(cluster=2, blocks=2) == "invalid configuration argument"
    assert "compute capability 9.0" in samples.copy()[1]
    assert samples.launches() == launches + 3
    assert samples.largest_cluster() == 1
