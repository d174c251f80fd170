"""The CUDA kernels on other devices, and in other orders of threads, than those that the tests of
the ops run them on: `tests.emulator` has the device and the order."""

import pytest
import torch

from ppo_kernels import (
    dispatch,
    gae,
    gae_packed,
    kl_divergence,
    masked_mean,
    masked_whiten,
    ppo_loss,
    ppo_loss_,
    sample_tokens,
    schemas,
    token_logprobs_and_entropy,
)
from ppo_kernels.__main__ import divisions
from tests.conftest import (
    DTYPES,
    assert_as_exact_as_eager,
    awkward_rows,
    likeliest,
    loss_inputs,
    ppo_loss_truth,
    run_ppo_loss,
    softmax_truth,
)
from tests.test_registered_ops import _samples

# Name -> device, the parts that rows of 4100 fp32 numbers are split into, and whether these are
# copied on chip in bulk; if not, and in one part, they may also be read twice.
DEVICES = {
    "H200": ({}, 1, True),
    "H200, code for sm_80": ({"ptx": 80}, 1, False),
    "small": ({"shared_per_sm": 28 << 10}, 4, True),
    "smaller": ({"shared_per_sm": 14 << 10}, 8, True),
    "tiny": ({"shared_per_sm": 6 << 10}, 1, False),
    "small, room for clusters of two": ({"shared_per_sm": 28 << 10, "cluster": 2}, 2, True),
    "small, no room for clusters": ({"shared_per_sm": 28 << 10, "cluster": 1}, 1, False),
    "A100": ({"major": 8, "shared_per_block": 163 << 10, "shared_per_sm": 164 << 10}, 1, False),
    "small, without clusters": ({"major": 8, "shared_per_sm": 28 << 10}, 1, False),
}
VOCABULARIES = (7, 520, 4099, 4100, 4104)
SEEDS = range(1, 6)


def losses(vocabulary, dtype):
    """Awkward rows, one masked out, one with nothing to gain."""
    logits = awkward_rows(vocabulary).to(dtype)
    tokens = likeliest(logits)
    mask, advantages = torch.ones(len(logits), dtype=torch.bool), torch.randn(len(logits))
    mask[3], advantages[5] = False, 0
    logprobs = softmax_truth(logits, tokens, 0.7)[0]
    real = schemas.result_dtype(logits)  # fp64 beside fp32 would give fp64 results.
    return {
        "logits": logits,
        "tokens": tokens,
        "old_logprobs": (logprobs + 0.2).to(real),
        "advantages": advantages,
        "mask": mask,
        "ref_logprobs": (logprobs - 0.1).to(real),
        "entropy_coef": 0.1,
        "kl_coef": 0.2,
        "temperature": 0.7,
        "denominator": 1,
    }


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_way_to_keep_a_row(emulated, device, dtype, vocabulary):
    inputs = losses(vocabulary, dtype)
    truth, grad_truth = ppo_loss_truth(**inputs)
    eager, eager_grad = run_ppo_loss(ppo_loss_, inputs, backend="reference")
    emulated.device(**DEVICES[device][0])
    result, grad = run_ppo_loss(ppo_loss_, inputs, backend="native")
    assert_as_exact_as_eager(grad, eager_grad, grad_truth)
    for ours, theirs, true in zip(result, eager, truth, strict=True):
        assert_as_exact_as_eager(ours, theirs, true, scale=15)
    beside, grad_beside = run_ppo_loss(ppo_loss, inputs, backend="native")
    assert grad_beside.equal(grad)
    alone = ppo_loss(**inputs, backend="native")
    for other in (beside, alone):
        assert all(torch.equal(x, y) for x, y in zip(other, result, strict=True))
    scored = inputs["logits"], inputs["tokens"]
    scores = token_logprobs_and_entropy(*scored, temperature=0.7, backend="native")
    for x, y in zip(scores, (result.logprobs, result.token_entropy), strict=True):
        assert torch.equal(x[inputs["mask"]], y[inputs["mask"]])
    if dtype == torch.float32 and vocabulary in (4099, 4100):
        assert emulated.largest_cluster() == DEVICES[device][1]
        assert (emulated.bulk_copies() > 0) == DEVICES[device][2]


