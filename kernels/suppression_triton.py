"""Background suppression in Triton: each image's lowest scores, in full resolution.

A pixel's score is that of its strongest present class. A radix select finds the largest score that counts. Then a
program owns a block of the small map, as in ``losses_triton``.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpn_fast.kernels.eager import counted
from cpn_fast.kernels.launch import check, next_power, obstacle, on_device
from cpn_fast.kernels.losses_tiled import (
    backward_suppression,
    differentiate_suppression,
    fake_backward_suppression,
    fake_suppression,
    needed,
    save_suppression,
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
    sample,
    span,
)


@triton.jit
def _strongest(refined, table, count, i_n, o_y, b_fy, o_x, b_fx, C, h, w, mask):
    """Score of each pixel's strongest present class, at least 0, and the number of equally strong classes."""
    b_strongest = tl.zeros(mask.shape, dtype=tl.float32)
    b_ties = tl.zeros(mask.shape, dtype=tl.float32)
    for slot in range(count):
        source = refined + (i_n * (C + 1) + tl.load(table + i_n * (C + 1) + slot)) * h * w
        b_u = sample(source, o_y, b_fy, o_x, b_fx, h, w, mask)
        b_ties = tl.where(b_u > b_strongest, 1.0, tl.where(b_u == b_strongest, b_ties + 1.0, b_ties))
        b_strongest = larger(b_strongest, b_u)
    return b_strongest, b_ties


@triton.jit
def _score_histogram_kernel(
    bins, state, refined, table, present, C, h, w, H, W, SHIFT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """One round of the radix select for background suppression, smallest scores first."""
    i_n = tl.program_id(2).to(tl.int64)
    o_y, b_fy, o_x, b_fx, mask = own_tile(h, w, H, W, TILE)
    b_s, _ = _strongest(refined, table, tl.load(present + i_n), i_n, o_y, b_fy, o_x, b_fx, C, h, w, mask)
    b_bits = 0x7FFFFFFF - tl.abs(b_s).to(tl.int32, bitcast=True)  # a NaN may have a sign
    count_bits(bins + i_n * BINS, state + i_n * 4, b_bits, mask, SHIFT, WIDTH)


@triton.jit
def _suppression_kernel(
    partial, gradient, refined, cut, table, present, factor, C, h, w, H, W,
    GRADIENTS: tl.constexpr, SIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Background suppression over the pixels of a block of the small map (the first class sums it), and its gradient
    for one class."""
    block_y, block_x, first_row, first_column, bottom, right = own_block(h, w, H, W, SIDE)
    slot = tl.program_id(1)
    i_n = tl.program_id(2).to(tl.int64)
    count = tl.load(present + i_n)
    o_block, m_block = inside(block_y, block_x, h, w, SIDE)
    o_map = (i_n * (C + 1) + tl.load(table + i_n * (C + 1) + slot)) * h * w
    acc = tl.zeros([SIDE, SIDE], dtype=tl.float32)
    loss = 0.0
    if slot < count:
        last = tl.load(cut + i_n * 2)
        place = tl.load(cut + i_n * 2 + 1)
        for top in range(first_row, bottom, TILE):
            o_y, b_fy, m_y, m_own_y, b_wy = span(top, bottom, block_y, h, H, SIDE, TILE)
            for left in range(first_column, right, TILE):
                o_x, b_fx, m_x, m_own_x, b_wx = span(left, right, block_x, w, W, SIDE, TILE)
                mask = m_y[:, None] & m_x[None, :]
                m_owned = m_own_y[:, None] & m_own_x[None, :]
                b_s, b_ties = _strongest(refined, table, count, i_n, o_y, b_fy, o_x, b_fx, C, h, w, mask)
                b_weight = tl.where(b_s < last, 1.0, tl.where(b_s == last, place, 0.0))
                loss += tl.sum(tl.where(m_owned, b_s * b_weight, 0.0))
                if GRADIENTS:
                    b_u = sample(refined + o_map, o_y, b_fy, o_x, b_fx, h, w, mask)
                    b_grad = tl.where((b_u == b_s) & (b_s > 0) & mask, b_weight / larger(b_ties, 1.0), 0.0)
                    acc = fold(acc, tl.where(b_s != b_s, b_s, b_grad), b_wy, b_wx)
        loss = tl.where(slot == 0, loss * factor, 0.0)
    elif slot > count:  # an absent class: its label 0 times its map, as in eager
        acc = tl.load(refined + o_map + o_block, mask=m_block, other=0.0)
        acc = tl.where(tl.abs(acc) < float("inf"), 0.0, float("nan"))
        loss = tl.sum(acc)
    tl.store(partial + (i_n * (C + 1) + slot) * tl.num_programs(0) + tl.program_id(0), loss)
    if GRADIENTS:
        tl.store(gradient + o_map + o_block, acc * factor, mask=m_block)


def background_suppression(refined: Tensor, labels: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """As ``eager.background_suppression``."""
    check(obstacle(refined))
    return _suppression(refined, labels, size, share, needed(refined)[0])


def _forward_suppression(
    refined: Tensor, labels: Tensor, size: list[int], share: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss () and its gradient."""
    batch, channels, *small = refined.shape
    classes, pixels, device = channels - 1, size[0] * size[1], refined.device
    count = counted(pixels, share)
    refined, labels = refined.contiguous(), labels.contiguous()
    blocks = triton.cdiv(small[0], SIDE) * triton.cdiv(small[1], SIDE)
    table = torch.empty(batch, channels, dtype=torch.int32, device=device)
    present = torch.empty(batch, dtype=torch.int32, device=device)
    state = torch.empty(batch, 4, dtype=torch.int32, device=device)
    cut = refined.new_empty((batch, 2))
    bins = torch.zeros(len(BITS), batch, BINS, dtype=torch.int32, device=device)
    partial = refined.new_empty((batch, channels, blocks))
    gradient = torch.empty_like(refined if needs_grad else refined[:0])
    with on_device(refined):
        classes_kernel[(batch,)](
            table, present, state, cut, labels, batch, classes, pixels, count,
            DIRECTIONS=1, BATCH=False, CHOICE=True, CB=next_power(classes), **OPTIONS,
        )  # fmt: skip
        for (shift, width), of_round in zip(BITS, bins, strict=True):
            _score_histogram_kernel[(triton.cdiv(size[0], TILE), triton.cdiv(size[1], TILE), batch)](
                of_round, state, refined, table, present, classes, *small, *size,
                SHIFT=shift, WIDTH=width, TILE=TILE, BINS=BINS, **OPTIONS,
            )  # fmt: skip
            pick_kernel[(batch,)](
                cut, state, of_round, WIDTH=width, LAST=shift == 0, SMALLEST=True, BINS=BINS, **OPTIONS
            )
        _suppression_kernel[(blocks, channels, batch)](
            partial, gradient, refined, cut, table, present, 1 / (count * batch), classes, *small, *size,
            GRADIENTS=needs_grad, SIDE=SIDE, TILE=TILE, **OPTIONS,
        )  # fmt: skip
    return partial.sum(), gradient


_suppression = operation(
    "background_suppression_triton", _forward_suppression, fake_suppression, backward_suppression,
    fake_backward_suppression, save=save_suppression, differentiate=differentiate_suppression, fuse_backward=True,
)  # fmt: skip
