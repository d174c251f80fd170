"""gae, gae_packed and discounted_sums; formulas in ppo_kernels/gae.py.

All that a token hands to those before it is one number, G = γ V + γ λ A, so that tokens in a row
are a map of the G that comes to them, g + c G, and maps compose. A row is cut into chunks of CHUNK
tokens, counted from its own begin. A lane walks VEC tokens, the lanes of a chunk compose their maps
in a scan, and the chunks of a longer row leave theirs in memory for the chunks before them.
"""

import torch
import triton
import triton.language as tl

from ppo_kernels._triton import math
from ppo_kernels._triton.common import implement, kernel, launch, per_token
from ppo_kernels.schemas import result_dtype

# Tokens to a lane: 16 bytes of fp32.
VEC = tl.constexpr(4)
# Tokens to a program: a chunk of a row, or several rows of one chunk each.
_PROGRAM = 2048
_CHUNKS = (32, 128, 512, 2048)
# Of rows laid end to end only the device knows the lengths.
_PACKED_CHUNK = 512
_VECTORS = ("rewards_ptr", "values_ptr", "mask_ptr", "dones_ptr")


@triton.jit
def _compose_both(later_g, later_c, later_rest_g, later_rest_c, g, c, rest_g, rest_c):
    """`math.compose_maps`, and the same for the map of all tokens but those of the first lane."""
    rest_g, rest_c = math.compose_maps(later_g, later_c, rest_g, rest_c)
    g, c = math.compose_maps(later_g, later_c, g, c)
    return g, c, rest_g, rest_c


@triton.jit
def _boundary(cu_seqlens_ptr, i, total):
    """cu_seqlens[i], moved into [0, total] if it is wrong."""
    boundary = tl.load(cu_seqlens_ptr + i).to(tl.int64)
    return tl.minimum(tl.maximum(boundary, 0), total)


