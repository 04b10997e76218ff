"""The losses in Triton: full-resolution maps exist in registers only.

Everything is worked out from the small maps by the program that needs it, for present classes alone:

1. extrema of every upsampled map (strips of rows, then joined), which normalisation needs;
2. where an image (or batch) has enough classes for the hardest errors to be a choice, the smallest error that counts,
   by a radix select over the bits of the errors, 11 + 10 + 10 of them, recomputing the errors in each round;
3. losses and gradients: a program owns a block of the small map, goes through the pixels that touch it in tiles,
   upsamples, forms the gradient there and folds it back with two small products (the adjoint of upsampling);
4. the gradient that flows through the extrema goes to the pixels that attain them.

Nothing waits for the host, no float is added atomically, and the same input gives the same bits. Positions are integer
arithmetic and no multiply and add are fused, so that every kernel sees the very same upsampled values.
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
from cpn_fast.kernels.launch import INTERPRETED, check, obstacle, on_device
from cpn_fast.kernels.losses_tiled import (
    SCHEMA,
    differentiate,
    differentiate_suppression,
    empty_gradients,
    fake,
    fake_suppression,
    save,
    save_suppression,
)

SIDE = 16  # small-map rows and columns that a program owns
TILE = 16  # pixels of a tile's side
STRIPS = 8
MAPS = 6  # raw maps of the three branches, then refined ones
FIELDS = 8  # of a map's statistics: high, low, counts of both, slope, shift, span; 48 for an image's slot of MAPS
SUMS = 16  # of a program: three losses, then two sums for each of six gradients
BITS = ((20, 11), (10, 10), (0, 10))  # of a float's 31: lowest bit and width of each round's digit
BINS = 2048
OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 1} | ({} if INTERPRETED else {"enable_fp_fusion": False})


@triton.jit
def _position(o, small, large):
    """Lower neighbour and weight of the upper one, corners aligned."""
    last = tl.maximum(large - 1, 1)
    o_low = (o * (small - 1)) // last
    return o_low, (o * (small - 1) - o_low * last).to(tl.float32) / last


@triton.jit
def _first(low, small, large):
    """First pixel whose lower neighbour is at least ``low``."""
    return tl.where(low <= 0, 0, tl.minimum(large, tl.cdiv(low * (large - 1), tl.maximum(small - 1, 1))))


@triton.jit
def _sample(source, o_y, b_fy, o_x, b_fx, h, w, mask):
    """One upsampled tile."""
    p_top = source + (o_y * w)[:, None]
    p_bottom = source + (tl.minimum(o_y + 1, h - 1) * w)[:, None]
    o_left = o_x[None, :]
    o_right = tl.minimum(o_x + 1, w - 1)[None, :]
    b_a = tl.load(p_top + o_left, mask=mask, other=0.0)
    b_b = tl.load(p_top + o_right, mask=mask, other=0.0)
    b_c = tl.load(p_bottom + o_left, mask=mask, other=0.0)
    b_d = tl.load(p_bottom + o_right, mask=mask, other=0.0)
    b_top = b_a + b_fx[None, :] * (b_b - b_a)
    b_bottom = b_c + b_fx[None, :] * (b_d - b_c)
    return b_top + b_fy[:, None] * (b_bottom - b_top)


@triton.jit
def _block(h, w, H, W, SIDE: tl.constexpr):
    """The block of the small map that this program owns, and the pixels that touch it."""
    across = tl.cdiv(w, SIDE)
    block_y = (tl.program_id(0) // across) * SIDE
    block_x = (tl.program_id(0) % across) * SIDE
    top = _first(block_y - 1, h, H)
    left = _first(block_x - 1, w, W)
    bottom = tl.where(block_y + SIDE >= h, H, _first(block_y + SIDE, h, H))
    right = tl.where(block_x + SIDE >= w, W, _first(block_x + SIDE, w, W))
    return block_y, block_x, top, left, bottom, right


@triton.jit
def _inside(block_y, block_x, h, w, SIDE: tl.constexpr):
    """Offsets of a block's elements in their small map, (SIDE, SIDE), and which of them exist."""
    o_y = block_y + tl.arange(0, SIDE)
    o_x = block_x + tl.arange(0, SIDE)
    return o_y[:, None] * w + o_x[None, :], (o_y < h)[:, None] & (o_x < w)[None, :]


@triton.jit
def _span(start, stop, first_small, small, large, SIDE: tl.constexpr, TILE: tl.constexpr):
    """One side of a tile: lower neighbours and weights of its pixels, which of them exist, which of those this program
    owns, and the weights (SIDE, TILE) with which they fold back onto its block."""
    o = start + tl.arange(0, TILE)
    o_low, b_f = _position(o, small, large)
    m = o < stop
    return o_low, b_f, m, m & (o_low >= first_small), _weights(first_small + tl.arange(0, SIDE), o_low, b_f, m)


