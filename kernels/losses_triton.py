"""The complementary losses in Triton: full-resolution maps exist only in registers.

Each program computes what it needs from the small maps, for present classes only:

1. the extrema of every upsampled map, for normalisation: strips of rows first, then joined;
2. the smallest error that counts, if not all errors of an image (or batch) count: a radix select over the bits of the
   errors, which recomputes the errors in each round (``selection_triton``);
3. losses and gradients: a program owns a block of the small map and the pixels that touch it (``upsampled_triton``);
4. the gradient through the extrema, which goes to the pixels that attain them.

Nothing waits for the host, no float is added atomically, and the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels have no Python types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpn_fast.kernels.eager import NORMALISE_EPS, Variant, counted
from cpn_fast.kernels.launch import check, next_power, obstacle, on_device
from cpn_fast.kernels.losses_tiled import (
    SCHEMA,
    backward,
    differentiate,
    empty_gradients,
    fake,
    fake_backward,
    needed,
    save,
)
from cpn_fast.kernels.operators import operation
from cpn_fast.kernels.selection_triton import BINS, BITS, classes_kernel, count_bits, pick_kernel
from cpn_fast.kernels.upsampled_triton import (
    OPTIONS,
    SIDE,
    TILE,
    fold,
    inside,
    larger,
    own_block,
    own_tile,
    position,
    sample,
    smaller,
    span,
)

STRIPS = 8
MAPS = 6  # raw maps of the three branches, then refined ones
FIELDS = 8  # of a map's statistics; the last one is unused
HIGH, LOW, HIGHS, LOWS, SLOPE, OFFSET, SPAN = (tl.constexpr(field) for field in range(7))
"""Fields: the extrema, the numbers of pixels that have them, and what normalises: (x - offset) * slope, the span."""


@triton.jit
def _of_slot(statistics, i_n, slot, C):
    """Pointer to the statistics of a slot, MAPS * FIELDS = 48 numbers."""
    return statistics + (i_n * (C + 1) + slot) * 48


@triton.jit
def _of_map(p_slot, i_map):
    """Pointer to the FIELDS = 8 numbers of a map."""
    return p_slot + i_map * 8


@triton.jit
def _value(maps, p_slot, i_map: tl.constexpr, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask):
    """A normalised tile, scaled by lambda."""
    source = maps + (((i_map % 3) * N + i_n) * (C + 1) + channel) * h * w
    b_u = sample(source, o_y, b_fy, o_x, b_fx, h, w, mask)
    p_map = _of_map(p_slot, i_map)
    return larger(b_u - tl.load(p_map + OFFSET), 0.0) * tl.load(p_map + SLOPE)


@triton.jit
def _values(cam, refined, p_slot, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask):
    """CPCR's tiles of a class: raw tiles of the three branches, refined tiles of branches 1 and 2."""
    b_r0 = _value(cam, p_slot, 0, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
    b_r1 = _value(cam, p_slot, 1, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
    b_r2 = _value(cam, p_slot, 2, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
    b_q1 = _value(refined, p_slot, 4, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
    b_q2 = _value(refined, p_slot, 5, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
    return b_r0, b_r1, b_r2, b_q1, b_q2


@triton.jit
def _extrema_kernel(
    parts, cam, refined, table, present, N, C, h, w, H, W,
    OWN: tl.constexpr, HAS_REFINED: tl.constexpr, STRIPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Largest and smallest value of an upsampled map in a strip of rows, and the numbers of pixels that have them."""
    i_strip = tl.program_id(0)
    slot = tl.program_id(1) // 6
    i_map = tl.program_id(1) % 6
    i_n = tl.program_id(2).to(tl.int64)
    count = tl.load(present + i_n)
    needed = slot < count
    if OWN:
        needed = needed | ((slot == count) & (i_map >= 3))
    if not HAS_REFINED:
        needed = needed & (i_map < 3)
    if needed:
        channel = tl.load(table + i_n * (C + 1) + slot)
        if i_map < 3:
            source = cam + ((i_map * N + i_n) * (C + 1) + channel) * h * w
        else:
            source = refined + (((i_map - 3) * N + i_n) * (C + 1) + channel) * h * w
        b_high = tl.full([TILE, TILE], -float("inf"), dtype=tl.float32)
        b_low = tl.full([TILE, TILE], float("inf"), dtype=tl.float32)
        b_highs = tl.zeros([TILE, TILE], dtype=tl.float32)
        b_lows = tl.zeros([TILE, TILE], dtype=tl.float32)
        rows = tl.cdiv(H, STRIPS)
        stop = tl.minimum((i_strip + 1) * rows, H)
        for top in range(i_strip * rows, stop, TILE):
            o_row = top + tl.arange(0, TILE)
            o_y, b_fy = position(o_row, h, H)
            for left in range(0, W, TILE):
                o_column = left + tl.arange(0, TILE)
                o_x, b_fx = position(o_column, w, W)
                mask = (o_row < stop)[:, None] & (o_column < W)[None, :]
                b_u = sample(source, o_y, b_fy, o_x, b_fx, h, w, mask)
                b_up = tl.where(mask, b_u, -float("inf"))
                b_down = tl.where(mask, b_u, float("inf"))
                b_highs = tl.where(b_up > b_high, 1.0, b_highs + tl.where(b_up == b_high, 1.0, 0.0))
                b_lows = tl.where(b_down < b_low, 1.0, b_lows + tl.where(b_down == b_low, 1.0, 0.0))
                b_high = larger(b_high, b_up)
                b_low = smaller(b_low, b_down)
        high = tl.reduce(b_high, None, larger)
        low = tl.reduce(b_low, None, smaller)
        highs = tl.sum(tl.where(b_high == high, b_highs, 0.0))
        lows = tl.sum(tl.where(b_low == low, b_lows, 0.0))
        p_part = parts + (((i_n * (C + 1) + slot) * 6 + i_map) * STRIPS + i_strip) * 4
        tl.store(p_part + HIGH, high)
        tl.store(p_part + LOW, low)
        tl.store(p_part + HIGHS, highs)
        tl.store(p_part + LOWS, lows)


@triton.jit
def _join_kernel(
    statistics, parts, visible, present, C, eps,
    OWN: tl.constexpr, MIN_MAX: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """A map's statistics from its strips, for normalisation and its gradient."""
    slot = tl.program_id(0) // 6
    i_map = tl.program_id(0) % 6
    i_n = tl.program_id(1).to(tl.int64)
    count = tl.load(present + i_n)
    needed = slot < count
    if OWN:
        needed = needed | ((slot == count) & (i_map >= 3))
    i_row = (i_n * (C + 1) + slot) * 6 + i_map
    p_part = parts + (i_row * STRIPS + tl.arange(0, STRIPS)) * 4
    b_high = tl.load(p_part + HIGH)
    b_low = tl.load(p_part + LOW)
    high = tl.reduce(b_high, 0, larger)
    low = tl.reduce(b_low, 0, smaller)
    highs = tl.sum(tl.where(b_high == high, tl.load(p_part + HIGHS), 0.0))
    lows = tl.sum(tl.where(b_low == low, tl.load(p_part + LOWS), 0.0))
    high = larger(high, 0.0)
    low = larger(low, 0.0)
    if not MIN_MAX:
        low = 0.0
    share = tl.load(visible + i_n)
    weight = tl.where(i_map % 3 == 0, 1.0, tl.where(i_map % 3 == 1, share, 1.0 - share))
    span = high - low + eps
    p_map = _of_map(statistics, i_row)
    tl.store(p_map + HIGH, high)
    tl.store(p_map + LOW, low)
    tl.store(p_map + HIGHS, highs)
    tl.store(p_map + LOWS, lows)
    tl.store(p_map + SLOPE, tl.where(needed, weight / span, 0.0))
    tl.store(p_map + OFFSET, tl.where(needed, low + eps, 0.0) if MIN_MAX else 0.0)
    tl.store(p_map + SPAN, span)


@triton.jit
def _scan(
    cam, refined, statistics, table, count, i_n, o_y, b_fy, o_x, b_fx, N, C, h, w, mask, share, BEFORE: tl.constexpr
):
    """Scan an image's present classes in a tile. For both directions, gives eq. 16's difference, the largest difference
    of any channel, the strongest refined class of the branch, the number of equally strong classes, and the value from
    which eq. 16 subtracts (1, or the branch's lambda)."""
    b_zero = tl.zeros(mask.shape, dtype=tl.float32)
    b_raw0 = b_zero
    b_raw1 = b_zero
    b_raw2 = b_zero
    b_own1 = b_zero
    b_own2 = b_zero
    b_ties1 = b_zero
    b_ties2 = b_zero
    floor = tl.where(count < C, 0.0, -float("inf"))  # the difference of an absent class is zero
    b_top1 = b_zero + floor
    b_top2 = b_zero + floor
    for slot in range(count):
        channel = tl.load(table + i_n * (C + 1) + slot)
        p_slot = _of_slot(statistics, i_n, slot, C)
        b_r0, b_r1, b_r2, b_q1, b_q2 = _values(
            cam, refined, p_slot, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask
        )
        b_top1 = larger(b_top1, b_r0 - b_r1)
        b_top2 = larger(b_top2, b_r0 - b_r2)
        b_raw0 = larger(b_raw0, b_r0)
        b_raw1 = larger(b_raw1, b_r1)
        b_raw2 = larger(b_raw2, b_r2)
        b_ties1 = tl.where(b_q1 > b_own1, 1.0, tl.where(b_q1 == b_own1, b_ties1 + 1.0, b_ties1))
        b_ties2 = tl.where(b_q2 > b_own2, 1.0, tl.where(b_q2 == b_own2, b_ties2 + 1.0, b_ties2))
        b_own1 = larger(b_own1, b_q1)
        b_own2 = larger(b_own2, b_q2)
    full1 = share if BEFORE else 1.0
    full2 = 1.0 - share if BEFORE else 1.0
    b_back1 = (1.0 - b_raw0) - (full1 - b_raw1)
    b_back2 = (1.0 - b_raw0) - (full2 - b_raw2)
    b_top1 = larger(b_top1, b_back1)
    b_top2 = larger(b_top2, b_back2)
    return b_back1, b_back2, b_top1, b_top2, b_own1, b_own2, b_ties1, b_ties2, full1, full2


@triton.jit
def _residual(b_difference, b_top, b_guided, ONE_HOT: tl.constexpr):
    """Target minus refined map."""
    if ONE_HOT:
        b_difference = tl.where(b_difference == b_top, b_difference, 0.0)
    return b_difference - b_guided


@triton.jit
def _count_errors(bins, state, b_residual, mask, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """Add a tile's errors to the histogram of this round's digit."""
    count_bits(bins, state, tl.abs(b_residual).to(tl.int32, bitcast=True), mask, SHIFT, WIDTH)


@triton.jit
def _histogram_kernel(
    bins, state, cam, refined, statistics, table, present, visible, N, C, h, w, H, W,
    OWN: tl.constexpr, BEFORE: tl.constexpr, ONE_HOT: tl.constexpr, BATCH: tl.constexpr,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One round of the radix select over the errors of an image or of the batch."""
    i_n = tl.program_id(2).to(tl.int64)
    i_row = i_n * (0 if BATCH else 1)
    if tl.load(state + i_row * 8 + 2) != 0:
        count = tl.load(present + i_n)
        share = tl.load(visible + i_n)
        o_y, b_fy, o_x, b_fx, mask = own_tile(h, w, H, W, TILE)
        b_back1, b_back2, b_top1, b_top2, b_own1, b_own2, _, _, full1, full2 = _scan(
            cam, refined, statistics, table, count, i_n, o_y, b_fy, o_x, b_fx, N, C, h, w, mask, share, BEFORE
        )
        bins += i_row * 2 * BINS
        state += i_row * 8
        for slot in range(count):
            channel = tl.load(table + i_n * (C + 1) + slot)
            p_slot = _of_slot(statistics, i_n, slot, C)
            b_r0, b_r1, b_r2, b_q1, b_q2 = _values(
                cam, refined, p_slot, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask
            )
            _count_errors(bins, state, _residual(b_r0 - b_r1, b_top1, b_q2, ONE_HOT), mask, SHIFT, WIDTH)
            _count_errors(bins + BINS, state + 4, _residual(b_r0 - b_r2, b_top2, b_q1, ONE_HOT), mask, SHIFT, WIDTH)
        b_g1 = full1 - b_own1
        b_g2 = full2 - b_own2
        if OWN:
            p_slot = _of_slot(statistics, i_n, count, C)
            b_g1 = _value(refined, p_slot, 4, i_n, 0, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
            b_g2 = _value(refined, p_slot, 5, i_n, 0, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
        _count_errors(bins, state, _residual(b_back1, b_top1, b_g2, ONE_HOT), mask, SHIFT, WIDTH)
        _count_errors(bins + BINS, state + 4, _residual(b_back2, b_top2, b_g1, ONE_HOT), mask, SHIFT, WIDTH)


@triton.jit
def _sign(b):
    return tl.where(b > 0, 1.0, 0.0) - tl.where(b < 0, 1.0, 0.0)


@triton.jit
def _counting(b_residual, cut):
    """Gradient of the errors that count."""
    last = tl.load(cut)
    b_error = tl.abs(b_residual)
    b_weight = tl.where(b_error > last, 1.0, tl.where(b_error == last, tl.load(cut + 1), 0.0))
    return _sign(b_residual) * tl.where(last == last, b_weight, last)


@triton.jit
def _accumulate(acc, s1, s2, b_grad, b_value, b_wy, b_wx, m_owned):
    """Fold a gradient of normalised values back, and add to the two sums for the gradient of the extrema."""
    b_live = tl.where(b_value <= 0, 0.0, b_grad)  # `b_value > 0` would drop a NaN
    s1 += tl.sum(tl.where(m_owned, b_live, 0.0))
    s2 += tl.sum(tl.where(m_owned, b_live * b_value, 0.0))
    return fold(acc, b_live, b_wy, b_wx), s1, s2


@triton.jit
def _meets_zero(o, small, large):
    """Whether a small row has weight 0 for a pixel that lies exactly on the row before, or because it is the last."""
    return ((o > 0) & (((o - 1) * (large - 1)) % tl.maximum(small - 1, 1) == 0)) | (o == small - 1)


@triton.jit
def _flaw(maps, o_map, block_y, block_x, h, w, H, W, SIDE: tl.constexpr):
    """Gradient of a block of an unused map: zeros, but NaN where the plain formula, which multiplies absent classes by
    0, has NaN. That is at NaN and infinity, and at -infinity where upsampling multiplies it by 0."""
    o_block, m_block = inside(block_y, block_x, h, w, SIDE)
    b_zero_y = _meets_zero(block_y + tl.arange(0, SIDE), h, H)
    b_zero_x = _meets_zero(block_x + tl.arange(0, SIDE), w, W)
    b_map = tl.load(maps + o_map + o_block, mask=m_block, other=0.0)
    b_sound = (b_map < float("inf")) & ((b_map > -float("inf")) | ~(b_zero_y[:, None] | b_zero_x[None, :]))
    return tl.where(b_sound, 0.0, float("nan"))


@triton.jit
def _parts():
    """Number of programs that give a part of a loss: blocks x slots x images."""
    return tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * tl.num_programs(2)


@triton.jit
def _store_moments(moments, part, parts, s1, s2, GRADIENT: tl.constexpr):
    """Store a program's two sums for one of the six gradients."""
    p_moments = moments + (GRADIENT * parts + part) * 2
    tl.store(p_moments, s1)
    tl.store(p_moments + 1, s2)


@triton.jit
def _tcp_kernel(
    partial, moments, gradient, maps, statistics, table, present, N, C, h, w, H, W, factor,
    MAP: tl.constexpr, PAIR: tl.constexpr, GRADIENTS: tl.constexpr, SIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TCP of one class over the pixels of a block of the small map, and the gradients folded back onto the block,
    without the gradient through the extrema. MAP is 0 for raw maps and 3 for refined ones. Branches 1 and 2 of refined
    maps have a gradient too, which is zero unless PAIR."""
    block_y, block_x, first_row, first_column, bottom, right = own_block(h, w, H, W, SIDE)
    slot = tl.program_id(1)
    i_n = tl.program_id(2).to(tl.int64)
    part = (i_n * (C + 1) + slot) * tl.num_programs(0) + tl.program_id(0)
    count = tl.load(present + i_n)
    channel = tl.load(table + i_n * (C + 1) + slot)
    o_block, m_block = inside(block_y, block_x, h, w, SIDE)
    o_map = (i_n * (C + 1) + channel) * h * w
    branch = tl.num_programs(2).to(tl.int64) * (C + 1) * h * w
    tcp = 0.0
    m0_1 = 0.0
    m0_2 = 0.0
    m1_1 = 0.0
    m1_2 = 0.0
    m2_1 = 0.0
    m2_2 = 0.0
    if slot < count:
        p_slot = _of_slot(statistics, i_n, slot, C)
        acc_0 = tl.zeros([SIDE, SIDE], dtype=tl.float32)
        acc_1 = tl.zeros([SIDE, SIDE], dtype=tl.float32)
        acc_2 = tl.zeros([SIDE, SIDE], dtype=tl.float32)
        for top in range(first_row, bottom, TILE):
            o_y, b_fy, m_y, m_own_y, b_wy = span(top, bottom, block_y, h, H, SIDE, TILE)
            for left in range(first_column, right, TILE):
                o_x, b_fx, m_x, m_own_x, b_wx = span(left, right, block_x, w, W, SIDE, TILE)
                mask = m_y[:, None] & m_x[None, :]
                m_owned = m_own_y[:, None] & m_own_x[None, :]
                b_0 = _value(maps, p_slot, MAP, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
                b_1 = _value(maps, p_slot, MAP + 1, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
                b_2 = _value(maps, p_slot, MAP + 2, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
                b_inconsistent = b_2 + b_1 - b_0
                tcp += tl.sum(tl.where(m_owned, tl.abs(b_inconsistent), 0.0))
                if GRADIENTS:
                    b_sign = _sign(b_inconsistent)
                    acc_0, m0_1, m0_2 = _accumulate(acc_0, m0_1, m0_2, -b_sign, b_0, b_wy, b_wx, m_owned)
                    if PAIR:
                        acc_1, m1_1, m1_2 = _accumulate(acc_1, m1_1, m1_2, b_sign, b_1, b_wy, b_wx, m_owned)
                        acc_2, m2_1, m2_2 = _accumulate(acc_2, m2_1, m2_2, b_sign, b_2, b_wy, b_wx, m_owned)
    else:
        acc_0 = _flaw(maps, o_map, block_y, block_x, h, w, H, W, SIDE)
        acc_1 = _flaw(maps + branch, o_map, block_y, block_x, h, w, H, W, SIDE)
        acc_2 = _flaw(maps + 2 * branch, o_map, block_y, block_x, h, w, H, W, SIDE)
        if slot > count:
            tcp = tl.sum(acc_0 + acc_1 + acc_2)
    parts = _parts()
    tl.store(partial + (MAP // 3) * parts + part, tcp * factor)
    if GRADIENTS:
        tl.store(gradient + o_map + o_block, acc_0, mask=m_block)
        _store_moments(moments, part, parts, m0_1, m0_2, MAP // 3)
        if MAP == 3:
            tl.store(gradient + branch + o_map + o_block, acc_1, mask=m_block)
            tl.store(gradient + 2 * branch + o_map + o_block, acc_2, mask=m_block)
            _store_moments(moments, part, parts, m1_1, m1_2, 2)
            _store_moments(moments, part, parts, m2_1, m2_2, 3)


@triton.jit
def _cpcr_kernel(
    partial, moments, gradient, cam, refined, statistics, cut, table, present, visible, N, C, h, w, H, W, factor,
    OWN: tl.constexpr, BEFORE: tl.constexpr, ONE_HOT: tl.constexpr, BATCH: tl.constexpr, GRADIENTS: tl.constexpr,
    SIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """CPCR of one class, or of the background in the slot after the present classes; otherwise as ``_tcp_kernel``.
    ``gradient`` belongs to branches 1 and 2."""
    block_y, block_x, first_row, first_column, bottom, right = own_block(h, w, H, W, SIDE)
    slot = tl.program_id(1)
    i_n = tl.program_id(2).to(tl.int64)
    part = (i_n * (C + 1) + slot) * tl.num_programs(0) + tl.program_id(0)
    count = tl.load(present + i_n)
    channel = tl.load(table + i_n * (C + 1) + slot)
    o_block, m_block = inside(block_y, block_x, h, w, SIDE)
    o_map = (i_n * (C + 1) + channel) * h * w
    branch = tl.num_programs(2).to(tl.int64) * (C + 1) * h * w
    is_class = slot < count
    cpcr = 0.0
    q1_1 = 0.0
    q1_2 = 0.0
    q2_1 = 0.0
    q2_2 = 0.0
    acc_1 = tl.zeros([SIDE, SIDE], dtype=tl.float32)
    acc_2 = tl.zeros([SIDE, SIDE], dtype=tl.float32)
    if slot <= count:
        share = tl.load(visible + i_n)
        p_slot = _of_slot(statistics, i_n, slot, C)
        p_cut = cut + i_n * (0 if BATCH else 1) * 4
        for top in range(first_row, bottom, TILE):
            o_y, b_fy, m_y, m_own_y, b_wy = span(top, bottom, block_y, h, H, SIDE, TILE)
            for left in range(first_column, right, TILE):
                o_x, b_fx, m_x, m_own_x, b_wx = span(left, right, block_x, w, W, SIDE, TILE)
                mask = m_y[:, None] & m_x[None, :]
                m_owned = m_own_y[:, None] & m_own_x[None, :]
                b_back1, b_back2, b_top1, b_top2, b_own1, b_own2, b_ties1, b_ties2, full1, full2 = _scan(
                    cam, refined, statistics, table, count, i_n, o_y, b_fy, o_x, b_fx, N, C, h, w, mask, share, BEFORE
                )
                b_r0, b_r1, b_r2, b_q1, b_q2 = _values(
                    cam, refined, p_slot, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask
                )
                b_g1 = b_q1 if OWN else full1 - b_own1
                b_g2 = b_q2 if OWN else full2 - b_own2
                b_d1 = tl.where(is_class, b_r0 - b_r1, b_back1)
                b_d2 = tl.where(is_class, b_r0 - b_r2, b_back2)
                b_e1 = _residual(b_d1, b_top1, tl.where(is_class, b_q2, b_g2), ONE_HOT)
                b_e2 = _residual(b_d2, b_top2, tl.where(is_class, b_q1, b_g1), ONE_HOT)
                b_k1 = _counting(b_e1, p_cut)
                b_k2 = _counting(b_e2, p_cut + 2)
                cpcr += tl.sum(tl.where(m_owned, b_e1 * b_k1 + b_e2 * b_k2, 0.0))
                if GRADIENTS:
                    b_k1 = -b_k1
                    b_k2 = -b_k2
                    if not OWN:
                        b_back1 = _counting(_residual(b_back1, b_top1, b_g2, ONE_HOT), p_cut)
                        b_back2 = _counting(_residual(b_back2, b_top2, b_g1, ONE_HOT), p_cut + 2)
                        b_k1 += tl.where(b_q2 == b_own2, b_back1 / larger(b_ties2, 1.0), 0.0)
                        b_k2 += tl.where(b_q1 == b_own1, b_back2 / larger(b_ties1, 1.0), 0.0)
                    acc_1, q1_1, q1_2 = _accumulate(acc_1, q1_1, q1_2, b_k2, b_q1, b_wy, b_wx, m_owned)
                    acc_2, q2_1, q2_2 = _accumulate(acc_2, q2_1, q2_2, b_k1, b_q2, b_wy, b_wx, m_owned)
    takes_part = is_class | ((slot == count) & OWN)
    if not takes_part:
        acc_1 = _flaw(refined + branch, o_map, block_y, block_x, h, w, H, W, SIDE)
        acc_2 = _flaw(refined + 2 * branch, o_map, block_y, block_x, h, w, H, W, SIDE)
        if slot > count:
            cpcr = tl.sum(acc_1 + acc_2)
            if not ONE_HOT:
                for i_branch in range(3):
                    flaw = tl.sum(_flaw(cam + i_branch * branch, o_map, block_y, block_x, h, w, H, W, SIDE))
                    cpcr += flaw
                    acc_1 += flaw
                    acc_2 += flaw
    parts = _parts()
    tl.store(partial + 2 * parts + part, cpcr * factor)
    if GRADIENTS:
        tl.store(gradient + o_map + o_block, acc_1, mask=m_block)
        tl.store(gradient + branch + o_map + o_block, acc_2, mask=m_block)
        _store_moments(moments, part, parts, q1_1, q1_2, 4)
        _store_moments(moments, part, parts, q2_1, q2_2, 5)


@triton.jit
def _finish_kernel(
    d_cam, d_refined, moments, statistics, cam, refined, table, present, N, C, h, w, H, W, blocks, factor, factor_cpcr,
    FIRST: tl.constexpr, OWN: tl.constexpr, MIN_MAX: tl.constexpr,
    SIDE: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Finish the six gradients, from number FIRST on: apply the slope, the extrema's gradient, and the factor.
    ``d_cam`` has TCP's gradient of cam[0]; ``d_refined`` has TCP's of all refined maps, then CPCR's of refined[1:]."""
    block_y, block_x, first_row, first_column, bottom, right = own_block(h, w, H, W, SIDE)
    slot = tl.program_id(1)
    i_n = (tl.program_id(2) % N).to(tl.int64)
    i_gradient = FIRST + tl.program_id(2) // N
    i_map = tl.where(i_gradient == 0, 0, tl.where(i_gradient <= 3, i_gradient + 2, i_gradient))
    count = tl.load(present + i_n)
    needed = slot < count
    if OWN:
        needed = needed | ((slot == count) & (i_map >= 3))
    if needed:
        channel = tl.load(table + i_n * (C + 1) + slot)
        p_map = _of_map(_of_slot(statistics, i_n, slot, C), i_map)
        high = tl.load(p_map + HIGH)
        low = tl.load(p_map + LOW)
        slope = tl.load(p_map + SLOPE)
        s1 = 0.0
        s2 = 0.0
        first = ((i_gradient * N + i_n) * (C + 1) + slot) * blocks
        for start in range(0, blocks, BLOCKS):
            o_b = start + tl.arange(0, BLOCKS)
            p_moments = moments + (first + o_b) * 2
            s1 += tl.sum(tl.load(p_moments, mask=o_b < blocks, other=0.0))
            s2 += tl.sum(tl.load(p_moments + 1, mask=o_b < blocks, other=0.0))
        d_span = -s2 / tl.load(p_map + SPAN)
        at_high = tl.where(high > 0, d_span / tl.load(p_map + HIGHS), 0.0)
        at_low = tl.where(low > 0, (-s1 * slope - d_span) / tl.load(p_map + LOWS), 0.0) if MIN_MAX else 0.0

        o_block, m_block = inside(block_y, block_x, h, w, SIDE)
        if i_gradient == 0:
            p_g = d_cam + (i_n * (C + 1) + channel) * h * w + o_block
            source = cam + (i_n * (C + 1) + channel) * h * w
        else:
            p_g = d_refined + (((i_gradient - 1) * N + i_n) * (C + 1) + channel) * h * w + o_block
            source = refined + (((i_map - 3) * N + i_n) * (C + 1) + channel) * h * w
        acc = tl.load(p_g, mask=m_block, other=0.0) * slope
        for top in range(first_row, bottom, TILE):
            o_y, b_fy, m_y, _, b_wy = span(top, bottom, block_y, h, H, SIDE, TILE)
            for left in range(first_column, right, TILE):
                o_x, b_fx, m_x, _, b_wx = span(left, right, block_x, w, W, SIDE, TILE)
                mask = m_y[:, None] & m_x[None, :]
                b_u = sample(source, o_y, b_fy, o_x, b_fx, h, w, mask)
                b_at = tl.where(mask & (b_u == high), at_high, 0.0) + tl.where(mask & (b_u == low), at_low, 0.0)
                if tl.max((b_at != 0).to(tl.int32)) > 0:
                    acc = fold(acc, b_at, b_wy, b_wx)
        tl.store(p_g, acc * tl.where(i_gradient <= 3, factor, factor_cpcr), mask=m_block)


def complementary_losses(
    cam: Tensor, refined: Tensor | None, visible: Tensor, labels: Tensor, variant: Variant
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``eager.complementary_losses``."""
    check(obstacle(cam))
    tcp, tcp_refined, cpcr = _losses(cam, refined, visible, labels, *variant, *needed(cam, refined)).unbind()
    return tcp, tcp_refined, cpcr


def _forward(
    cam: Tensor, refined: Tensor | None, visible: Tensor, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``losses_tiled._forward``."""
    *fields, needs_cam, needs_refined = options
    variant = Variant(*fields)
    size, hard_share = variant.size, variant.hard_share
    _, batch, channels, *small = cam.shape
    classes, pixels, device = channels - 1, size[0] * size[1], cam.device
    own, over_batch = variant.refined_background == "own", variant.hard_over == "batch"
    count = counted((batch if over_batch else 1) * channels * pixels, hard_share)
    share_of_tcp = 1 / (batch * classes * pixels)
    share_of_cpcr = 1 / (count if over_batch else count * batch)
    choice = refined is not None and hard_share < 1

    cam, visible, labels = cam.contiguous(), visible.contiguous(), labels.contiguous()
    maps = cam if refined is None else refined.contiguous()
    blocks = triton.cdiv(small[0], SIDE) * triton.cdiv(small[1], SIDE)
    rows = 1 if over_batch else batch
    table = torch.empty(batch, channels, dtype=torch.int32, device=device)
    present = torch.empty(batch, dtype=torch.int32, device=device)
    state = torch.empty(rows, 2, 4, dtype=torch.int32, device=device)
    cut = cam.new_empty((rows, 2, 2))
    parts = cam.new_empty((batch, channels, MAPS, STRIPS, 4))
    statistics = cam.new_empty((batch, channels, MAPS, FIELDS))
    partial = cam.new_empty((3, batch, channels, blocks))
    moments = cam.new_empty((MAPS if needs_cam or needs_refined else 0, batch, channels, blocks, 2))
    if refined is None:
        partial[1:].zero_()
    d_cam, d_refined = empty_gradients(cam, refined, needs_cam, needs_refined)
    shape = (batch, classes, *small, *size)
    flags: dict[str, Any] = {
        "OWN": own,
        "BEFORE": variant.background == "before-lambda",
        "ONE_HOT": variant.cpcr_target == "one-hot",
        "BATCH": over_batch,
        "TILE": TILE,
    }
    min_max = variant.normalise == "min-max"
    with on_device(cam):
        classes_kernel[(batch,)](
            table, present, state, cut, labels, batch, classes, pixels, count,
            DIRECTIONS=2, BATCH=over_batch, CHOICE=choice, CB=next_power(classes), **OPTIONS,
        )  # fmt: skip
        _extrema_kernel[(STRIPS, MAPS * channels, batch)](
            parts, cam, maps, table, present, *shape,
            OWN=own, HAS_REFINED=refined is not None, STRIPS=STRIPS, TILE=TILE, **OPTIONS,
        )  # fmt: skip
        _join_kernel[(MAPS * channels, batch)](
            statistics, parts, visible, present, classes, NORMALISE_EPS,
            OWN=own, MIN_MAX=min_max, STRIPS=STRIPS, **OPTIONS,
        )  # fmt: skip
        if choice:
            bins = torch.zeros(len(BITS), rows, 2, BINS, dtype=torch.int32, device=device)
            for (shift, width), of_round in zip(BITS, bins, strict=True):
                _histogram_kernel[(triton.cdiv(size[0], TILE), triton.cdiv(size[1], TILE), batch)](
                    of_round, state, cam, maps, statistics, table, present, visible, *shape,
                    SHIFT=shift, WIDTH=width, BINS=BINS, **flags, **OPTIONS,
                )  # fmt: skip
                pick_kernel[(2 * rows,)](
                    cut, state, of_round, WIDTH=width, LAST=shift == 0, SMALLEST=False, BINS=BINS, **OPTIONS
                )
        grid = (blocks, channels, batch)
        _tcp_kernel[grid](
            partial, moments, d_cam, cam, statistics, table, present, *shape, share_of_tcp,
            MAP=0, PAIR=False, GRADIENTS=needs_cam, SIDE=SIDE, TILE=TILE, **OPTIONS,
        )  # fmt: skip
        if refined is not None:
            _tcp_kernel[grid](
                partial, moments, d_refined, maps, statistics, table, present, *shape, share_of_tcp,
                MAP=3, PAIR=not variant.detach_refined_pair, GRADIENTS=needs_refined, SIDE=SIDE, TILE=TILE, **OPTIONS,
            )  # fmt: skip
            _cpcr_kernel[grid](
                partial, moments, d_refined[3:], cam, maps, statistics, cut, table, present, visible,
                *shape, share_of_cpcr, GRADIENTS=needs_refined, SIDE=SIDE, **flags, **OPTIONS,
            )  # fmt: skip
        first, stop = 0 if needs_cam else 1, MAPS if needs_refined else 1
        if first < stop:
            _finish_kernel[(blocks, channels, batch * (stop - first))](
                d_cam, d_refined, moments, statistics, cam, maps, table, present, *shape, blocks, share_of_tcp,
                share_of_cpcr, FIRST=first, OWN=own, MIN_MAX=min_max, SIDE=SIDE, TILE=TILE, BLOCKS=16, **OPTIONS,
            )  # fmt: skip
    return partial.flatten(1).sum(dim=1), d_cam, d_refined


_losses = operation(
    "complementary_losses_triton", _forward, fake, backward, fake_backward,
    save=save, differentiate=differentiate, schema=SCHEMA, fuse_backward=True,
)  # fmt: skip