@triton.jit
def _locate(cu_seqlens_ptr, batch, length, steps, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The chunk of this program: (slot, row, chunk, first, left), of several rows the first.

    slot: where the chunk's map is kept, that of the row's next chunk following it.
    chunk: its number in its row.
    first: its first token, counted from the row's begin, or from the first trajectory's.
    left: tokens from there to the end of the row; not above 0 for a chunk that does not exist.

    Trajectory i has the slots from cu_seqlens[i] // CHUNK + i to the like number of i + 1, which
    are enough for its chunks wherever it lies. `steps` halvings find the trajectory of a slot.
    """
    slot = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is None:
        chunks = tl.cdiv(length, CHUNK)
        row = slot // chunks * ROWS
        chunk = slot % chunks
        first = chunk * CHUNK
        left = length - first
    else:
        row = tl.zeros((), tl.int64)
        beyond = batch
        for _ in range(steps):
            middle = (row + beyond) // 2
            before = _boundary(cu_seqlens_ptr, middle, length) // CHUNK + middle <= slot
            row = tl.where(before, middle, row)
            beyond = tl.where(before, beyond, middle)
        begin = _boundary(cu_seqlens_ptr, row, length)
        chunk = slot - (begin // CHUNK + row)
        first = begin + chunk * CHUNK
        left = tl.where(chunk < 0, 0, _boundary(cu_seqlens_ptr, row + 1, length) - first)
    return slot, row, chunk, first, left


@triton.jit
def _block(row, left, batch, ROWS: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """Row (lanes, 1) and token (lanes, VEC) in its chunk, and whether they exist.

    The first lane of a chunk has its latest tokens, so that a scan goes back in time.
    """
    LANES: tl.constexpr = CHUNK // VEC
    index = tl.arange(0, ROWS * LANES)[:, None]
    row += index // LANES
    t = (LANES - 1 - index % LANES) * VEC + tl.arange(0, VEC)[None, :]
    left = tl.minimum(tl.maximum(left, 0), CHUNK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, VEC)
    return row, t, (t < left) & (row < batch)


@triton.jit
def _at(row, stride, first, t, ALIGNED: tl.constexpr):
    start = row * stride + first
    if ALIGNED:
        start = tl.multiple_of(start, [VEC, VEC])
    return start + t


@triton.jit
def _columns(x):
    """(lanes, VEC) -> VEC times (lanes,)."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _from_columns(x):
    even, odd = tl.join(x[0], x[2]), tl.join(x[1], x[3])
    return tl.reshape(tl.join(even, odd), (x[0].shape[0], VEC))


@triton.jit
def _load(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    dones_ptr,
    rewards_stride,
    values_stride,
    mask_stride,
    dones_stride,
    row,
    first,
    t,
    inside,
    R: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Columns of (rewards, values, counted, done)."""
    rewards = tl.load(
        rewards_ptr + _at(row, rewards_stride, first, t, ALIGNED), mask=inside, other=0.0
    )
    values = tl.load(
        values_ptr + _at(row, values_stride, first, t, ALIGNED), mask=inside, other=0.0
    )
    counted = inside
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + _at(row, mask_stride, first, t, ALIGNED), mask=inside, other=0)
        counted = mask != 0
    done = tl.zeros(inside.shape, tl.int1)
    if dones_ptr is not None:
        dones = tl.load(dones_ptr + _at(row, dones_stride, first, t, ALIGNED), mask=inside, other=0)
        done = dones != 0
    return _columns(rewards.to(R)), _columns(values.to(R)), _columns(counted), _columns(done)


@triton.jit
def _step(rewards, values, counted, done, j: tl.constexpr, G, gamma, gamma_lam, SUMS: tl.constexpr):
    """(result, G) at token j; of sums the `values` are the decays."""
    if SUMS:
        return math.sum_step(rewards[j], values[j], counted[j], done[j], G)
    return math.gae_step(rewards[j], values[j], counted[j], done[j], G, gamma, gamma_lam)


@triton.jit
def _scan(rewards, values, counted, done, gamma, gamma_lam, ROWS: tl.constexpr, SUMS: tl.constexpr):
    """(g, c, rest_g, rest_c) (lanes,): the map of the tokens from a lane's first to the chunk's
    last, and of those after the lane's."""
    g = tl.zeros_like(rewards[0])
    c = g + 1.0
    for j in tl.static_range(VEC - 1, -1, -1):
        _, g = _step(rewards, values, counted, done, j, g, gamma, gamma_lam, SUMS)
        decay = values[j] if SUMS else gamma_lam
        c = tl.where(done[j], math.CUT, tl.where(counted[j], decay * c, c))
    LANES: tl.constexpr = g.shape[0]
    g = tl.reshape(g, (ROWS, LANES // ROWS))
    c = tl.reshape(c, (ROWS, LANES // ROWS))
    nothing = tl.zeros_like(g)
    g, c, rest_g, rest_c = tl.associative_scan((g, c, nothing, nothing + 1.0), 1, _compose_both)
    return (
        tl.reshape(g, (LANES,)),
        tl.reshape(c, (LANES,)),
        tl.reshape(rest_g, (LANES,)),
        tl.reshape(rest_c, (LANES,)),
    )


@triton.jit
def _last(x):
    """(n,) -> x[n - 1]."""
    last = tl.arange(0, x.shape[0]) == x.shape[0] - 1
    return tl.sum(tl.where(last, x, 0.0), axis=0)


@kernel(*_VECTORS)
def _maps(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    dones_ptr,
    cu_seqlens_ptr,
    maps_ptr,
    rewards_stride: tl.int64,
    values_stride: tl.int64,
    mask_stride: tl.int64,
    dones_stride: tl.int64,
    batch: tl.int64,
    length: tl.int64,
    steps: tl.int32,
    gamma: tl.float64,
    gamma_lam: tl.float64,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    SUMS: tl.constexpr,
):
    """The map (slots, 2) of every chunk but the first ones of the rows."""
    R: tl.constexpr = maps_ptr.dtype.element_ty
    gamma, gamma_lam = math.number(gamma, R), math.number(gamma_lam, R)
    slot, row, chunk, first, left = _locate(cu_seqlens_ptr, batch, length, steps, ROWS, CHUNK)
    if (chunk > 0) & (left > 0):
        rows, t, inside = _block(row, left, batch, ROWS, CHUNK, ALIGNED)
        rewards, values, counted, done = _load(
            rewards_ptr,
            values_ptr,
            mask_ptr,
            dones_ptr,
            rewards_stride,
            values_stride,
            mask_stride,
            dones_stride,
            rows,
            first,
            t,
            inside,
            R,
            ALIGNED,
        )
        g, c, _, _ = _scan(rewards, values, counted, done, gamma, gamma_lam, ROWS, SUMS)
        tl.store(maps_ptr + 2 * slot, _last(g))
        tl.store(maps_ptr + 2 * slot + 1, _last(c))


@triton.jit
def _carry(maps_ptr, slot, later, BLOCK: tl.constexpr):
    """The map of the `later` chunks of a row that follow the one of this slot."""
    carry_g = tl.zeros((), maps_ptr.dtype.element_ty)
    carry_c = carry_g + 1.0
    index = tl.arange(0, BLOCK)
    blocks = tl.cdiv(later, BLOCK)
    for i in range(blocks):
        ahead = (blocks - i) * BLOCK - index
        there = ahead <= later
        g = tl.load(maps_ptr + 2 * (slot + ahead), mask=there, other=0.0)
        c = tl.load(maps_ptr + 2 * (slot + ahead) + 1, mask=there, other=1.0)
        g, c = tl.associative_scan((g, c), 0, math.compose_maps)
        carry_g, carry_c = math.compose_maps(carry_g, carry_c, _last(g), _last(c))
    return carry_g, carry_c


@kernel(*_VECTORS, "advantages_ptr", "returns_ptr")
def _advantages(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    dones_ptr,
    cu_seqlens_ptr,
    maps_ptr,
    rewards_stride: tl.int64,
    values_stride: tl.int64,
    mask_stride: tl.int64,
    dones_stride: tl.int64,
    batch: tl.int64,
    length: tl.int64,
    steps: tl.int32,
    gamma: tl.float64,
    gamma_lam: tl.float64,
    bootstrap_ptr,
    advantages_ptr,
    returns_ptr,
    stride: tl.int64,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    SUMS: tl.constexpr,
):
    R: tl.constexpr = advantages_ptr.dtype.element_ty
    gamma, gamma_lam = math.number(gamma, R), math.number(gamma_lam, R)
    slot, row, _, first, left = _locate(cu_seqlens_ptr, batch, length, steps, ROWS, CHUNK)
    rows, t, inside = _block(row, left, batch, ROWS, CHUNK, ALIGNED)
    rewards, values, counted, done = _load(
        rewards_ptr,
        values_ptr,
        mask_ptr,
        dones_ptr,
        rewards_stride,
        values_stride,
        mask_stride,
        dones_stride,
        rows,
        first,
        t,
        inside,
        R,
        ALIGNED,
    )
    G = tl.zeros_like(rewards[0])
    if bootstrap_ptr is not None:
        bootstrap = tl.load(bootstrap_ptr + rows, mask=rows < batch, other=0.0).to(R)
        G = tl.reshape(gamma * bootstrap, G.shape)
    if maps_ptr is not None:
        carry_g, carry_c = _carry(maps_ptr, slot, tl.cdiv(left, CHUNK) - 1, 64)
        G = math.apply_map(carry_g, carry_c, G)
    _, _, rest_g, rest_c = _scan(rewards, values, counted, done, gamma, gamma_lam, ROWS, SUMS)
    G = math.apply_map(rest_g, rest_c, G)
    a3, G = _step(rewards, values, counted, done, 3, G, gamma, gamma_lam, SUMS)
    a2, G = _step(rewards, values, counted, done, 2, G, gamma, gamma_lam, SUMS)
    a1, G = _step(rewards, values, counted, done, 1, G, gamma, gamma_lam, SUMS)
    a0, _ = _step(rewards, values, counted, done, 0, G, gamma, gamma_lam, SUMS)
    r0 = tl.where(counted[0], a0 + values[0], 0.0)
    r1 = tl.where(counted[1], a1 + values[1], 0.0)
    r2 = tl.where(counted[2], a2 + values[2], 0.0)
    r3 = tl.where(counted[3], a3 + values[3], 0.0)
    out = _at(rows, stride, first, t, ALIGNED)
    tl.store(advantages_ptr + out, _from_columns((a0, a1, a2, a3)), mask=inside)
    if not SUMS:
        tl.store(returns_ptr + out, _from_columns((r0, r1, r2, r3)), mask=inside)


def _unit_stride(x):
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _run(inputs, strides, cu_seqlens, bootstrap_values, scalars, batch, length, slots, **options):
    """Both results, for `inputs` (rewards, values, mask, dones); `strides` those of their rows and
    of the results'. Without scalars discounted sums with decays for values, and one result."""
    sums = scalars is None
    gamma, lam = (0.0, 0.0) if sums else scalars.tolist()
    rewards, values, *_ = inputs
    dtype = result_dtype(rewards, values)
    advantages = rewards.new_empty(rewards.shape, dtype=dtype)
    returns = None if sums else torch.empty_like(advantages)
    options["SUMS"] = sums
    one_chunk = cu_seqlens is None and length <= options["CHUNK"]
    maps = None if one_chunk else rewards.new_empty((slots, 2), dtype=dtype)
    arguments = (*inputs, per_token(cu_seqlens), maps, *strides[:4])
    arguments += (batch, length, batch.bit_length(), gamma, gamma * lam)
    results = per_token(bootstrap_values), advantages, returns, strides[4]
    if maps is not None:
        launch(_maps, slots, *arguments, **options)
    launch(_advantages, triton.cdiv(slots, options["ROWS"]), *arguments, *results, **options)
    return advantages, returns


def _scan_rows(rewards, values, mask, dones, bootstrap_values, scalars):
    batch, length = rewards.shape
    inputs = [_unit_stride(x) for x in (rewards, values, mask, dones)]
    strides = [0 if x is None else x.stride(0) for x in inputs] + [length]
    chunk = next((chunk for chunk in _CHUNKS if length <= chunk), _PROGRAM)
    return _run(
        inputs,
        strides,
        None,
        bootstrap_values,
        scalars,
        batch,
        length,
        slots=batch * triton.cdiv(length, chunk),
        ROWS=_PROGRAM // chunk,
        CHUNK=chunk,
        ALIGNED=all(stride % VEC.value == 0 for stride in strides),
        num_warps=8,
    )


def _scan_packed(rewards, values, cu_seqlens, mask, dones, bootstrap_values, scalars):
    """Looks at no value of `cu_seqlens`, which would wait for the device: where it does not rise
    from 0 to N the results are undefined, but nothing outside them is read or written."""
    batch, length = cu_seqlens.shape[0] - 1, rewards.shape[0]
    if batch == 0 and length > 0:
        raise ValueError(
            f"cu_seqlens must rise from 0 to {length}, the length of rewards, got one boundary"
        )
    return _run(
        [_unit_stride(x) for x in (rewards, values, mask, dones)],
        [0] * 5,
        cu_seqlens,
        bootstrap_values,
        scalars,
        batch,
        length,
        slots=length // _PACKED_CHUNK + batch if length > 0 else 0,
        ROWS=1,
        CHUNK=_PACKED_CHUNK,
        ALIGNED=False,
        num_warps=4,
    )


implement("gae")(_scan_rows)
implement("gae_packed")(_scan_packed)


@implement("discounted_sums")
def discounted_sums(x, decays, mask, dones, cu_seqlens):
    if cu_seqlens is None:
        return _scan_rows(x, decays, mask, dones, None, None)[0]
    return _scan_packed(x, decays, cu_seqlens, mask, dones, None, None)[0]
