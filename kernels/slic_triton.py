"""SLIC in Triton: the same bits as ``slic_eager``, which defines them, without waiting for the host.

1. Colours: one int32 holds a pixel's three numbers.
2. In each round a program holds a part of one cell's pixels and the cell's nine candidate centres in registers. It
   finds the nearest centre of each pixel and writes nine sums, which another kernel adds up: no atomics.
3. Parts of one label: union-find over neighbours. The order of integer minima does not matter; the root is the first
   pixel.
4. One program per image joins parts to each other, in rounds of a loop on the device, and numbers them.

Atomics are only on integers, with operations whose order does not matter (minimum, maximum, sum).
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# Arguments of kernels have no Python types, and their tuples grow.
# ruff: noqa: RUF005
# Triton's tuples are added to and not unpacked.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpn_fast.kernels.launch import INTERPRETED, gpu_obstacle, on_device
from cpn_fast.kernels.slic_eager import SMALL, Grid, fake, tables, weight

FIELDS = 6  # centre: place (y, x), colour (L, a, b), alive; sum: place, colour, number of pixels
PART = 1024  # most pixels of a cell in one program: a thread's sums, of 32 pixels, stay below 2^16
WARP = 32
ASSIGN: dict[str, Any] = {"num_warps": 1, "num_stages": 1}  # with one warp, sums need no shared memory
PIXELS: dict[str, Any] = {"num_warps": 4, "num_stages": 1}
BLOCK = 1024
JOIN: dict[str, Any] = {"num_warps": 16, "num_stages": 1}
JOINED = 2048  # pixels or parts in one iteration of an image's only program


@triton.jit
def _light(value, curve):
    """CIELAB's f."""
    b_low = value >> 5
    b_left = tl.load(curve + b_low)
    return b_left + (((tl.load(curve + b_low + 1) - b_left) * (value & 31) + 16) >> 5)