@pytest.mark.parametrize("device", DEVICES)
def test_kl_divergence_of_rows_in_parts(emulated, device):
    """As many as for the log-probabilities, merged in one order."""
    pair = awkward_rows(4100).float(), torch.randn(4100).expand(16, 4100)
    truth = kl_divergence(*(x.double() for x in pair), backend="reference")
    emulated.device(**DEVICES[device][0])
    result = kl_divergence(*pair, backend="native")
    assert_as_exact_as_eager(result, kl_divergence(*pair, backend="reference"), truth)
    assert emulated.largest_cluster() == DEVICES[device][1]
    for seed in SEEDS:
        emulated.seed(seed)
        assert torch.equal(kl_divergence(*pair, backend="native"), result)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "parts"),
    [
        (50257, torch.bfloat16, 2),
        (128256, torch.bfloat16, 4),
        (151936, torch.bfloat16, 4),
        (262144, torch.bfloat16, 8),
        (151936, torch.float32, 8),
    ],
)
def test_parts_of_real_vocabularies_on_an_h200(emulated, vocabulary, dtype, parts):
    inputs = loss_inputs(1, 3, vocabulary, dtype)
    truth, grad_truth = ppo_loss_truth(**inputs)
    eager, eager_grad = run_ppo_loss(ppo_loss_, inputs, backend="reference")
    emulated.device()
    result, grad = run_ppo_loss(ppo_loss_, inputs, backend="native")
    assert_as_exact_as_eager(grad, eager_grad, grad_truth)
    for ours, theirs, true in zip(result, eager, truth, strict=True):
        assert_as_exact_as_eager(ours, theirs, true, scale=15)
    assert emulated.largest_cluster() == parts


def test_a_device_is_asked_once(emulated):
    """Of devices in turns, each with a kernel that must be granted shared memory there."""
    devices = {"shared_per_block": 200_000}, {"shared_per_block": 201_000}
    inputs = loss_inputs(1, 1, 18_000)

    def questions(device):
        emulated.device(**device)
        before = emulated.questions()
        ppo_loss_(**(inputs | {"logits": inputs["logits"].clone()}), backend="native")
        return emulated.questions() - before

    assert all(questions(device) > 0 for device in devices)
    assert [questions(device) for device in devices] == [0, 0]


def test_report_says_how_rows_are_divided(emulated):
    emulated.device()
    assert [x.removeprefix("rows        V = ") for x in divisions("cpu")[:4]] == [
        "32,000 bfloat16: 1 CTA of 512 threads, kept in 64,832 bytes each; 3 to a multiprocessor",
        "50,257 bfloat16: 2 CTAs of 256 threads, kept in 51,120 bytes each; 4 to a multiprocessor, "
        "1 rows on the device",
        "128,256 bfloat16: 4 CTAs of 512 threads, kept in 64,960 bytes each; 3 to a "
        "multiprocessor, 1 rows on the device",
        "151,936 bfloat16: 4 CTAs of 512 threads, kept in 76,800 bytes each; 3 to a "
        "multiprocessor, 1 rows on the device",
    ]
    for cluster in (1, 0):
        emulated.device(cluster=cluster)
        assert "V = 151,936 float32: 1 CTA of 512 threads, read twice" in divisions("cpu")[-1]


