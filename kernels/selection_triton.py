"""Radix select in Triton: the smallest error that counts, or the largest score.

Three rounds fix the bits of a float from the top, 11 + 10 + 10 of them. In each round the caller counts its values with
``count_bits``, which needs no memory for them, and ``pick_kernel`` takes a bin. ``classes_kernel`` sets the start.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

BITS = ((20, 11), (10, 10), (0, 10))  # lowest bit and width of each round's digit, of a float's 31 bits
BINS = 2048


@triton.jit
def classes_kernel(
    table, present, state, cut, labels, N, C, pixels, last,
    DIRECTIONS: tl.constexpr, BATCH: tl.constexpr, CHOICE: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Write an image's channels to ``table`` (present classes, background, absent classes), the number of present
    classes, and the initial state of the radix select over the errors of the image or batch. ``last`` errors count, of
    ``pixels`` for each present class and the background; without CHOICE all of them count."""
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, CB)
    b_present = (tl.load(labels + i_n * C + o_c, mask=o_c < C, other=0.0) != 0).to(tl.int32)
    count = tl.sum(b_present)
    b_before = tl.cumsum(b_present) - b_present
    b_slot = tl.where(b_present != 0, b_before, count + 1 + o_c - b_before)
    tl.store(table + i_n * (C + 1) + b_slot, o_c + 1, mask=o_c < C)
    tl.store(table + i_n * (C + 1) + count, 0)
    tl.store(present + i_n, count)
    if not BATCH or i_n == 0:
        elements = (count + 1).to(tl.int64)
        if BATCH:
            for other in range(1, N):
                b_other = tl.load(labels + other * C + o_c, mask=o_c < C, other=0.0) != 0
                elements += tl.sum(b_other.to(tl.int32)) + 1
        chosen = (elements * pixels > last).to(tl.int32)
        for direction in tl.static_range(DIRECTIONS):
            row = i_n * DIRECTIONS + direction
            tl.store(cut + row * 2, -1.0)
            tl.store(cut + row * 2 + 1, 0.0)
            if CHOICE:
                tl.store(state + row * 4, 0)
                tl.store(state + row * 4 + 1, last)
                tl.store(state + row * 4 + 2, chosen)


@triton.jit
def count_bits(bins, state, b_bits, mask, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """Count digits where the digits of earlier rounds agree.

    Neighbouring errors are often equal, most often zero, and additions to one bin wait for each other. So the lowest
    and the highest digit of a tile are counted first and added at once.
    """
    b_mask = mask & ((b_bits >> (SHIFT + WIDTH)) == tl.load(state))
    b_digit = (b_bits >> SHIFT) & ((1 << WIDTH) - 1)
    low = tl.min(tl.where(b_mask, b_digit, 1 << WIDTH))
    high = tl.max(tl.where(b_mask, b_digit, -1))
    lows = tl.sum((b_mask & (b_digit == low)).to(tl.int32))
    highs = tl.sum((b_mask & (b_digit == high)).to(tl.int32))
    tl.atomic_add(bins + low, lows, mask=lows > 0, sem="relaxed")
    tl.atomic_add(bins + high, highs, mask=high > low, sem="relaxed")
    tl.atomic_add(bins + b_digit, 1, mask=b_mask & (b_digit > low) & (b_digit < high), sem="relaxed")


@triton.jit
def pick_kernel(cut, state, bins, WIDTH: tl.constexpr, LAST: tl.constexpr, SMALLEST: tl.constexpr, BINS: tl.constexpr):
    """Fix this round's digit: the bin of the last error that counts.

    ``state`` holds the digits so far, the number of errors at or below them that count, and whether there is a choice.
    After the last round ``cut`` holds the smallest error that counts and the weight of errors that are equal to it.
    SMALLEST means that bits were counted from the top, so that the last error that counts is the largest.
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
