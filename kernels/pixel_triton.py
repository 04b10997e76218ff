"""Pixel correlation in Triton: attention with relu instead of exp and Q = K, so one pass and no running maximum.

Forward prepares g / (||g|| + eps) as (N, pixels, D), and the CAM as (N, pixels, classes) with a column of ones after
the classes. Both are padded with zeros to whole blocks, so the main loop needs no mask (a zero embedding has affinity
zero). The ones give the column sums with the same rounding as the products. D runs in chunks: 192 is three times 64.

Backward is one pass too. With s the column sums, O the output, Y = [cam, 1] and Z = [dO / s, -sum_c(dO O) / s]:
dA[i, j] + dA[j, i] = Y_i . Z_j + Z_i . Y_j where A[i, j] > 0. The block that recomputes A[i, j] forms both terms, so
the program of row block i sums all of dg_i itself: no atomics, and the same bits every time. Z is multiplied by the
number of pixels, and the sums are divided by it. With float16 operands the gradient also gets a scale for each image
(``launch.half_scale``): s is anything from the number of pixels down to 1, and float16 ends at 65,504.

Per image of P pixels: forward 2 P^2 (D + C) useful FLOPs, backward 2 P^2 (2 D + 2 C), and 2 P^2 C more if the CAM
needs a gradient (the forward kernel again, on Z). Bytes are a few times P (D + C): the tensor cores bound both.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels have no Python types.

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpn_fast.kernels import eager, launch
from cpn_fast.kernels.launch import Blocks, check, next_power, on_device, precision, product
from cpn_fast.kernels.operators import operation

PAD = 128  # pixels are padded to a multiple of PAD, and every block size divides PAD
DK = 64  # channels in one product
MAX_DEPTH = 4 * DK
CP = 32  # columns of Y and Z in one product of the backward pass


FORWARD: launch.Table = {
    ("half", "ampere", 192, 128): Blocks(64, 64, True, 4, 2),
    ("half", "ampere", 256, 128): Blocks(64, 64, False, 4, 2),
    ("half", "hopper", 256, 128): Blocks(128, 64, True, 8, 2),
    ("tf32", "ampere", 192, 128): Blocks(64, 32, False, 4, 2),
    ("tf32", "ampere", 256, 128): Blocks(32, 32, False, 4, 2),
    ("tf32", "hopper", 192, 128): Blocks(64, 64, True, 4, 2),
    ("tf32", "hopper", 256, 128): Blocks(64, 32, True, 4, 2),
    ("half", "blackwell", 256, 128): Blocks(128, 64, True, 8, 2),
    ("tf32", "blackwell", 192, 128): Blocks(64, 64, True, 4, 2),
    ("tf32", "blackwell", 256, 128): Blocks(64, 32, True, 4, 2),
}
MANY = 1 << 30  # no limit of columns, for several groups of classes
BACKWARD: launch.Table = {
    ("half", "ampere", 192, 128): Blocks(64, 32, False, 4, 2),
    ("half", "ampere", 256, 64): Blocks(32, 64, False, 4, 2),
    ("half", "ampere", 256, MANY): Blocks(32, 64, False, 4, 2, unrolled=False),
    ("half", "hopper", 192, 128): Blocks(128, 64, True, 8, 2),
    ("half", "hopper", 256, 128): Blocks(64, 64, True, 8, 2),
    ("half", "hopper", 256, MANY): Blocks(64, 32, False, 8, 2, unrolled=False),
    ("tf32", "ampere", 192, 64): Blocks(32, 32, False, 8, 2),
    ("tf32", "ampere", 256, 32): Blocks(32, 32, False, 4, 2),
    ("tf32", "ampere", 256, MANY): Blocks(32, 32, False, 8, 2, unrolled=False),
    ("tf32", "hopper", 192, 32): Blocks(128, 32, False, 8, 2),
    ("tf32", "hopper", 192, 64): Blocks(64, 64, False, 8, 2),
    ("tf32", "hopper", 256, 32): Blocks(64, 64, False, 8, 2),
    ("tf32", "hopper", 256, MANY): Blocks(64, 32, False, 8, 2, unrolled=False),
    ("half", "blackwell", 192, 32): Blocks(64, 64, False, 8, 2),
    ("half", "blackwell", 256, MANY): Blocks(64, 32, False, 8, 2, unrolled=False),
    ("tf32", "blackwell", 256, MANY): Blocks(64, 32, False, 8, 2, unrolled=False),
}


@triton.jit
def _prepare_kernel(
    g, y, norm, embedding, cam,
    stride_en, stride_ed, stride_ep, stride_cn, stride_cc, stride_cp,
    pixels, padded, D, C, eps,
    DK: tl.constexpr, CHUNKS: tl.constexpr, CB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Unit embeddings, their norms, and the CAM with its column of ones; pixels come before channels."""
    i_n = tl.program_id(1).to(tl.int64)
    o_p = tl.program_id(0) * BP + tl.arange(0, BP)
    m_p = o_p < pixels
    o_d = tl.arange(0, DK)
    p_e = embedding + i_n * stride_en + o_p.to(tl.int64)[:, None] * stride_ep
    b_e0 = _load_channels(p_e, stride_ed, o_d, m_p, D)
    b_square = tl.sum(b_e0 * b_e0, 1)
    if CHUNKS > 1:
        b_e1 = _load_channels(p_e, stride_ed, DK + o_d, m_p, D)
        b_square += tl.sum(b_e1 * b_e1, 1)
    if CHUNKS > 2:
        b_e2 = _load_channels(p_e, stride_ed, 2 * DK + o_d, m_p, D)
        b_square += tl.sum(b_e2 * b_e2, 1)
    if CHUNKS > 3:
        b_e3 = _load_channels(p_e, stride_ed, 3 * DK + o_d, m_p, D)
        b_square += tl.sum(b_e3 * b_e3, 1)
    b_norm = tl.sqrt(b_square)
    tl.store(norm + i_n * padded + o_p, b_norm)
    b_divisor = tl.where(m_p, b_norm + eps, 1.0)[:, None]  # an eps of 0 must not divide the padding's zeros by 0
    p_g = g + (i_n * padded + o_p)[:, None] * (DK * CHUNKS) + o_d[None, :]
    tl.store(p_g, (b_e0 / b_divisor).to(g.dtype.element_ty))
    if CHUNKS > 1:
        tl.store(p_g + DK, (b_e1 / b_divisor).to(g.dtype.element_ty))
    if CHUNKS > 2:
        tl.store(p_g + 2 * DK, (b_e2 / b_divisor).to(g.dtype.element_ty))
    if CHUNKS > 3:
        tl.store(p_g + 3 * DK, (b_e3 / b_divisor).to(g.dtype.element_ty))

    o_c = tl.arange(0, CB)
    p_c = cam + i_n * stride_cn + o_p.to(tl.int64)[:, None] * stride_cp
    groups = tl.cdiv(C, CB - 1)
    for group in range(groups):
        o_class = group * (CB - 1) + o_c
        m_c = (o_class < C) & (o_c < CB - 1)
        p_class = p_c + o_class.to(tl.int64)[None, :] * stride_cc
        b_c = tl.load(p_class, mask=m_p[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        b_c = tl.where((o_c == CB - 1)[None, :] & m_p[:, None], 1.0, b_c)  # [BP, CB]
        p_y = y + ((i_n * groups + group) * padded + o_p)[:, None] * CB + o_c[None, :]
        tl.store(p_y, b_c.to(y.dtype.element_ty))


@triton.jit
def _load_channels(p_e, stride_ed, o_d, m_p, D):
    """Load (BP, DK) of the embedding in float32."""
    p_e += o_d.to(tl.int64)[None, :] * stride_ed
    return tl.load(p_e, mask=m_p[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_chunks(p_q, DK: tl.constexpr, CHUNKS: tl.constexpr):
    """Load up to four chunks of channels, (BM, DK). Chunks beyond CHUNKS repeat the first and are not used."""
    b_q0 = tl.load(p_q)
    b_q1, b_q2, b_q3 = b_q0, b_q0, b_q0
    if CHUNKS > 1:
        b_q1 = tl.load(p_q + DK)
    if CHUNKS > 2:
        b_q2 = tl.load(p_q + 2 * DK)
    if CHUNKS > 3:
        b_q3 = tl.load(p_q + 3 * DK)
    return b_q0, b_q1, b_q2, b_q3


@triton.jit
def _scores(
    b_q, p_q, p_k, b_s, DK: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr
):
    """b_s + g_i . g_j for BM targets and BN sources. The targets' chunks are ``b_q``, or are read again at ``p_q``."""
    for i_chunk in tl.static_range(CHUNKS):  # a run-time loop here would prevent pipelining of the caller's loop
        b_c = b_q[i_chunk] if RESIDENT else tl.load(p_q + i_chunk * DK)
        b_s = product(b_c, tl.load(p_k + i_chunk * DK).T, b_s, PRECISION)
    return b_s


@triton.jit
def _forward_kernel(
    out, total, g, y,
    stride_on, stride_oc, stride_op,
    pixels, padded, C, eps,
    DK: tl.constexpr, CHUNKS: tl.constexpr, CB: tl.constexpr, PRECISION: tl.constexpr, NORMALISE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """out_j = sum_i A[i, j] Y_i for BM target pixels j and one group of CB - 1 classes.

    NORMALISE divides by total_j = sum_i A[i, j] + eps and stores the total. Without it the divisor is ``pixels``.
    """
    i_group = tl.program_id(1)
    groups = tl.num_programs(1)
    i_n = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, DK)
    o_c = tl.arange(0, CB)
    D: tl.constexpr = DK * CHUNKS
    g += i_n * padded * D
    p_q = g + o_m.to(tl.int64)[:, None] * D + o_d[None, :]
    p_k = g + o_n[:, None] * D + o_d[None, :]
    p_y = y + (i_n * groups + i_group) * padded * CB + o_n[:, None] * CB + o_c[None, :]
    b_q = (p_q, p_q, p_q, p_q)
    if RESIDENT:
        b_q = _load_chunks(p_q, DK, CHUNKS)
    acc = tl.zeros([BM, CB], dtype=tl.float32)
    for _ in range(0, pixels, BN):
        b_s = tl.zeros([BM, BN], dtype=tl.float32)
        b_s = _scores(b_q, p_q, p_k, b_s, DK, CHUNKS, PRECISION, RESIDENT)
        b_a = tl.maximum(b_s, 0.0, propagate_nan=tl.PropagateNan.ALL).to(y.dtype.element_ty)  # [BM, BN]
        acc = product(b_a, tl.load(p_y), acc, PRECISION)
        p_k += BN * D
        p_y += BN * CB
    if NORMALISE:
        b_total = tl.sum(tl.where((o_c == CB - 1)[None, :], acc, 0.0), 1) + eps
        acc = acc / b_total[:, None]
        if i_group == 0:
            tl.store(total + i_n * padded + o_m, b_total)
    else:
        acc = acc / pixels
    o_class = i_group * (CB - 1) + o_c
    m_o = (o_m < pixels)[:, None] & ((o_class < C) & (o_c < CB - 1))[None, :]
    p_o = out + i_n * stride_on + o_m.to(tl.int64)[:, None] * stride_op + o_class.to(tl.int64)[None, :] * stride_oc
    tl.store(p_o, acc.to(out.dtype.element_ty), mask=m_o)


@triton.jit
def _prepare_backward_kernel(
    z, grad, out, total,
    stride_gn, stride_gc, stride_gp, stride_on, stride_oc, stride_op,
    pixels, padded, C, eps,
    CB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Z = pixels * [dO / s, -sum_c(dO O) / s], pixels before channels; zeros where a column has no affinity."""
    i_n = tl.program_id(1).to(tl.int64)
    o_p = tl.program_id(0) * BP + tl.arange(0, BP)
    o_c = tl.arange(0, CB)
    b_total = tl.load(total + i_n * padded + o_p)
    b_scale = tl.where(b_total <= eps, 0.0, pixels / b_total)  # NaN stays
    groups = tl.cdiv(C, CB - 1)
    for group in range(groups):
        o_class = group * (CB - 1) + o_c
        m_c = (o_p < pixels)[:, None] & ((o_class < C) & (o_c < CB - 1))[None, :]
        o_row, o_column = o_p.to(tl.int64)[:, None], o_class.to(tl.int64)[None, :]
        p_g = grad + i_n * stride_gn + o_row * stride_gp + o_column * stride_gc
        p_o = out + i_n * stride_on + o_row * stride_op + o_column * stride_oc
        b_g = tl.load(p_g, mask=m_c, other=0.0).to(tl.float32) * b_scale[:, None]  # [BP, CB]
        b_o = tl.load(p_o, mask=m_c, other=0.0).to(tl.float32)
        b_z = tl.where((o_c == CB - 1)[None, :], -tl.sum(b_g * b_o, 1)[:, None], b_g)
        p_z = z + ((i_n * groups + group) * padded + o_p)[:, None] * CB + o_c[None, :]
        tl.store(p_z, b_z.to(z.dtype.element_ty))


@triton.jit
def _both(b_both, y, z, o_i, o_j, PRECISION: tl.constexpr):
    """b_both + Y_i . Z_j + Z_i . Y_j over some columns."""
    b_both = product(tl.load(y + o_i), tl.load(z + o_j).T, b_both, PRECISION)
    return product(tl.load(z + o_i), tl.load(y + o_j).T, b_both, PRECISION)


@triton.jit
def _backward_kernel(
    d_embedding, g, y, z, norm,
    pixels, padded, D, groups, eps,
    DK: tl.constexpr, CHUNKS: tl.constexpr, CB: tl.constexpr, CP: tl.constexpr, UNROLLED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """d_embedding (N, pixels, D) of BM pixels i. A product of Y and Z takes CP of their columns."""
    i_n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BM
    o_r = tl.arange(0, BM)
    o_m = tl.program_id(0) * BM + o_r
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, DK)
    o_c = tl.arange(0, CP)
    DP: tl.constexpr = DK * CHUNKS
    g += i_n * padded * DP
    p_q = g + first * DP + o_r[:, None] * DP + o_d[None, :]
    p_k = g + o_n[:, None] * DP + o_d[None, :]
    o_mc = o_r[:, None] * CB + o_c[None, :]
    o_nc = o_n[:, None] * CB + o_c[None, :]
    b_q = (p_q, p_q, p_q, p_q)
    if RESIDENT:
        b_q = _load_chunks(p_q, DK, CHUNKS)
    acc0 = tl.zeros([BM, DK], dtype=tl.float32)
    if CHUNKS > 1:
        acc1 = tl.zeros([BM, DK], dtype=tl.float32)
    if CHUNKS > 2:
        acc2 = tl.zeros([BM, DK], dtype=tl.float32)
    if CHUNKS > 3:
        acc3 = tl.zeros([BM, DK], dtype=tl.float32)
    for start in range(0, pixels, BN):
        b_s = tl.zeros([BM, BN], dtype=tl.float32)
        b_s = _scores(b_q, p_q, p_k, b_s, DK, CHUNKS, PRECISION, RESIDENT)
        b_both = tl.zeros([BM, BN], dtype=tl.float32)
        o_i = (i_n * groups * padded + first) * CB
        o_j = (i_n * groups * padded + start) * CB
        if UNROLLED:
            for column in tl.static_range(0, CB, CP):
                b_both = _both(b_both, y, z, o_i + column + o_mc, o_j + column + o_nc, PRECISION)
        else:  # code size does not depend on the number of groups; the outer loop is not pipelined
            for column in range(0, groups * CB, CP):
                o_group = column // CB * padded * CB + column % CB
                b_both = _both(b_both, y, z, o_i + o_group + o_mc, o_j + o_group + o_nc, PRECISION)
        b_both = tl.where(b_s <= 0, 0.0, b_both).to(g.dtype.element_ty)  # [BM, BN]; NaN stays
        acc0 = product(b_both, tl.load(p_k), acc0, PRECISION)
        if CHUNKS > 1:
            acc1 = product(b_both, tl.load(p_k + DK), acc1, PRECISION)
        if CHUNKS > 2:
            acc2 = product(b_both, tl.load(p_k + 2 * DK), acc2, PRECISION)
        if CHUNKS > 3:
            acc3 = product(b_both, tl.load(p_k + 3 * DK), acc3, PRECISION)
        p_k += BN * DP

    # through g = e / (||e|| + eps): (dg - g (g . dg) (||e|| + eps) / ||e||) / (||e|| + eps)
    b_along = tl.sum(tl.load(p_q).to(tl.float32) * acc0, 1)
    if CHUNKS > 1:
        b_along += tl.sum(tl.load(p_q + DK).to(tl.float32) * acc1, 1)
    if CHUNKS > 2:
        b_along += tl.sum(tl.load(p_q + 2 * DK).to(tl.float32) * acc2, 1)
    if CHUNKS > 3:
        b_along += tl.sum(tl.load(p_q + 3 * DK).to(tl.float32) * acc3, 1)
    b_norm = tl.load(norm + i_n * padded + o_m)
    b_scale = 1.0 / ((b_norm + eps) * pixels)
    b_along *= tl.where(b_norm > 0, (b_norm + eps) / b_norm, 0.0)
    p_d = d_embedding + (i_n * pixels + first) * D + o_r[:, None] * D
    m_m = o_m < pixels
    _store_chunk(p_d, m_m, p_q, acc0, b_along, b_scale, 0, D, DK)
    if CHUNKS > 1:
        _store_chunk(p_d, m_m, p_q, acc1, b_along, b_scale, 1, D, DK)
    if CHUNKS > 2:
        _store_chunk(p_d, m_m, p_q, acc2, b_along, b_scale, 2, D, DK)
    if CHUNKS > 3:
        _store_chunk(p_d, m_m, p_q, acc3, b_along, b_scale, 3, D, DK)


@triton.jit
def _store_chunk(p_d, m_m, p_q, acc, b_along, b_scale, CHUNK: tl.constexpr, D, DK: tl.constexpr):
    o_d = CHUNK * DK + tl.arange(0, DK)
    b_d = (acc - tl.load(p_q + CHUNK * DK).to(tl.float32) * b_along[:, None]) * b_scale[:, None]
    tl.store(p_d + o_d[None, :], b_d.to(p_d.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])


def obstacle(cam: Tensor, embedding: Tensor) -> str | None:
    """Return why the kernels cannot run on these tensors, or None."""
    if embedding.shape[1] > MAX_DEPTH:
        return f"takes an embedding of up to {MAX_DEPTH} channels, found {embedding.shape[1]}"
    return launch.obstacle(cam, embedding)


def pixel_correlation(cam: Tensor, embedding: Tensor, eps: float) -> Tensor:
    """As ``eager.pixel_correlation``."""
    check(obstacle(cam, embedding))
    return _correlate(cam, embedding, eps)


class _Layout(NamedTuple):
    """Layout of channels in chunks and of classes in groups."""

    chunk: int  # channels in one product
    chunks: int
    columns: int  # classes in one group, plus the column of ones
    groups: int

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"DK": self.chunk, "CHUNKS": self.chunks, "CB": self.columns, "PRECISION": precision(dtype)}


def _layout(depth: int, classes: int) -> _Layout:
    """Return the layout for these sizes. Symbolic sizes become constants of the graph."""
    return _layout_of(int(depth), int(classes))


@functools.cache
def _layout_of(depth: int, classes: int) -> _Layout:
    chunk = min(DK, next_power(depth))
    columns = min(128, next_power(classes + 1))
    return _Layout(chunk, -(-depth // chunk), columns, -(-classes // (columns - 1)))


@functools.cache
def _options(layout: _Layout, dtype: torch.dtype, gpu: str, backward: bool) -> dict[str, Any]:
    """Return constants and launch options of the forward or the backward kernel."""
    numbers = "tf32" if dtype == torch.float32 else "half"
    channels, constants = layout.chunk * layout.chunks, layout.constants(dtype)
    if not backward:
        return constants | launch.fitting(FORWARD, numbers, gpu, channels, layout.columns).options()
    blocks = launch.fitting(BACKWARD, numbers, gpu, channels, layout.columns * layout.groups)
    return constants | blocks.options() | {"CP": min(CP, layout.columns), "UNROLLED": blocks.unrolled}


def _padded(pixels: int) -> int:
    return -(-pixels // PAD) * PAD


def _forward(cam: Tensor, embedding: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return output, column sums (N, padded), g (N, padded, D), Y (N, groups, padded, columns), norms (N, padded)."""
    batch, classes, pixels = cam.shape
    depth = embedding.shape[1]
    padded, layout = _padded(pixels), _layout(depth, classes)
    out, total, g, y, norm = _fake_forward(cam, embedding, eps)
    options = _options(layout, g.dtype, launch.family_of(cam.get_device()), False)
    with on_device(cam):
        _prepare_kernel[(padded // 32, batch)](
            g, y, norm, embedding, cam, *embedding.stride(), *cam.stride(), pixels, padded, depth, classes, eps,
            DK=layout.chunk, CHUNKS=layout.chunks, CB=layout.columns, BP=32,
        )  # fmt: skip
        _forward_kernel[(padded // options["BM"], layout.groups, batch)](
            out, total, g, y, *out.stride(), pixels, padded, classes, eps, NORMALISE=True, **options
        )
    return out, total, g, y, norm


def _backward(
    grad: Tensor,
    out: Tensor,
    total: Tensor,
    g: Tensor,
    y: Tensor,
    norm: Tensor,
    eps: float,
    depth: int,
    cam_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return the CAM's gradient, or (0,), and the embedding's gradient (N, D, pixels), channels last in memory."""
    batch, classes, pixels = out.shape
    padded, layout = _padded(pixels), _layout(depth, classes)
    outputs = d_cam, d_embedding = _fake_backward(grad, out, total, g, y, norm, eps, depth, cam_needs_grad)
    scale = None
    if g.dtype == torch.float16:
        scale = launch.half_scale(_largest(grad, total, y, eps))
        grad = grad / scale
        d_cam, d_embedding = (torch.empty_like(output, dtype=torch.float32) for output in outputs)
    z = torch.empty_like(y)
    gpu = launch.family_of(grad.get_device())
    options = _options(layout, g.dtype, gpu, True)
    with on_device(grad):
        _prepare_backward_kernel[(padded // 32, batch)](
            z, grad, out, total, *grad.stride(), *out.stride(), pixels, padded, classes, eps, CB=layout.columns, BP=32
        )
        _backward_kernel[(padded // options["BM"], batch)](
            d_embedding, g, y, z, norm, pixels, padded, depth, layout.groups, eps, **options
        )
        if cam_needs_grad:
            options = _options(layout, g.dtype, gpu, False)
            _forward_kernel[(padded // options["BM"], layout.groups, batch)](
                d_cam, total, g, z, *d_cam.stride(), pixels, padded, classes, eps, NORMALISE=False, **options
            )
    if scale is not None:
        launch.multiply((d_cam, d_embedding), scale, outputs)
    return outputs


def _largest(grad: Tensor, total: Tensor, y: Tensor, eps: float) -> Tensor:
    """Return a bound of |Z| and of |Y . Z| / 2 for each image. Y's ones make it a bound of Z."""
    pixels = grad.shape[2]
    total = total[:, :pixels]
    columns = torch.linalg.vector_norm(grad, 1, dim=1, dtype=torch.float32) / total
    columns.masked_fill_(total <= eps, 0)
    return pixels * columns.amax(dim=1) * torch.linalg.vector_norm(y, float("inf"), dim=(1, 2, 3))


def _fake_forward(cam: Tensor, embedding: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, classes, pixels = cam.shape
    padded, layout = _padded(pixels), _layout(embedding.shape[1], classes)
    total = cam.new_empty((batch, padded), dtype=torch.float32)
    g = embedding.new_empty((batch, padded, layout.chunk * layout.chunks))
    y = embedding.new_empty((batch, layout.groups, padded, layout.columns))
    return cam.new_empty(cam.shape), total, g, y, torch.empty_like(total)


def _fake_backward(grad: Tensor, out: Tensor, total: Tensor, g: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, depth, cam_needs_grad = others
    batch, _, pixels = out.shape
    d_cam = grad.new_empty(out.shape if cam_needs_grad else (0,))
    return d_cam, g.new_empty((batch, pixels, depth)).mT


def _save(ctx, inputs, output) -> None:
    _, embedding, ctx.eps = inputs
    ctx.depth = embedding.shape[1]
    ctx.save_for_backward(*output)


def _differentiate(ctx, grad, backward):
    cam_needs_grad = ctx.needs_input_grad[0]
    with eager.full_precision(grad):
        d_cam, d_embedding = backward(grad, *ctx.saved_tensors, ctx.eps, ctx.depth, cam_needs_grad)
    return d_cam if cam_needs_grad else None, d_embedding, None


_correlate = operation(
    "pixel_correlation_triton", _forward, _fake_forward, _backward, _fake_backward,
    save=_save, differentiate=_differentiate,
)  # fmt: skip