@triton.jit
def _colours_kernel(
    packed, images, light, curve, stride_n, stride_c, stride_y, stride_x, width, pixels, BLOCK: tl.constexpr
):
    """L, a and b as in ``slic_eager.lab``, in the upper 10, middle 11 and lower 11 bits."""
    i_n = tl.program_id(1).to(tl.int64)
    o_p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o_p < pixels
    p_image = images + i_n * stride_n + (o_p // width).to(tl.int64) * stride_y + (o_p % width).to(tl.int64) * stride_x
    b_red = tl.load(light + tl.load(p_image, mask=m, other=0).to(tl.int32))
    b_green = tl.load(light + tl.load(p_image + stride_c, mask=m, other=0).to(tl.int32))
    b_blue = tl.load(light + tl.load(p_image + 2 * stride_c, mask=m, other=0).to(tl.int32))
    # The numbers are WHITE, SCALES, SHIFT_A and SHIFT_B of slic_eager.
    b_x = _light((14220 * b_red + 12327 * b_green + 6221 * b_blue + 16384) >> 15, curve)
    b_y = _light((6969 * b_red + 23434 * b_green + 2365 * b_blue + 16384) >> 15, curve)
    b_z = _light((582 * b_red + 3587 * b_green + 28599 * b_blue + 16384) >> 15, curve)
    b_l = (580 * b_y - 80 * 32768 + 16384) >> 15
    b_a = (5000 * (b_x - b_y) + 864 * 32768 + 16384) >> 15
    b_b = (2000 * (b_y - b_z) + 1080 * 32768 + 16384) >> 15
    tl.store(packed + i_n * pixels + o_p, (b_l << 22) | (b_a << 11) | b_b, mask=m)


@triton.jit
def _near(j):
    """Place of candidate j in the 3 x 3 cells, counted by rows: the own cell first, as in ``slic_eager.NEAR``."""
    return tl.where(j == 0, 4, tl.where(j < 5, j - 1, j))


@triton.jit
def _first(cell, side, cells):
    """First pixel row (column) of a row (column) of cells."""
    return tl.cdiv(cell.to(tl.int64) * side, cells).to(tl.int32)


# Triton compiles a kernel anew for a number that is 1 or a multiple of 16, unless it is named. The names are those that
# follow from an image's size and have many such combinations.
@triton.jit(do_not_specialize=["step", "height", "width", "rows", "columns", "parts"])
def _assign_kernel(
    labels, parents, sums, packed, mask, centres, weight, step, height, width, rows, columns, parts,
    HAS_MASK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The nearest centre of each pixel in a part of a cell. At LAST it writes labels, and each pixel as its own parent.
    Before, it writes sums for each of the nine candidates. FIRST: all pixels take their cell's centre."""
    i_n = tl.program_id(1).to(tl.int64)
    i_cell = tl.program_id(0) // parts
    i_part = tl.program_id(0) % parts
    row = i_cell // columns
    column = i_cell % columns
    top = _first(row, height, rows)
    left = _first(column, width, columns)
    wide = _first(column + 1, width, columns) - left
    area = (_first(row + 1, height, rows) - top) * wide
    place_y = ((top.to(tl.int64) * step) >> 16).to(tl.int32)
    place_x = ((left.to(tl.int64) * step) >> 16).to(tl.int32)
    cells = rows * columns
    centres += i_n * cells * 6

    found = ()
    for j in tl.static_range(9):
        near = _near(j)
        r = row + near // 3 - 1
        c = column + near % 3 - 1
        inside = (r >= 0) & (r < rows) & (c >= 0) & (c < columns)
        p_c = centres + (r * columns + c) * 6
        alive = tl.load(p_c + 5, mask=inside, other=0)
        found = found + (
            tl.load(p_c, mask=inside, other=0) - place_y,
            tl.load(p_c + 1, mask=inside, other=0) - place_x,
            tl.load(p_c + 2, mask=inside, other=0),
            tl.load(p_c + 3, mask=inside, other=0),
            tl.load(p_c + 4, mask=inside, other=0),
            alive,
        )
    zero = tl.zeros([BLOCK], dtype=tl.int32)
    got = (zero,) * 27
    start = i_part * PART
    for first in range(start, tl.minimum(start + PART, area), BLOCK):
        o = first + tl.arange(0, BLOCK)
        o_y = top + o // wide
        o_x = left + o % wide
        o_p = o_y * width + o_x
        m = o < area
        m_shown = m
        if HAS_MASK:
            m_shown = tl.load(mask + i_n * height * width + o_p, mask=m, other=0) != 0
        b_packed = tl.load(packed + i_n * height * width + o_p, mask=m, other=0)
        b_y = ((o_y.to(tl.int64) * step) >> 16).to(tl.int32) - place_y
        b_x = ((o_x.to(tl.int64) * step) >> 16).to(tl.int32) - place_x
        b_l = (b_packed >> 22) & 1023
        b_a = (b_packed >> 11) & 2047
        b_b = b_packed & 2047
        b_nearest = zero
        if not FIRST:
            b_best = tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
            for j in tl.static_range(9):
                b_dy = b_y - found[6 * j]
                b_dx = b_x - found[6 * j + 1]
                b_dl = b_l - found[6 * j + 2]
                b_da = b_a - found[6 * j + 3]
                b_db = b_b - found[6 * j + 4]
                b_colour = b_dl * b_dl + b_da * b_da + b_db * b_db
                b_place = b_dy * b_dy + b_dx * b_dx
                b_distance = (b_colour.to(tl.int64) << 24) + b_place.to(tl.int64) * weight
                m_nearer = (b_distance < b_best) & (found[6 * j + 5] != 0)
                b_best = tl.where(m_nearer, b_distance, b_best)
                b_nearest = tl.where(m_nearer, j, b_nearest)
        if LAST:
            b_near = _near(b_nearest)
            b_label = (row + b_near // 3 - 1) * columns + column + b_near % 3 - 1
            tl.store(labels + i_n * height * width + o_p, tl.where(m_shown, b_label, -1), mask=m)
            tl.store(parents + i_n * height * width + o_p, o_p, mask=m)
        else:
            b_nearest = tl.where(m_shown, b_nearest, -1)
            b_place = (b_y << 16) | b_x
            b_ab = (b_a << 16) | b_b
            b_ln = (b_l << 16) | 1
            more = ()
            for j in tl.static_range(9):
                m_own = b_nearest == j
                more = more + (
                    got[3 * j] + tl.where(m_own, b_place, 0),
                    got[3 * j + 1] + tl.where(m_own, b_ab, 0),
                    got[3 * j + 2] + tl.where(m_own, b_ln, 0),
                )
            got = more
    if not LAST:
        for j in tl.static_range(9):
            number = tl.sum(got[3 * j + 2] & 0xFFFF)
            p_s = sums + (((i_n * cells + i_cell) * 9 + j) * parts + i_part) * 6
            tl.store(p_s, tl.sum((got[3 * j] >> 16) & 0xFFFF).to(tl.int64) + number.to(tl.int64) * place_y)
            tl.store(p_s + 1, tl.sum(got[3 * j] & 0xFFFF).to(tl.int64) + number.to(tl.int64) * place_x)
            tl.store(p_s + 2, tl.sum((got[3 * j + 2] >> 16) & 0xFFFF).to(tl.int64))
            tl.store(p_s + 3, tl.sum((got[3 * j + 1] >> 16) & 0xFFFF).to(tl.int64))
            tl.store(p_s + 4, tl.sum(got[3 * j + 1] & 0xFFFF).to(tl.int64))
            tl.store(p_s + 5, number.to(tl.int64))


@triton.jit
def _mean(total, number):
    return ((2 * total + number) // tl.maximum(2 * number, 1)).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "columns", "parts"])
def _means_kernel(centres, sums, rows, columns, parts, BLOCK: tl.constexpr):
    """A centre's mean over the sums from the parts of its cell and the cells around it. Without pixels it stays."""
    i_n = tl.program_id(1).to(tl.int64)
    i_cell = tl.program_id(0)
    row = i_cell // columns
    column = i_cell % columns
    cells = rows * columns
    b_none = tl.zeros([BLOCK], dtype=tl.int64)
    b_y, b_x, b_l, b_a, b_b, b_number = b_none, b_none, b_none, b_none, b_none, b_none
    for start in range(0, 9 * parts, BLOCK):
        o = start + tl.arange(0, BLOCK)
        o_j = o // parts
        o_near = _near(o_j)
        o_row = row - (o_near // 3 - 1)  # of the cell that has this centre as candidate j
        o_column = column - (o_near % 3 - 1)
        m = (o_j < 9) & (o_row >= 0) & (o_row < rows) & (o_column >= 0) & (o_column < columns)
        p_s = sums + (((i_n * cells + o_row * columns + o_column) * 9 + o_j) * parts + o % parts) * 6
        b_y += tl.load(p_s, mask=m, other=0)
        b_x += tl.load(p_s + 1, mask=m, other=0)
        b_l += tl.load(p_s + 2, mask=m, other=0)
        b_a += tl.load(p_s + 3, mask=m, other=0)
        b_b += tl.load(p_s + 4, mask=m, other=0)
        b_number += tl.load(p_s + 5, mask=m, other=0)
    number = tl.sum(b_number)
    if number > 0:
        p_c = centres + (i_n * cells + i_cell) * 6
        tl.store(p_c, _mean(tl.sum(b_y), number))
        tl.store(p_c + 1, _mean(tl.sum(b_x), number))
        tl.store(p_c + 2, _mean(tl.sum(b_l), number))
        tl.store(p_c + 3, _mean(tl.sum(b_a), number))
        tl.store(p_c + 4, _mean(tl.sum(b_b), number))
        tl.store(p_c + 5, 1)


@triton.jit
def _unite(parents, b_one, b_other, m):
    """Join the trees of pairs of pixels. Parents only decrease, so roots are first pixels."""
    m = m & (b_one != b_other)
    while tl.max(m.to(tl.int32)) > 0:
        b_high = tl.maximum(b_one, b_other)
        b_low = tl.minimum(b_one, b_other)
        b_old = tl.atomic_min(parents + b_high, b_low, mask=m, sem="relaxed")
        m = m & (b_old != b_high) & (b_old != b_low)  # done if a root got its parent, or already had it
        b_one = tl.where(m, b_old, b_low)
        b_other = b_low


@triton.jit
def _link_kernel(parents, labels, width, pixels, BLOCK: tl.constexpr):
    """Unite every pixel with its left neighbour and the one below if they have the same label."""
    i_n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    labels += i_n * pixels
    parents += i_n * pixels
    m_below = o < pixels - width
    m_left = (o % width != 0) & (o < pixels)
    b_own = tl.load(labels + o, mask=o < pixels, other=-1)
    b_left = tl.load(labels + o - 1, mask=m_left, other=-1)
    b_below = tl.load(labels + o + width, mask=m_below, other=-2)
    b_corner = tl.load(labels + o + width - 1, mask=m_below & m_left, other=-3)
    m_shown = b_own >= 0
    m_same = m_shown & (b_left == b_own)
    _unite(parents, o, o - 1, m_same)
    m_known = m_same & (b_corner == b_own)  # already united through the two pixels on the left
    _unite(parents, o, o + width, m_shown & (b_below == b_own) & (m_known == 0))


@triton.jit
def _root_kernel(parents, sizes, labels, pixels, BLOCK: tl.constexpr):
    """Write every pixel's root as its parent, -1 for a masked pixel, and the number of pixels of each root."""
    i_n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    labels += i_n * pixels
    parents += i_n * pixels
    m = o < pixels
    m_shown = tl.load(labels + o, mask=m, other=-1) >= 0
    b_root = o
    b_next = tl.load(parents + o, mask=m_shown, other=0)
    m_on = m_shown & (b_next != b_root)
    while tl.max(m_on.to(tl.int32)) > 0:
        b_root = tl.where(m_on, b_next, b_root)
        b_next = tl.load(parents + b_root, mask=m_on, other=0)
        m_on = m_on & (b_next != b_root)
    tl.store(parents + o, tl.where(m_shown, b_root, -1), mask=m)
    tl.atomic_add(sizes + i_n * pixels + b_root, 1, mask=m_shown, sem="relaxed")


@triton.jit
def _stays(b_region, sizes, large, limit, m, SECOND: tl.constexpr):
    """Whether regions stay: the largest in the first phase, all that are not small in the second."""
    if SECOND:
        m_stays = tl.load(sizes + b_region, mask=m, other=0, cache_modifier=".cg").to(tl.int64) >= limit
    else:
        m_stays = tl.load(large + b_region, mask=m, other=0) != 0
    return m_stays


@triton.jit
def _rank(b_region, sizes, m):
    """Rank of regions by size. Of equal sizes the lower number has the higher rank."""
    b_size = tl.load(sizes + b_region, mask=m, other=0, cache_modifier=".cg").to(tl.int64)
    return (b_size << 31) | (0x7FFFFFFF - b_region).to(tl.int64)


@triton.jit
def _offer(best, b_one, b_other, m, sizes, large, labels, centres, limit, SECOND: tl.constexpr):
    """Offer neighbours to regions that do not stay, which keep the best offer. Returns the number of offers."""
    m = m & (_stays(b_one, sizes, large, limit, m, SECOND) == 0)
    m_stays = m & _stays(b_other, sizes, large, limit, m, SECOND)
    p_one = centres + tl.load(labels + b_one, mask=m_stays, other=0) * 6 + 2
    p_other = centres + tl.load(labels + b_other, mask=m_stays, other=0) * 6 + 2
    b_l = tl.load(p_one, mask=m_stays, other=0) - tl.load(p_other, mask=m_stays, other=0)
    b_a = tl.load(p_one + 1, mask=m_stays, other=0) - tl.load(p_other + 1, mask=m_stays, other=0)
    b_b = tl.load(p_one + 2, mask=m_stays, other=0) - tl.load(p_other + 2, mask=m_stays, other=0)
    b_likeness = (0x7FFFFFFF - (b_l * b_l + b_a * b_a + b_b * b_b)).to(tl.int64) << 31
    b_likeness = (b_likeness | (0x7FFFFFFF - b_other).to(tl.int64)) + 0x4000000000000000
    b_offer = tl.where(m_stays, b_likeness, _rank(b_other, sizes, m))
    tl.atomic_max(best + b_one, b_offer, mask=m, sem="relaxed")
    return tl.sum(m.to(tl.int32))


@triton.jit
def _phase(
    best, regions, sizes, large, parts, number, roots, labels, centres, limit, width, pixels,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rounds as in ``slic_eager._join``. ``regions`` maps a part's root to its region's root."""
    offers = 1
    while offers > 0:
        offers = 0
        for start in range(0, pixels, BLOCK):
            o = start + tl.arange(0, BLOCK)
            b_own = tl.load(roots + o, mask=o < pixels, other=-1)
            b_right = tl.load(roots + o + 1, mask=(o < pixels) & ((o + 1) % width != 0), other=-1)
            b_below = tl.load(roots + o + width, mask=o < pixels - width, other=-1)
            m_right = (b_own >= 0) & (b_right >= 0) & (b_own != b_right)
            m_below = (b_own >= 0) & (b_below >= 0) & (b_own != b_below)
            b_own = tl.load(regions + b_own, mask=m_right | m_below, other=0)
            b_right = tl.load(regions + b_right, mask=m_right, other=0)
            b_below = tl.load(regions + b_below, mask=m_below, other=0)
            m_right = m_right & (b_own != b_right)
            m_below = m_below & (b_own != b_below)
            offers += _offer(best, b_own, b_right, m_right, sizes, large, labels, centres, limit, SECOND)
            offers += _offer(best, b_right, b_own, m_right, sizes, large, labels, centres, limit, SECOND)
            offers += _offer(best, b_own, b_below, m_below, sizes, large, labels, centres, limit, SECOND)
            offers += _offer(best, b_below, b_own, m_below, sizes, large, labels, centres, limit, SECOND)
        tl.debug_barrier()
        if offers > 0:
            for start in range(0, number, BLOCK):  # regions join their best offers
                o = start + tl.arange(0, BLOCK)
                b_part = tl.load(parts + o, mask=o < number, other=0)
                b_offer = tl.load(best + b_part, mask=o < number, other=0, cache_modifier=".cg")
                m = b_offer > 0
                b_target = 0x7FFFFFFF - (b_offer & 0x7FFFFFFF).to(tl.int32)
                b_back = tl.load(best + b_target, mask=m, other=0, cache_modifier=".cg")
                m_back = (b_back > 0) & ((0x7FFFFFFF - (b_back & 0x7FFFFFFF).to(tl.int32)) == b_part)
                m_back = m_back & (_rank(b_part, sizes, m) > _rank(b_target, sizes, m))
                tl.store(regions + b_part, b_target, mask=m & (m_back == 0))
            tl.debug_barrier()
            for start in range(0, number, BLOCK):  # follow chains to their ends
                o = start + tl.arange(0, BLOCK)
                m_part = o < number
                b_part = tl.load(parts + o, mask=m_part, other=0)
                b_region = b_part
                b_next = tl.load(regions + b_part, mask=m_part, other=0)
                m = m_part & (b_next != b_region)
                while tl.max(m.to(tl.int32)) > 0:
                    b_region = tl.where(m, b_next, b_region)
                    b_next = tl.load(regions + b_region, mask=m, other=0)
                    m = m & (b_next != b_region)
                tl.store(regions + b_part, b_region, mask=m_part)
                b_offer = tl.load(best + b_part, mask=m_part, other=0, cache_modifier=".cg")
                m_joins = (b_offer > 0) & (b_region != b_part)
                b_size = tl.load(sizes + b_part, mask=m_joins, other=0, cache_modifier=".cg")
                tl.atomic_add(sizes + b_region, b_size, mask=m_joins, sem="relaxed")
                tl.store(best + b_part, tl.zeros([BLOCK], dtype=tl.int64), mask=m_part)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["limit", "width", "pixels", "cells", "count"])
def _join_kernel(
    numbers, best, regions, parts, sizes, roots, labels, centres, limit, width, pixels, cells, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``slic_eager.joined`` from the parts on, and ``numbered``: a number for every part's root.

    Each image has one program, because its rounds are sequential. Barriers make one thread's writes visible to others.
    """
    i_n = tl.program_id(0).to(tl.int64)
    numbers += i_n * pixels
    best += i_n * pixels
    regions += i_n * pixels
    parts += i_n * pixels
    sizes += i_n * pixels
    roots += i_n * pixels
    labels += i_n * pixels
    centres += i_n * cells * 6

    number = 0
    for start in range(0, pixels, BLOCK):  # the list of parts, in the order of their first pixels
        o = start + tl.arange(0, BLOCK)
        m = tl.load(roots + o, mask=o < pixels, other=-1) == o
        tl.store(parts + number + tl.cumsum(m.to(tl.int32)) - 1, o, mask=m)
        tl.store(regions + o, o, mask=m)
        number += tl.sum(m.to(tl.int32))
    tl.debug_barrier()

    low = 0  # the count-th largest size, or 0 if there are fewer parts
    high = pixels + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = 0
        for start in range(0, number, BLOCK):
            o = start + tl.arange(0, BLOCK)
            b_part = tl.load(parts + o, mask=o < number, other=0)
            reached += tl.sum((tl.load(sizes + b_part, mask=o < number, other=0) >= middle).to(tl.int32))
        enough = reached >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = 0
    for start in range(0, number, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_part = tl.load(parts + o, mask=o < number, other=0)
        above += tl.sum((tl.load(sizes + b_part, mask=o < number, other=0) > low).to(tl.int32))
    equal = 0
    for start in range(0, number, BLOCK):  # of the parts of that size, the first ones up to count
        o = start + tl.arange(0, BLOCK)
        b_part = tl.load(parts + o, mask=o < number, other=0)
        b_size = tl.load(sizes + b_part, mask=o < number, other=0)
        m_equal = (b_size == low) & (o < number)
        b_before = equal + tl.cumsum(m_equal.to(tl.int32))
        m_large = (b_size > low) | (m_equal & (b_before <= count - above))
        tl.store(numbers + b_part, m_large.to(tl.int32), mask=o < number)
        equal += tl.sum(m_equal.to(tl.int32))
    tl.debug_barrier()

    _phase(
        best, regions, sizes, numbers, parts, number, roots, labels, centres, limit, width, pixels, False, BLOCK
    )  # fmt: skip
    _phase(
        best, regions, sizes, numbers, parts, number, roots, labels, centres, limit, width, pixels, True, BLOCK
    )  # fmt: skip

    for start in range(0, number, BLOCK):  # a region's first part
        o = start + tl.arange(0, BLOCK)
        b_part = tl.load(parts + o, mask=o < number, other=0)
        b_region = tl.load(regions + b_part, mask=o < number, other=0)
        tl.atomic_max(best + b_region, (number - o).to(tl.int64), mask=o < number, sem="relaxed")
    tl.debug_barrier()
    named = 0
    for start in range(0, number, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_part = tl.load(parts + o, mask=o < number, other=0)
        b_region = tl.load(regions + b_part, mask=o < number, other=0)
        b_first = tl.load(best + b_region, mask=o < number, other=0, cache_modifier=".cg")
        m = (b_first == number - o) & (o < number)
        b_number = named + tl.cumsum(m.to(tl.int32)) - 1
        tl.store(numbers + b_region, tl.minimum(b_number, count - 1), mask=m)
        named += tl.sum(m.to(tl.int32))
    tl.debug_barrier()
    for start in range(0, number, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_part = tl.load(parts + o, mask=o < number, other=0)
        b_region = tl.load(regions + b_part, mask=o < number, other=0)
        b_number = tl.load(numbers + b_region, mask=o < number, other=0)
        tl.store(numbers + b_part, b_number, mask=(o < number) & (b_region != b_part))


@triton.jit
def _number_kernel(labels, numbers, roots, pixels, BLOCK: tl.constexpr):
    """Every pixel's number, from its part's root."""
    i_n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_root = tl.load(roots + i_n * pixels + o, mask=o < pixels, other=-1)
    b_number = tl.load(numbers + i_n * pixels + b_root, mask=b_root >= 0, other=-1)
    tl.store(labels + i_n * pixels + o, b_number, mask=o < pixels)


def obstacle(images: Tensor) -> str | None:
    """Return why the kernels cannot run, or None."""
    if not (images.is_cuda or images.is_meta or INTERPRETED):
        return f"needs tensors on CUDA, found {images.device}"
    return gpu_obstacle(images.get_device()) if images.is_cuda else None


@torch.library.custom_op("cpn_fast::slic_triton", mutates_args=())
def slic(images: Tensor, mask: Tensor | None, count: int, compactness: float, iterations: int) -> Tensor:
    """As ``slic_eager.slic``."""
    batch, _, height, width = images.shape
    pixels, device = height * width, images.device
    grid = Grid.of(height, width, count)
    longest = -(-height // grid.rows) * -(-width // grid.columns)
    parts = triton.cdiv(longest, PART)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device=device)

    packed, labels, roots, numbers, regions, listed_parts = (empty(pixels) for _ in range(6))
    sums = empty(grid.cells, 9, parts, FIELDS, dtype=torch.int64)
    centres = torch.zeros(batch, grid.cells, FIELDS, dtype=torch.int32, device=device)
    sizes = torch.zeros(batch, pixels, dtype=torch.int32, device=device)
    best = torch.zeros(batch, pixels, dtype=torch.int64, device=device)
    shown = None if mask is None else mask.contiguous().view(torch.uint8)
    over_pixels = (triton.cdiv(pixels, BLOCK), batch)
    with on_device(images):
        light, curve = tables(device)
        _colours_kernel[over_pixels](
            packed, images, light, curve, *images.stride(), width, pixels, BLOCK=BLOCK, **PIXELS
        )
        for turn in range(iterations + 1):
            _assign_kernel[(grid.cells * parts, batch)](
                labels, roots, sums, packed, shown, centres, weight(compactness), grid.step, height, width,
                grid.rows, grid.columns, parts, HAS_MASK=mask is not None, FIRST=turn == 0, LAST=turn == iterations,
                PART=PART, BLOCK=WARP, **ASSIGN,
            )  # fmt: skip
            if turn < iterations:
                _means_kernel[(grid.cells, batch)](centres, sums, grid.rows, grid.columns, parts, BLOCK=WARP, **ASSIGN)
        _link_kernel[over_pixels](roots, labels, width, pixels, BLOCK=BLOCK, **PIXELS)
        _root_kernel[over_pixels](roots, sizes, labels, pixels, BLOCK=BLOCK, **PIXELS)
        _join_kernel[(batch,)](
            numbers, best, regions, listed_parts, sizes, roots, labels, centres,
            -(-pixels // (SMALL * grid.cells)), width, pixels, grid.cells, count, BLOCK=JOINED, **JOIN,
        )  # fmt: skip
        _number_kernel[over_pixels](labels, numbers, roots, pixels, BLOCK=BLOCK, **PIXELS)
    return labels.view(batch, height, width)


slic.register_fake(fake)