@triton.jit
def _value(maps, statistics, i_map: tl.constexpr, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask):
    """A normalised tile, scaled by lambda. ``statistics`` are of the (image, slot)."""
    source = maps + (((i_map % 3) * N + i_n) * (C + 1) + channel) * h * w
    b_u = _sample(source, o_y, b_fy, o_x, b_fx, h, w, mask)
    slope = tl.load(statistics + i_map * 8 + 4)
    shift = tl.load(statistics + i_map * 8 + 5)
    return tl.maximum(b_u - shift, 0.0) * slope


@triton.jit
def _values(cam, refined, statistics, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask):
    """What CPCR reads of a class: raw tiles of the three branches, refined ones of branches 1 and 2."""
    b_r0 = _value(cam, statistics, 0, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
    b_r1 = _value(cam, statistics, 1, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
    b_r2 = _value(cam, statistics, 2, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
    b_q1 = _value(refined, statistics, 4, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
    b_q2 = _value(refined, statistics, 5, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
    return b_r0, b_r1, b_r2, b_q1, b_q2


@triton.jit
def _extrema_kernel(
    parts, cam, refined, table, present, N, C, h, w, H, W,
    OWN: tl.constexpr, HAS_REFINED: tl.constexpr, STRIPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Largest and smallest value of an upsampled map in a strip of rows, and how many pixels have it."""
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
        high = -float("inf")
        low = float("inf")
        highs = 0.0
        lows = 0.0
        rows = tl.cdiv(H, STRIPS)
        stop = tl.minimum((i_strip + 1) * rows, H)
        for top in range(i_strip * rows, stop, TILE):
            o_row = top + tl.arange(0, TILE)
            o_y, b_fy = _position(o_row, h, H)
            for left in range(0, W, TILE):
                o_column = left + tl.arange(0, TILE)
                o_x, b_fx = _position(o_column, w, W)
                mask = (o_row < stop)[:, None] & (o_column < W)[None, :]
                if i_map < 3:
                    source = cam + ((i_map * N + i_n) * (C + 1) + channel) * h * w
                    b_u = _sample(source, o_y, b_fy, o_x, b_fx, h, w, mask)
                else:
                    source = refined + (((i_map - 3) * N + i_n) * (C + 1) + channel) * h * w
                    b_u = _sample(source, o_y, b_fy, o_x, b_fx, h, w, mask)
                tile_high = tl.max(tl.where(mask, b_u, -float("inf")))
                tile_low = tl.min(tl.where(mask, b_u, float("inf")))
                tile_highs = tl.sum(tl.where(mask & (b_u == tile_high), 1.0, 0.0))
                tile_lows = tl.sum(tl.where(mask & (b_u == tile_low), 1.0, 0.0))
                highs = tl.where(high >= tile_high, highs, 0.0) + tl.where(tile_high >= high, tile_highs, 0.0)
                lows = tl.where(low <= tile_low, lows, 0.0) + tl.where(tile_low <= low, tile_lows, 0.0)
                high = tl.maximum(high, tile_high)
                low = tl.minimum(low, tile_low)
        p_part = parts + (((i_n * (C + 1) + slot) * 6 + i_map) * STRIPS + i_strip) * 4
        tl.store(p_part, high)
        tl.store(p_part + 1, low)
        tl.store(p_part + 2, highs)
        tl.store(p_part + 3, lows)


@triton.jit
def _join_kernel(
    statistics, parts, visible, present, C, eps,
    OWN: tl.constexpr, MIN_MAX: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """A map's statistics from its strips: what normalising it and its gradient need."""
    slot = tl.program_id(0) // 6
    i_map = tl.program_id(0) % 6
    i_n = tl.program_id(1).to(tl.int64)
    count = tl.load(present + i_n)
    needed = slot < count
    if OWN:
        needed = needed | ((slot == count) & (i_map >= 3))
    i_row = (i_n * (C + 1) + slot) * 6 + i_map
    p_part = parts + (i_row * STRIPS + tl.arange(0, STRIPS)) * 4
    b_high = tl.load(p_part)
    b_low = tl.load(p_part + 1)
    high = tl.max(b_high)
    low = tl.min(b_low)
    highs = tl.sum(tl.where(b_high == high, tl.load(p_part + 2), 0.0))
    lows = tl.sum(tl.where(b_low == low, tl.load(p_part + 3), 0.0))
    high = tl.maximum(high, 0.0)
    low = tl.maximum(low, 0.0)
    if not MIN_MAX:
        low = 0.0
    share = tl.load(visible + i_n)
    weight = tl.where(i_map % 3 == 0, 1.0, tl.where(i_map % 3 == 1, share, 1.0 - share))
    span = high - low + eps
    p_s = statistics + i_row * 8
    tl.store(p_s, high)
    tl.store(p_s + 1, low)
    tl.store(p_s + 2, highs)
    tl.store(p_s + 3, lows)
    tl.store(p_s + 4, tl.where(needed, weight / span, 0.0))
    tl.store(p_s + 5, tl.where(needed, low + eps, 0.0) if MIN_MAX else 0.0)
    tl.store(p_s + 6, span)


@triton.jit
def _scan(
    cam, refined, statistics, table, count, i_n, o_y, b_fy, o_x, b_fx, N, C, h, w, mask, share, BEFORE: tl.constexpr
):
    """Over an image's present classes in a tile: eq. 16's differences for both directions, the largest difference of
    any channel, the strongest refined class of branches 1 and 2, and how many classes are that strong."""
    b_zero = tl.zeros(mask.shape, dtype=tl.float32)
    b_raw0 = b_zero
    b_raw1 = b_zero
    b_raw2 = b_zero
    b_own1 = b_zero
    b_own2 = b_zero
    b_ties1 = b_zero
    b_ties2 = b_zero
    floor = tl.where(count < C, 0.0, -float("inf"))  # an absent class differs by zero
    b_top1 = b_zero + floor
    b_top2 = b_zero + floor
    for slot in range(count):
        channel = tl.load(table + i_n * (C + 1) + slot)
        p_s = statistics + (i_n * (C + 1) + slot) * 48
        b_r0, b_r1, b_r2, b_q1, b_q2 = _values(cam, refined, p_s, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
        b_top1 = tl.maximum(b_top1, b_r0 - b_r1)
        b_top2 = tl.maximum(b_top2, b_r0 - b_r2)
        b_raw0 = tl.maximum(b_raw0, b_r0)
        b_raw1 = tl.maximum(b_raw1, b_r1)
        b_raw2 = tl.maximum(b_raw2, b_r2)
        b_ties1 = tl.where(b_q1 > b_own1, 1.0, tl.where(b_q1 == b_own1, b_ties1 + 1.0, b_ties1))
        b_ties2 = tl.where(b_q2 > b_own2, 1.0, tl.where(b_q2 == b_own2, b_ties2 + 1.0, b_ties2))
        b_own1 = tl.maximum(b_own1, b_q1)
        b_own2 = tl.maximum(b_own2, b_q2)
    full1 = share if BEFORE else 1.0
    full2 = 1.0 - share if BEFORE else 1.0
    b_back1 = (1.0 - b_raw0) - (full1 - b_raw1)
    b_back2 = (1.0 - b_raw0) - (full2 - b_raw2)
    b_top1 = tl.maximum(b_top1, b_back1)
    b_top2 = tl.maximum(b_top2, b_back2)
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
    _count_bits(bins, state, tl.abs(b_residual).to(tl.int32, bitcast=True), mask, SHIFT, WIDTH)


@triton.jit
def _count_bits(bins, state, b_bits, mask, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """Count where the digits of earlier rounds agree."""
    b_mask = mask & ((b_bits >> (SHIFT + WIDTH)) == tl.load(state))
    tl.atomic_add(bins + ((b_bits >> SHIFT) & ((1 << WIDTH) - 1)), 1, mask=b_mask, sem="relaxed")


@triton.jit
def _histogram_kernel(
    bins, state, cam, refined, statistics, table, present, visible, N, C, h, w, H, W,
    OWN: tl.constexpr, BEFORE: tl.constexpr, ONE_HOT: tl.constexpr, BATCH: tl.constexpr,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One round of the radix select over an image's errors, or the batch's."""
    i_n = tl.program_id(2).to(tl.int64)
    i_row = i_n * (0 if BATCH else 1)
    if tl.load(state + i_row * 8 + 2) != 0:
        count = tl.load(present + i_n)
        share = tl.load(visible + i_n)
        o_row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        o_column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        o_y, b_fy = _position(o_row, h, H)
        o_x, b_fx = _position(o_column, w, W)
        mask = (o_row < H)[:, None] & (o_column < W)[None, :]
        b_back1, b_back2, b_top1, b_top2, b_own1, b_own2, _, _, full1, full2 = _scan(
            cam, refined, statistics, table, count, i_n, o_y, b_fy, o_x, b_fx, N, C, h, w, mask, share, BEFORE
        )
        bins += i_row * 2 * BINS
        state += i_row * 8
        for slot in range(count):
            channel = tl.load(table + i_n * (C + 1) + slot)
            p_s = statistics + (i_n * (C + 1) + slot) * 48
            b_r0, b_r1, b_r2, b_q1, b_q2 = _values(
                cam, refined, p_s, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask
            )
            _count_errors(bins, state, _residual(b_r0 - b_r1, b_top1, b_q2, ONE_HOT), mask, SHIFT, WIDTH)
            _count_errors(bins + BINS, state + 4, _residual(b_r0 - b_r2, b_top2, b_q1, ONE_HOT), mask, SHIFT, WIDTH)
        b_g1 = full1 - b_own1
        b_g2 = full2 - b_own2
        if OWN:
            p_s = statistics + (i_n * (C + 1) + count) * 48
            b_g1 = _value(refined, p_s, 4, i_n, 0, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
            b_g2 = _value(refined, p_s, 5, i_n, 0, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
        _count_errors(bins, state, _residual(b_back1, b_top1, b_g2, ONE_HOT), mask, SHIFT, WIDTH)
        _count_errors(bins + BINS, state + 4, _residual(b_back2, b_top2, b_g1, ONE_HOT), mask, SHIFT, WIDTH)


@triton.jit
def _pick_kernel(cut, state, bins, WIDTH: tl.constexpr, LAST: tl.constexpr, SMALLEST: tl.constexpr, BINS: tl.constexpr):
    """Fix this round's digit: the bin in which the last error that counts lies.

    ``state`` is the digits so far, how many errors at or below them count, and whether there is a choice at all; after
    the last round ``cut`` is the smallest error that counts and the weight of those equal to it. SMALLEST says that
    bits were counted from the top, so that the last one that counts is the largest.
    """
    i_row = tl.program_id(0)
    p_state = state + i_row * 4
    if tl.load(p_state + 2) != 0:
        o_b = tl.arange(0, BINS)
        b_count = tl.load(bins + i_row * BINS + o_b)
        remaining = tl.load(p_state + 1)
        b_from = tl.sum(b_count) - tl.cumsum(b_count) + b_count  # errors in this bin or above
        digit = tl.max(tl.where(b_from >= remaining, o_b, 0))
        inside = tl.sum(tl.where(o_b == digit, b_count, 0))
        above = tl.sum(tl.where(o_b > digit, b_count, 0))
        prefix = (tl.load(p_state) << WIDTH) | digit
        tl.store(p_state, prefix)
        tl.store(p_state + 1, remaining - above)
        if LAST:
            if SMALLEST:
                prefix = 0x7FFFFFFF - prefix
            tl.store(cut + i_row * 2, prefix.to(tl.float32, bitcast=True))
            tl.store(cut + i_row * 2 + 1, (remaining - above).to(tl.float32) / inside.to(tl.float32))


@triton.jit
def _sign(b):
    return tl.where(b > 0, 1.0, 0.0) - tl.where(b < 0, 1.0, 0.0)


@triton.jit
def _counting(b_residual, cut):
    """Gradient of the errors that count."""
    last = tl.load(cut)
    b_error = tl.abs(b_residual)
    return _sign(b_residual) * tl.where(b_error > last, 1.0, tl.where(b_error == last, tl.load(cut + 1), 0.0))


@triton.jit
def _fold(acc, b_grad, b_wy, b_wx):
    """Adjoint of upsampling a tile: acc + wy (SIDE, TILE) @ grad (TILE, TILE) @ wx (SIDE, TILE) transposed."""
    b_half = tl.dot(b_grad, tl.trans(b_wx), input_precision="tf32x3")
    return tl.dot(b_wy, b_half, acc, input_precision="tf32x3")


@triton.jit
def _weights(o_small, o_low, b_fraction, m):
    """Bilinear weight of every small row for every pixel row, (SIDE, TILE)."""
    b_w = tl.where(o_small[:, None] == o_low[None, :], 1.0 - b_fraction[None, :], 0.0)
    b_w += tl.where(o_small[:, None] == o_low[None, :] + 1, b_fraction[None, :], 0.0)
    return tl.where(m[None, :], b_w, 0.0)


@triton.jit
def _accumulate(acc, s1, s2, b_grad, b_value, b_wy, b_wx, m_owned):
    """Fold a gradient of normalised values back, and sum it as the gradient of the extrema needs it."""
    b_live = tl.where(b_value > 0, b_grad, 0.0)
    s1 += tl.sum(tl.where(m_owned, b_live, 0.0))
    s2 += tl.sum(tl.where(m_owned, b_live * b_value, 0.0))
    return _fold(acc, b_live, b_wy, b_wx), s1, s2


@triton.jit
def _tcp_kernel(
    sums, gradient, maps, statistics, table, present, N, C, h, w, H, W,
    MAP: tl.constexpr, PAIR: tl.constexpr, GRADIENTS: tl.constexpr,
    SIDE: tl.constexpr, TILE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """TCP of one class over the pixels of a block of the small map, and the gradients folded back onto the block, but
    for what flows through the extrema. MAP is 0 for raw maps and 3 for refined ones; PAIR says whether branches 1 and 2
    get a gradient."""
    block_y, block_x, first_row, first_column, bottom, right = _block(h, w, H, W, SIDE)
    slot = tl.program_id(1)
    i_n = tl.program_id(2).to(tl.int64)
    if slot < tl.load(present + i_n):
        channel = tl.load(table + i_n * (C + 1) + slot)
        p_s = statistics + (i_n * (C + 1) + slot) * 48
        acc_0 = tl.zeros([SIDE, SIDE], dtype=tl.float32)
        acc_1 = acc_0
        acc_2 = acc_0
        tcp = 0.0
        m0_1 = 0.0
        m0_2 = 0.0
        m1_1 = 0.0
        m1_2 = 0.0
        m2_1 = 0.0
        m2_2 = 0.0
        for top in range(first_row, bottom, TILE):
            o_y, b_fy, m_y, m_own_y, b_wy = _span(top, bottom, block_y, h, H, SIDE, TILE)
            for left in range(first_column, right, TILE):
                o_x, b_fx, m_x, m_own_x, b_wx = _span(left, right, block_x, w, W, SIDE, TILE)
                mask = m_y[:, None] & m_x[None, :]
                m_owned = m_own_y[:, None] & m_own_x[None, :]
                b_0 = _value(maps, p_s, MAP, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
                b_1 = _value(maps, p_s, MAP + 1, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
                b_2 = _value(maps, p_s, MAP + 2, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask)
                b_inconsistent = b_2 + b_1 - b_0
                tcp += tl.sum(tl.where(m_owned, tl.abs(b_inconsistent), 0.0))
                if GRADIENTS:
                    b_sign = _sign(b_inconsistent)
                    acc_0, m0_1, m0_2 = _accumulate(acc_0, m0_1, m0_2, -b_sign, b_0, b_wy, b_wx, m_owned)
                    if PAIR:
                        acc_1, m1_1, m1_2 = _accumulate(acc_1, m1_1, m1_2, b_sign, b_1, b_wy, b_wx, m_owned)
                        acc_2, m2_1, m2_2 = _accumulate(acc_2, m2_1, m2_2, b_sign, b_2, b_wy, b_wx, m_owned)
        p_sum = sums + ((i_n * (C + 1) + slot) * tl.num_programs(0) + tl.program_id(0)) * SUMS
        tl.store(p_sum + MAP // 3, tcp)
        if GRADIENTS:
            p_sum += 3 + 2 * (MAP // 3)
            tl.store(p_sum, m0_1)
            tl.store(p_sum + 1, m0_2)
            o_block, m_block = _inside(block_y, block_x, h, w, SIDE)
            p_g = gradient + (i_n * (C + 1) + channel) * h * w + o_block
            tl.store(p_g, acc_0, mask=m_block)
            if PAIR:
                tl.store(p_sum + 2, m1_1)
                tl.store(p_sum + 3, m1_2)
                tl.store(p_sum + 4, m2_1)
                tl.store(p_sum + 5, m2_2)
                stride = tl.num_programs(2).to(tl.int64) * (C + 1) * h * w
                tl.store(p_g + stride, acc_1, mask=m_block)
                tl.store(p_g + 2 * stride, acc_2, mask=m_block)


@triton.jit
def _cpcr_kernel(
    sums, d_cpcr, cam, refined, statistics, cut, table, present, visible, N, C, h, w, H, W,
    OWN: tl.constexpr, BEFORE: tl.constexpr, ONE_HOT: tl.constexpr, BATCH: tl.constexpr, GRADIENTS: tl.constexpr,
    SIDE: tl.constexpr, TILE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """CPCR of one class, or of the background in the slot behind the classes; otherwise as ``_tcp_kernel``."""
    block_y, block_x, first_row, first_column, bottom, right = _block(h, w, H, W, SIDE)
    slot = tl.program_id(1)
    i_n = tl.program_id(2).to(tl.int64)
    count = tl.load(present + i_n)
    is_class = slot < count
    if slot <= count:
        channel = tl.load(table + i_n * (C + 1) + slot)
        share = tl.load(visible + i_n)
        p_s = statistics + (i_n * (C + 1) + slot) * 48
        p_cut = cut + i_n * (0 if BATCH else 1) * 4
        acc_1 = tl.zeros([SIDE, SIDE], dtype=tl.float32)
        acc_2 = acc_1
        cpcr = 0.0
        q1_1 = 0.0
        q1_2 = 0.0
        q2_1 = 0.0
        q2_2 = 0.0
        for top in range(first_row, bottom, TILE):
            o_y, b_fy, m_y, m_own_y, b_wy = _span(top, bottom, block_y, h, H, SIDE, TILE)
            for left in range(first_column, right, TILE):
                o_x, b_fx, m_x, m_own_x, b_wx = _span(left, right, block_x, w, W, SIDE, TILE)
                mask = m_y[:, None] & m_x[None, :]
                m_owned = m_own_y[:, None] & m_own_x[None, :]
                b_back1, b_back2, b_top1, b_top2, b_own1, b_own2, b_ties1, b_ties2, full1, full2 = _scan(
                    cam, refined, statistics, table, count, i_n, o_y, b_fy, o_x, b_fx, N, C, h, w, mask, share, BEFORE
                )
                b_r0, b_r1, b_r2, b_q1, b_q2 = _values(
                    cam, refined, p_s, i_n, channel, o_y, b_fy, o_x, b_fx, N, C, h, w, mask
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
                        b_k1 += tl.where(b_q2 == b_own2, b_back1 / tl.maximum(b_ties2, 1.0), 0.0)
                        b_k2 += tl.where(b_q1 == b_own1, b_back2 / tl.maximum(b_ties1, 1.0), 0.0)
                    acc_1, q1_1, q1_2 = _accumulate(acc_1, q1_1, q1_2, b_k2, b_q1, b_wy, b_wx, m_owned)
                    acc_2, q2_1, q2_2 = _accumulate(acc_2, q2_1, q2_2, b_k1, b_q2, b_wy, b_wx, m_owned)
        p_sum = sums + ((i_n * (C + 1) + slot) * tl.num_programs(0) + tl.program_id(0)) * SUMS
        tl.store(p_sum + 2, cpcr)
        if GRADIENTS:
            tl.store(p_sum + 11, q1_1)
            tl.store(p_sum + 12, q1_2)
            tl.store(p_sum + 13, q2_1)
            tl.store(p_sum + 14, q2_2)
            o_block, m_block = _inside(block_y, block_x, h, w, SIDE)
            if not OWN:
                m_block = m_block & is_class
            p_g = d_cpcr + (i_n * (C + 1) + channel) * h * w + o_block
            tl.store(p_g, acc_1, mask=m_block)
            tl.store(p_g + tl.num_programs(2).to(tl.int64) * (C + 1) * h * w, acc_2, mask=m_block)


@triton.jit
def _finish_kernel(
    gradient, sums, statistics, maps, table, present, C, h, w, H, W, blocks, factor,
    MAP: tl.constexpr, GRADIENT: tl.constexpr, OWN: tl.constexpr, MIN_MAX: tl.constexpr,
    SIDE: tl.constexpr, TILE: tl.constexpr, SUMS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Finish one gradient of one branch (``gradient`` and ``maps`` (N, 1 + C, h, w)): slope, extrema and factor."""
    block_y, block_x, first_row, first_column, bottom, right = _block(h, w, H, W, SIDE)
    slot = tl.program_id(1)
    i_n = tl.program_id(2).to(tl.int64)
    count = tl.load(present + i_n)
    needed = slot < count
    if OWN and MAP >= 3:
        needed = slot <= count
    if needed:
        channel = tl.load(table + i_n * (C + 1) + slot)
        p_s = statistics + ((i_n * (C + 1) + slot) * 6 + MAP) * 8
        high = tl.load(p_s)
        low = tl.load(p_s + 1)
        slope = tl.load(p_s + 4)
        s1 = 0.0
        s2 = 0.0
        for start in range(0, blocks, BLOCKS):
            o_b = start + tl.arange(0, BLOCKS)
            p_sum = sums + ((i_n * (C + 1) + slot) * blocks + o_b) * SUMS + 3 + 2 * GRADIENT
            s1 += tl.sum(tl.load(p_sum, mask=o_b < blocks, other=0.0))
            s2 += tl.sum(tl.load(p_sum + 1, mask=o_b < blocks, other=0.0))
        d_span = -s2 / tl.load(p_s + 6)
        at_high = tl.where(high > 0, d_span / tl.load(p_s + 2), 0.0)
        at_low = tl.where(low > 0, (-s1 * slope - d_span) / tl.load(p_s + 3), 0.0) if MIN_MAX else 0.0

        o_block, m_block = _inside(block_y, block_x, h, w, SIDE)
        p_g = gradient + (i_n * (C + 1) + channel) * h * w + o_block
        acc = tl.load(p_g, mask=m_block, other=0.0) * slope
        source = maps + (i_n * (C + 1) + channel) * h * w
        for top in range(first_row, bottom, TILE):
            o_y, b_fy, m_y, _, b_wy = _span(top, bottom, block_y, h, H, SIDE, TILE)
            for left in range(first_column, right, TILE):
                o_x, b_fx, m_x, _, b_wx = _span(left, right, block_x, w, W, SIDE, TILE)
                mask = m_y[:, None] & m_x[None, :]
                b_u = _sample(source, o_y, b_fy, o_x, b_fx, h, w, mask)
                b_at = tl.where(mask & (b_u == high), at_high, 0.0) + tl.where(mask & (b_u == low), at_low, 0.0)
                if tl.max(tl.abs(b_at)) > 0:
                    acc = _fold(acc, b_at, b_wy, b_wx)
        tl.store(p_g, acc * factor, mask=m_block)


@triton.jit
def _strongest(refined, table, count, i_n, o_y, b_fy, o_x, b_fx, C, h, w, mask):
    """Each pixel's strongest present class, at least 0, and how many classes are that strong."""
    b_strongest = tl.zeros(mask.shape, dtype=tl.float32)
    b_ties = tl.zeros(mask.shape, dtype=tl.float32)
    for slot in range(count):
        source = refined + (i_n * (C + 1) + tl.load(table + i_n * (C + 1) + slot)) * h * w
        b_u = _sample(source, o_y, b_fy, o_x, b_fx, h, w, mask)
        b_ties = tl.where(b_u > b_strongest, 1.0, tl.where(b_u == b_strongest, b_ties + 1.0, b_ties))
        b_strongest = tl.maximum(b_strongest, b_u)
    return b_strongest, b_ties


@triton.jit
def _score_histogram_kernel(
    bins, state, refined, table, present, C, h, w, H, W, SHIFT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """One round of the radix select for background suppression, smallest scores first."""
    i_n = tl.program_id(2).to(tl.int64)
    o_row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    o_y, b_fy = _position(o_row, h, H)
    o_x, b_fx = _position(o_column, w, W)
    mask = (o_row < H)[:, None] & (o_column < W)[None, :]
    b_s, _ = _strongest(refined, table, tl.load(present + i_n), i_n, o_y, b_fy, o_x, b_fx, C, h, w, mask)
    b_bits = 0x7FFFFFFF - b_s.to(tl.int32, bitcast=True)
    _count_bits(bins + i_n * BINS, state + i_n * 4, b_bits, mask, SHIFT, WIDTH)


@triton.jit
def _suppression_kernel(
    sums, gradient, refined, cut, table, present, factor, C, h, w, H, W,
    GRADIENTS: tl.constexpr, SIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Background suppression over the pixels of a block of the small map (summed by the first class), and its gradient
    for one class."""
    block_y, block_x, first_row, first_column, bottom, right = _block(h, w, H, W, SIDE)
    slot = tl.program_id(1)
    i_n = tl.program_id(2).to(tl.int64)
    count = tl.load(present + i_n)
    if slot < count:
        last = tl.load(cut + i_n * 2)
        place = tl.load(cut + i_n * 2 + 1)
        o_map = (i_n * (C + 1) + tl.load(table + i_n * (C + 1) + slot)) * h * w
        acc = tl.zeros([SIDE, SIDE], dtype=tl.float32)
        loss = 0.0
        for top in range(first_row, bottom, TILE):
            o_y, b_fy, m_y, m_own_y, b_wy = _span(top, bottom, block_y, h, H, SIDE, TILE)
            for left in range(first_column, right, TILE):
                o_x, b_fx, m_x, m_own_x, b_wx = _span(left, right, block_x, w, W, SIDE, TILE)
                mask = m_y[:, None] & m_x[None, :]
                m_owned = m_own_y[:, None] & m_own_x[None, :]
                b_s, b_ties = _strongest(refined, table, count, i_n, o_y, b_fy, o_x, b_fx, C, h, w, mask)
                b_weight = tl.where(b_s < last, 1.0, tl.where(b_s == last, place, 0.0))
                loss += tl.sum(tl.where(m_owned, b_s * b_weight, 0.0))
                if GRADIENTS:
                    b_u = _sample(refined + o_map, o_y, b_fy, o_x, b_fx, h, w, mask)
                    b_grad = tl.where((b_u == b_s) & (b_s > 0) & mask, b_weight / tl.maximum(b_ties, 1.0), 0.0)
                    acc = _fold(acc, b_grad, b_wy, b_wx)
        if slot == 0:
            tl.store(sums + i_n * tl.num_programs(0) + tl.program_id(0), loss * factor)
        if GRADIENTS:
            o_block, m_block = _inside(block_y, block_x, h, w, SIDE)
            tl.store(gradient + o_map + o_block, acc * factor, mask=m_block)


def complementary_losses(
    cam: Tensor, refined: Tensor | None, visible: Tensor, labels: Tensor, variant: Variant
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``eager.complementary_losses``."""
    check(obstacle(cam))
    needs_grad = torch.is_grad_enabled() and (cam.requires_grad or (refined is not None and refined.requires_grad))
    losses = _losses(cam, refined, visible, labels, *variant, needs_grad)[0]
    tcp, tcp_refined, cpcr = losses.unbind()
    return tcp, tcp_refined, cpcr


@torch.library.custom_op("cpn_fast::complementary_losses_triton", mutates_args=(), schema=SCHEMA)
def _losses(
    cam: Tensor, refined: Tensor | None, visible: Tensor, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses (3,); gradients of TCP for cam[0], of refined TCP for refined, of CPCR for refined[1:]."""
    variant, needs_grad = Variant(*options[:-1]), options[-1]
    size, hard_share, pair = variant.size, variant.hard_share, not variant.detach_refined_pair
    _, batch, channels, *small = cam.shape
    classes, pixels, device = channels - 1, size[0] * size[1], cam.device
    own, over_batch = variant.refined_background == "own", variant.hard_over == "batch"
    count = counted((batch if over_batch else 1) * channels * pixels, hard_share)
    share_of_tcp = 1 / (batch * classes * pixels)
    share_of_cpcr = 1 / (count if over_batch else count * batch)

    cam, visible = cam.contiguous(), visible.contiguous()
    maps = cam if refined is None else refined.contiguous()
    table, present = _present(labels)
    blocks = triton.cdiv(small[0], SIDE) * triton.cdiv(small[1], SIDE)
    parts = torch.empty(batch, channels, MAPS, STRIPS, 4, device=device)
    statistics = torch.empty(batch, channels, MAPS, FIELDS, device=device)
    sums = torch.zeros(batch, channels, blocks, SUMS, device=device)
    d_tcp, d_refined, d_cpcr = (part.zero_() for part in empty_gradients(cam, needs_grad))
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
        _extrema_kernel[(STRIPS, MAPS * channels, batch)](
            parts, cam, maps, table, present, *shape,
            OWN=own, HAS_REFINED=refined is not None, STRIPS=STRIPS, TILE=TILE, **OPTIONS,
        )  # fmt: skip
        _join_kernel[(MAPS * channels, batch)](
            statistics, parts, visible, present, classes, NORMALISE_EPS,
            OWN=own, MIN_MAX=min_max, STRIPS=STRIPS, **OPTIONS,
        )  # fmt: skip
        elements = (present + 1).sum(dim=0, keepdim=True) if over_batch else present + 1
        cut = torch.full((len(elements), 2, 2), -1.0, device=device)  # every error counts
        if refined is not None and hard_share < 1:
            state = torch.zeros(len(elements), 2, 4, dtype=torch.int32, device=device)
            state[:, :, 1] = count
            state[:, :, 2] = (elements.long() * pixels > count)[:, None]
            for shift, width in BITS:
                bins = torch.zeros(len(elements), 2, BINS, dtype=torch.int32, device=device)
                _histogram_kernel[(triton.cdiv(size[0], TILE), triton.cdiv(size[1], TILE), batch)](
                    bins, state, cam, maps, statistics, table, present, visible, *shape,
                    SHIFT=shift, WIDTH=width, BINS=BINS, **flags, **OPTIONS,
                )  # fmt: skip
                _pick_kernel[(2 * len(elements),)](
                    cut, state, bins, WIDTH=width, LAST=shift == 0, SMALLEST=False, BINS=BINS, **OPTIONS
                )
        tcp = {"GRADIENTS": needs_grad, "SIDE": SIDE, "TILE": TILE, "SUMS": SUMS, **OPTIONS}
        _tcp_kernel[(blocks, classes, batch)](
            sums, d_tcp, cam, statistics, table, present, *shape, MAP=0, PAIR=False, **tcp
        )
        if refined is not None:
            _tcp_kernel[(blocks, classes, batch)](
                sums, d_refined, maps, statistics, table, present, *shape, MAP=3, PAIR=pair, **tcp
            )
            _cpcr_kernel[(blocks, channels, batch)](
                sums, d_cpcr, cam, maps, statistics, cut, table, present, visible, *shape,
                GRADIENTS=needs_grad, SIDE=SIDE, SUMS=SUMS, **flags, **OPTIONS,
            )  # fmt: skip
        if needs_grad:
            finished = [(d_tcp, cam[0], 0, share_of_tcp)]
            if refined is not None:
                finished += [(d_refined[i], maps[i], 3 + i, share_of_tcp) for i in range(3)]
                finished += [(d_cpcr[i], maps[1 + i], 4 + i, share_of_cpcr) for i in range(2)]
            for index, (gradient, source, i_map, factor) in enumerate(finished):
                _finish_kernel[(blocks, channels, batch)](
                    gradient, sums, statistics, source, table, present, classes, *small, *size, blocks, factor,
                    MAP=i_map, GRADIENT=index, OWN=own, MIN_MAX=min_max, SIDE=SIDE, TILE=TILE, SUMS=SUMS, BLOCKS=16,
                    **OPTIONS,
                )  # fmt: skip
    losses = sums[..., :3].sum(dim=(0, 1, 2))
    losses[:2] *= share_of_tcp
    losses[2:] *= share_of_cpcr
    return losses, d_tcp, d_refined, d_cpcr


def background_suppression(refined: Tensor, labels: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """As ``eager.background_suppression``."""
    check(obstacle(refined))
    return _suppression(refined, labels, size, share, torch.is_grad_enabled() and refined.requires_grad)[0]


@torch.library.custom_op("cpn_fast::background_suppression_triton", mutates_args=())
def _suppression(
    refined: Tensor, labels: Tensor, size: list[int], share: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """The loss () and its gradient."""
    batch, channels, *small = refined.shape
    classes, device = channels - 1, refined.device
    count = counted(size[0] * size[1], share)
    refined = refined.contiguous()
    table, present = _present(labels)
    blocks = triton.cdiv(small[0], SIDE) * triton.cdiv(small[1], SIDE)
    gradient = torch.zeros_like(refined if needs_grad else refined[:0])
    sums = torch.zeros(batch, blocks, device=device)
    cut = torch.zeros(batch, 2, device=device)
    state = torch.zeros(batch, 4, dtype=torch.int32, device=device)
    state[:, 1:3] = count
    with on_device(refined):
        for shift, width in BITS:
            bins = torch.zeros(batch, BINS, dtype=torch.int32, device=device)
            _score_histogram_kernel[(triton.cdiv(size[0], TILE), triton.cdiv(size[1], TILE), batch)](
                bins, state, refined, table, present, classes, *small, *size,
                SHIFT=shift, WIDTH=width, TILE=TILE, BINS=BINS, **OPTIONS,
            )  # fmt: skip
            _pick_kernel[(batch,)](cut, state, bins, WIDTH=width, LAST=shift == 0, SMALLEST=True, BINS=BINS, **OPTIONS)
        _suppression_kernel[(blocks, classes, batch)](
            sums, gradient, refined, cut, table, present, 1 / (count * batch), classes, *small, *size,
            GRADIENTS=needs_grad, SIDE=SIDE, TILE=TILE, **OPTIONS,
        )  # fmt: skip
    return sums.sum(), gradient


_suppression.register_fake(fake_suppression)
_suppression.register_autograd(differentiate_suppression, setup_context=save_suppression)


def _present(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Channels of each image's present classes, first in (N, 1 + C), and how many they are; no wait for the host."""
    order = labels.ne(0).to(torch.int8).argsort(dim=1, descending=True, stable=True) + 1
    present = labels.ne(0).sum(dim=1)
    slots = torch.arange(labels.shape[1] + 1, device=labels.device)
    table = torch.where(slots < present[:, None], torch.cat([order, torch.zeros_like(order[:, :1])], dim=1), 0)
    return table.to(torch.int32), present.to(torch.int32)


_losses.register_fake(fake)
_losses.register_autograd(differentiate, setup_context=save)