def test_three_parts_of_151936_fill_shared_memory_to_the_byte(emulated):
    emulated.device()
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.empty(0, 151_936, dtype=dtype)
        _, _, shared, _, resident, _ = dispatch.kernels("native").row_division(logits)
        assert resident * (shared + 1024) == 3 * (shared + 1024) == 228 << 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_bits_depend_on_no_order_and_no_alignment(emulated, device, dtype):
    inputs = losses(4104, dtype)
    emulated.device(**DEVICES[device][0])
    first = run_ppo_loss(ppo_loss_, inputs, backend="native")
    for seed in SEEDS:
        emulated.seed(seed)
        apart = torch.empty(len(inputs["logits"]), 4104 + seed, dtype=dtype)[:, :4104]
        leaf = apart.copy_(inputs["logits"])
        result = ppo_loss_(**(inputs | {"logits": leaf}), backend="native")
        assert torch.equal(leaf, first[1])
        assert all(torch.equal(x, y) for x, y in zip(result, first[0], strict=True))


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_no_op_depends_on_the_order_of_threads(emulated, name):
    op = getattr(torch.ops.ppo_kernels_emulated, name)

    def run():
        results = []
        for arguments in _samples("native")[name]:
            returned = op(*arguments)
            # Of an op in place, what it wrote.
            tensors = returned if isinstance(returned, tuple) else (returned,)
            results += [x for x in (*tensors, arguments[0]) if x is not None]
        return results

    first = run()
    for seed in SEEDS:
        emulated.seed(seed)
        for x, y in zip(run(), first, strict=True):
            assert torch.equal(x, y)


def test_sums_over_all_warps_of_several_blocks(emulated):
    x, mask = 3 + torch.randn(5000, dtype=torch.float64), torch.rand(5000) < 0.7
    counted = x[mask]
    scale = counted.var(correction=0).add(1e-8).rsqrt()
    whitened = torch.where(mask, (x - counted.mean()) * scale, 0.0)
    for seed in SEEDS:
        emulated.seed(seed)
        torch.testing.assert_close(masked_mean(x, mask, backend="native"), counted.mean())
        torch.testing.assert_close(masked_whiten(x, mask, backend="native"), whitened)


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.01}],
    ids=lambda x: "".join(x) or "none",
)
def test_draws_from_several_segments(emulated, filters):
    logits, uniforms = 3 * torch.randn(2, 4099), torch.tensor([0.3, 0.95])
    expected = sample_tokens(logits, uniforms, **filters, backend="reference")
    for seed in SEEDS:
        emulated.seed(seed)
        result = sample_tokens(logits, uniforms, **filters, backend="native")
        assert torch.equal(result.tokens, expected.tokens)
        torch.testing.assert_close(result.logprobs, expected.logprobs)


def test_greedy_draws_of_the_only_token(emulated):
    """Of a filtered row in which one warp alone finds a weight, and then none above the cut."""
    logits = torch.full((30, 2050), -torch.inf).index_fill(1, torch.tensor([200]), 1.0)
    for seed in SEEDS:
        emulated.seed(seed)
        result = sample_tokens(
            logits, torch.rand(30), temperature=0.0, min_p=0.01, backend="native"
        )
        assert (result.tokens == 200).all() and (result.logprobs == 0).all()


def test_chunks_of_a_trajectory_find_each_other(emulated):
    """Rows of many chunks, of which few run at once."""
    rewards, values = torch.randn(2, 2, 11_001, dtype=torch.float64)
    mask, dones = torch.rand(2, 2, 11_001) < torch.tensor([0.9, 1e-4])[:, None, None]
    bounds = torch.tensor([0, 0, 513, 9000, 9000, 9001, 22_002, 22_002])
    decay = {"gamma": 0.999, "lam": 0.97}

    def run(backend):
        flat = (x.flatten() for x in (rewards, values))
        masks = {"mask": mask.flatten(), "dones": dones.flatten()}
        return [
            *gae(rewards, values, mask, dones=dones, **decay, backend=backend),
            *gae_packed(*flat, bounds, **masks, **decay, backend=backend),
        ]

    expected = run("reference")
    for seed in SEEDS:
        emulated.seed(seed)
        torch.testing.assert_close(run("native"), expected)
