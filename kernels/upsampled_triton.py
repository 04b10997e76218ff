"""Small maps seen at full resolution, for the losses in Triton: sampling, and its adjoint.

A program owns a block of the small map and goes in tiles through the pixels that touch it. It upsamples a tile, forms
the gradient there and folds it back onto the block with two small products. Positions are integer arithmetic and no
multiply and add are fused, so that every kernel sees exactly the same upsampled values.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels have no Python types.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from cpn_fast.kernels.launch import INTERPRETED

SIDE = 16  # small-map rows and columns that a program owns
TILE = 16  # pixels of a tile's side
OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 1} | ({} if INTERPRETED else {"enable_fp_fusion": False})


@triton.jit
def larger(a, b):
    """Maximum that keeps NaN, which the hardware drops by default: a NaN in a CAM must reach losses and gradients."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def position(o, small, large):
    """Lower neighbour and weight of the upper one, corners aligned."""
    last = tl.maximum(large - 1, 1)
    o_low = (o * (small - 1)) // last
    return o_low, (o * (small - 1) - o_low * last).to(tl.float32) / last


@triton.jit
def _first(low, small, large):
    """First pixel whose lower neighbour is at least ``low``."""
    first = tl.minimum(large, tl.cdiv(low * (large - 1), tl.maximum(small - 1, 1)))
    return tl.where(low <= 0, 0, tl.where(large == 1, large, first))  # a single pixel has the lower neighbour 0


@triton.jit
def sample(source, o_y, b_fy, o_x, b_fx, h, w, mask):
    """One upsampled tile, summed in torch's order, so that infinity becomes NaN at the same pixels."""
    p_top = source + (o_y * w)[:, None]
    p_bottom = source + (tl.minimum(o_y + 1, h - 1) * w)[:, None]
    o_left = o_x[None, :]
    o_right = tl.minimum(o_x + 1, w - 1)[None, :]
    b_a = tl.load(p_top + o_left, mask=mask, other=0.0)
    b_b = tl.load(p_top + o_right, mask=mask, other=0.0)
    b_c = tl.load(p_bottom + o_left, mask=mask, other=0.0)
    b_d = tl.load(p_bottom + o_right, mask=mask, other=0.0)
    b_top = (1.0 - b_fx)[None, :] * b_a + b_fx[None, :] * b_b
    b_bottom = (1.0 - b_fx)[None, :] * b_c + b_fx[None, :] * b_d
    return (1.0 - b_fy)[:, None] * b_top + b_fy[:, None] * b_bottom


@triton.jit
def own_tile(h, w, H, W, TILE: tl.constexpr):
    """The tile of the large map that this program owns: lower neighbours and weights, and which pixels exist."""
    o_row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    o_y, b_fy = position(o_row, h, H)
    o_x, b_fx = position(o_column, w, W)
    return o_y, b_fy, o_x, b_fx, (o_row < H)[:, None] & (o_column < W)[None, :]


@triton.jit
def own_block(h, w, H, W, SIDE: tl.constexpr):
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
def inside(block_y, block_x, h, w, SIDE: tl.constexpr):
    """Offsets of a block's elements in their small map, (SIDE, SIDE), and which of them exist."""
    o_y = block_y + tl.arange(0, SIDE)
    o_x = block_x + tl.arange(0, SIDE)
    return o_y[:, None] * w + o_x[None, :], (o_y < h)[:, None] & (o_x < w)[None, :]


@triton.jit
def span(start, stop, first_small, small, large, SIDE: tl.constexpr, TILE: tl.constexpr):
    """One side of a tile: lower neighbours and weights of its pixels, masks of the pixels that exist and of those that
    this program owns, and the weights (SIDE, TILE) that fold the tile back onto the block."""
    o = start + tl.arange(0, TILE)
    o_low, b_f = position(o, small, large)
    m = o < stop
    return o_low, b_f, m, m & (o_low >= first_small), _weights(first_small + tl.arange(0, SIDE), o_low, b_f, m)


@triton.jit
def _weights(o_small, o_low, b_fraction, m):
    """Bilinear weight of every small row for every pixel row, (SIDE, TILE)."""
    b_w = tl.where(o_small[:, None] == o_low[None, :], 1.0 - b_fraction[None, :], 0.0)
    b_w += tl.where(o_small[:, None] == o_low[None, :] + 1, b_fraction[None, :], 0.0)
    return tl.where(m[None, :], b_w, 0.0)


@triton.jit
def fold(acc, b_grad, b_wy, b_wx):
    """Adjoint of upsampling a tile: acc + wy (SIDE, TILE) @ grad (TILE, TILE) @ wx (SIDE, TILE) transposed."""
    b_half = tl.dot(b_grad, tl.trans(b_wx), input_precision="tf32x3")
    return tl.dot(b_wy, b_half, acc, input_precision="tf32x3")
