"""Region pooling and region correlation in Triton.

Both are a softmax over pixels for a few dozen regions, so one read of the features is the bound. Programs split the
pixels; each keeps the running maximum and sum of its pixels, and a second small kernel joins them. Backward needs
sum_p(P dP) of a softmax, which is an inner product of the output and its gradient and costs no pass. Correlation stores
the logits' gradient; with float16 operands the gradient gets a scale for each image (``launch.half_scale``).

Per image of P pixels: pooling reads C P + D P values and does 2 P C D FLOPs. Correlation reads E P + C P values, writes
and reads C P float32 logits instead of reading the E P queries twice, and does 2 P C E FLOPs.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpn_fast.kernels import region_tiled
from cpn_fast.kernels.launch import (
    check,
    family_of,
    half_scale,
    multiply,
    next_power,
    obstacle,
    on_device,
    precision,
    product,
)
from cpn_fast.kernels.operators import operation

BP = 32  # pixels of a block
BD = 64  # channels of a block
SPLITS = 8  # programs that share an image's pixels in pooling
JOINED = 256  # channels that a program joins
OPTIONS = {"num_warps": 8, "num_stages": 2}


@triton.jit
def _base(b_high):
    """Offset of the exponents. A block of -inf contributes nothing, but -inf - (-inf) would be NaN."""
    return tl.where(b_high == float("-inf"), 0.0, b_high)


@triton.jit
def _pool_kernel(
    partial, highs, sums, cam, features,
    stride_cn, stride_cc, stride_cp, stride_fn, stride_fd, stride_fp,
    pixels, per_split, C, D, splits,
    CB: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Unnormalised sums over one split of the pixels, relative to its maximum, which is stored too."""
    i_split = tl.program_id(0)
    i_d = tl.program_id(1)
    groups = tl.cdiv(C, CB)
    i_n = (tl.program_id(2) // groups).to(tl.int64)
    o_c = ((tl.program_id(2) % groups) * CB + tl.arange(0, CB)).to(tl.int64)
    o_d = (i_d * BD + tl.arange(0, BD)).to(tl.int64)
    b_high = tl.full([CB], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([CB], dtype=tl.float32)
    acc = tl.zeros([CB, BD], dtype=tl.float32)
    first = i_split * per_split
    for start in range(first, min(first + per_split, pixels), BP):
        o_p = start + tl.arange(0, BP)
        m_p = o_p < pixels
        o_64 = o_p.to(tl.int64)
        p_c = cam + i_n * stride_cn + o_c[:, None] * stride_cc + o_64[None, :] * stride_cp
        b_c = tl.load(p_c, mask=(o_c < C)[:, None] & m_p[None, :], other=0.0).to(tl.float32)  # [CB, BP]
        b_c = tl.where(m_p[None, :], b_c, float("-inf"))
        b_new = tl.maximum(b_high, tl.max(b_c, 1))
        b_base = _base(b_new)
        b_e = tl.exp(b_c - b_base[:, None])
        b_scale = tl.exp(b_high - b_base)
        b_sum = b_sum * b_scale + tl.sum(b_e, 1)
        p_f = features + i_n * stride_fn + o_64[:, None] * stride_fp + o_d[None, :] * stride_fd
        b_f = tl.load(p_f, mask=m_p[:, None] & (o_d < D)[None, :], other=0.0)  # [BP, BD]
        acc = product(b_e.to(b_f.dtype), b_f, acc * b_scale[:, None], PRECISION)
        b_high = b_new
    o_row = (i_n * splits + i_split) * C + o_c
    tl.store(partial + o_row[:, None] * D + o_d[None, :], acc, mask=(o_c < C)[:, None] & (o_d < D)[None, :])
    if i_d == 0:
        tl.store(highs + o_row, b_high, mask=o_c < C)
        tl.store(sums + o_row, b_sum, mask=o_c < C)


@triton.jit
def _join_kernel(
    pooled, high, total, partial, highs, sums, C, D, splits, DB: tl.constexpr, SB: tl.constexpr
):  # fmt: skip
    """Join the splits of one region in a block of channels."""
    i_c = tl.program_id(0)
    i_n = tl.program_id(1).to(tl.int64)
    o_s = tl.arange(0, SB)
    o_d = (tl.program_id(2) * DB + tl.arange(0, DB)).to(tl.int64)
    o_row = (i_n * splits + o_s) * C + i_c
    b_highs = tl.load(highs + o_row, mask=o_s < splits, other=float("-inf"))
    b_high = tl.max(b_highs, 0)
    b_weights = tl.exp(b_highs - b_high)
    b_total = tl.sum(b_weights * tl.load(sums + o_row, mask=o_s < splits, other=0.0), 0)
    m_p = (o_s < splits)[:, None] & (o_d < D)[None, :]
    b_p = tl.load(partial + o_row[:, None] * D + o_d[None, :], mask=m_p, other=0.0)  # [SB, DB]
    b_z = tl.sum(b_p * b_weights[:, None], 0) / b_total
    tl.store(pooled + (i_n * C + i_c) * D + o_d, b_z.to(pooled.dtype.element_ty), mask=o_d < D)
    if tl.program_id(2) == 0:
        tl.store(high + i_n * C + i_c, b_high)
        tl.store(total + i_n * C + i_c, b_total)


@triton.jit
def _share(cam, high, total, o_c, o_p, C, pixels, stride_c, stride_p):
    """The softmax of a block of the CAM, [CB, BP]; zeros outside."""
    m_c = o_c < C
    m = m_c[:, None] & (o_p < pixels)[None, :]
    p_c = cam + o_c.to(tl.int64)[:, None] * stride_c + o_p.to(tl.int64)[None, :] * stride_p
    b_c = tl.load(p_c, mask=m, other=0.0)
    b_high = tl.load(high + o_c, mask=m_c, other=0.0)
    b_total = tl.load(total + o_c, mask=m_c, other=1.0)
    return tl.where(m, tl.exp(b_c.to(tl.float32) - b_high[:, None]) / b_total[:, None], 0.0)


@triton.jit
def _pool_backward_kernel(
    d_cam, d_features, grad, along, cam, features, high, total,
    stride_cn, stride_cc, stride_cp, stride_fn, stride_fd, stride_fp, stride_dn, stride_dd, stride_dp,
    pixels, C, D, unit,
    OF_CAM: tl.constexpr, OF_FEATURES: tl.constexpr,
    CB: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_cam = P (dZ F - along), d_features = dZ^T P for one block of pixels; P is the softmax."""
    i_n = tl.program_id(1).to(tl.int64)
    o_p = tl.program_id(0) * BP + tl.arange(0, BP)
    o_64 = o_p.to(tl.int64)
    m_p = o_p < pixels
    cam += i_n * stride_cn
    high += i_n * C
    total += i_n * C
    grad += i_n * C * D
    if OF_CAM:
        for start_c in range(0, C, CB):
            o_c = start_c + tl.arange(0, CB)
            b_share = _share(cam, high, total, o_c, o_p, C, pixels, stride_cc, stride_cp)
            acc = tl.zeros([CB, BP], dtype=tl.float32)
            for start_d in range(0, D, BD):
                o_d = start_d + tl.arange(0, BD)
                m_g = (o_c < C)[:, None] & (o_d < D)[None, :]
                b_g = tl.load(grad + o_c[:, None] * D + o_d[None, :], mask=m_g, other=0.0)  # [CB, BD]
                p_f = features + i_n * stride_fn + o_d.to(tl.int64)[:, None] * stride_fd + o_64[None, :] * stride_fp
                b_f = tl.load(p_f, mask=(o_d < D)[:, None] & m_p[None, :], other=0.0)  # [BD, BP]
                acc = product(b_g, b_f, acc, PRECISION)
            b_along = tl.load(along + i_n * C + o_c, mask=o_c < C, other=0.0)
            p_d = d_cam + (i_n * C + o_c)[:, None] * pixels + o_p[None, :]
            b_d = b_share * (acc - b_along[:, None])
            tl.store(p_d, b_d.to(d_cam.dtype.element_ty), mask=(o_c < C)[:, None] & m_p[None, :])
    if OF_FEATURES:
        for start_d in range(0, D, BD):
            o_d = start_d + tl.arange(0, BD)
            acc_f = tl.zeros([BD, BP], dtype=tl.float32)
            for start_c in range(0, C, CB):
                o_c = start_c + tl.arange(0, CB)
                m_g = (o_c < C)[None, :] & (o_d < D)[:, None]
                b_g = tl.load(grad + o_c[None, :] * D + o_d[:, None], mask=m_g, other=0.0)  # [BD, CB]
                b_share = _share(cam, high, total, o_c, o_p, C, pixels, stride_cc, stride_cp) * unit
                acc_f = product(b_g, b_share.to(b_g.dtype), acc_f, PRECISION)
            p_d = d_features + i_n * stride_dn + o_d.to(tl.int64)[:, None] * stride_dd + o_64[None, :] * stride_dp
            b_d = (acc_f / unit).to(d_features.dtype.element_ty)
            tl.store(p_d, b_d, mask=(o_d < D)[:, None] & m_p[None, :])


@triton.jit
def _logits_kernel(
    logits, highs, sums, keys, queries,
    stride_qn, stride_qe, stride_qp,
    pixels, C, E, scale, blocks,
    CB: tl.constexpr, BE: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * keys @ queries for one block of pixels, with its maxima and sums."""
    i_p = tl.program_id(0)
    i_n = tl.program_id(1).to(tl.int64)
    o_p = i_p * BP + tl.arange(0, BP)
    m_p = o_p < pixels
    for start_c in range(0, C, CB):
        o_c = (start_c + tl.arange(0, CB)).to(tl.int64)
        m_c = o_c < C
        acc = tl.zeros([CB, BP], dtype=tl.float32)
        for start_e in range(0, E, BE):
            o_e = (start_e + tl.arange(0, BE)).to(tl.int64)
            p_k = keys + (i_n * C + o_c)[:, None] * E + o_e[None, :]
            b_k = tl.load(p_k, mask=m_c[:, None] & (o_e < E)[None, :], other=0.0)  # [CB, BE]
            p_q = queries + i_n * stride_qn + o_e[:, None] * stride_qe + o_p.to(tl.int64)[None, :] * stride_qp
            b_q = tl.load(p_q, mask=(o_e < E)[:, None] & m_p[None, :], other=0.0)  # [BE, BP]
            acc = product(b_k, b_q, acc, PRECISION)
        b_l = tl.where(m_p[None, :], acc * scale, float("-inf"))
        b_high = tl.max(b_l, 1)
        b_sum = tl.sum(tl.exp(b_l - _base(b_high)[:, None]), 1)
        tl.store(logits + (i_n * C + o_c)[:, None] * pixels + o_p[None, :], b_l, mask=m_c[:, None] & m_p[None, :])
        tl.store(highs + (i_n * C + o_c) * blocks + i_p, b_high, mask=m_c)
        tl.store(sums + (i_n * C + o_c) * blocks + i_p, b_sum, mask=m_c)


@triton.jit
def _correlate_kernel(
    out, logits, highs, sums, high, total, cam,
    stride_cn, stride_cc, stride_cp,
    pixels, C, blocks,
    SB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """cam * exp(logits - high) / total for one region. Every program joins the blocks' maxima and sums itself."""
    i_p = tl.program_id(0)
    i_c = tl.program_id(1).to(tl.int64)
    i_n = tl.program_id(2).to(tl.int64)
    i_row = i_n * C + i_c
    b_high = tl.full([SB], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([SB], dtype=tl.float32)
    for start in range(0, blocks, SB):
        o_s = start + tl.arange(0, SB)
        b_h = tl.load(highs + i_row * blocks + o_s, mask=o_s < blocks, other=float("-inf"))
        b_s = tl.load(sums + i_row * blocks + o_s, mask=o_s < blocks, other=0.0)
        b_new = tl.maximum(b_high, b_h)
        b_base = _base(b_new)
        b_sum = b_sum * tl.exp(b_high - b_base) + b_s * tl.exp(b_h - b_base)
        b_high = b_new
    b_top = tl.max(b_high, 0)
    b_total = tl.sum(b_sum * tl.exp(b_high - b_top), 0)
    o_p = i_p * BP + tl.arange(0, BP)
    m_p = o_p < pixels
    b_share = tl.exp(tl.load(logits + i_row * pixels + o_p, mask=m_p, other=0.0) - b_top) / b_total
    b_c = tl.load(cam + i_n * stride_cn + i_c * stride_cc + o_p.to(tl.int64) * stride_cp, mask=m_p, other=0.0)
    tl.store(out + i_row * pixels + o_p, (b_c.to(tl.float32) * b_share).to(out.dtype.element_ty), mask=m_p)
    if i_p == 0:
        tl.store(high + i_row, b_top)
        tl.store(total + i_row, b_total)


@triton.jit
def _correlate_backward_kernel(
    d_cam, d_logits, d_queries, grad, along, cam, logits, high, total, keys,
    stride_gn, stride_gc, stride_gp, stride_cn, stride_cc, stride_cp, stride_dn, stride_de, stride_dp,
    pixels, C, E, scale, unit,
    OF_CAM: tl.constexpr, OF_LOGITS: tl.constexpr, OF_QUERIES: tl.constexpr,
    CB: tl.constexpr, BE: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_cam = dO P; d_logits = unit * P (dO cam - along); d_queries = scale * keys^T d_logits / unit."""
    i_n = tl.program_id(1).to(tl.int64)
    o_p = tl.program_id(0) * BP + tl.arange(0, BP)
    o_64 = o_p.to(tl.int64)
    m_p = o_p < pixels
    logits += i_n * C * pixels
    high += i_n * C
    total += i_n * C
    d_logits += i_n * C * pixels
    for start_c in range(0, C, CB):
        o_c = (start_c + tl.arange(0, CB)).to(tl.int64)
        m = (o_c < C)[:, None] & m_p[None, :]
        b_share = _share(logits, high, total, o_c, o_p, C, pixels, pixels, 1)
        p_g = grad + i_n * stride_gn + o_c[:, None] * stride_gc + o_64[None, :] * stride_gp
        p_c = cam + i_n * stride_cn + o_c[:, None] * stride_cc + o_64[None, :] * stride_cp
        b_g = tl.load(p_g, mask=m, other=0.0).to(tl.float32)
        o_out = o_c[:, None] * pixels + o_p[None, :]
        if OF_CAM:
            tl.store(d_cam + i_n * C * pixels + o_out, (b_g * b_share).to(d_cam.dtype.element_ty), mask=m)
        if OF_LOGITS:
            b_c = tl.load(p_c, mask=m, other=0.0).to(tl.float32)
            b_along = tl.load(along + i_n * C + o_c, mask=o_c < C, other=0.0)
            b_d = b_share * (b_g * b_c - b_along[:, None]) * unit
            tl.store(d_logits + o_out, b_d.to(d_logits.dtype.element_ty), mask=m)
    if OF_QUERIES:
        tl.debug_barrier()
        for start_e in range(0, E, BE):
            o_e = (start_e + tl.arange(0, BE)).to(tl.int64)
            acc = tl.zeros([BE, BP], dtype=tl.float32)
            for start_c in range(0, C, CB):
                o_c = (start_c + tl.arange(0, CB)).to(tl.int64)
                m = (o_c < C)[:, None] & m_p[None, :]
                b_d = tl.load(d_logits + o_c[:, None] * pixels + o_p[None, :], mask=m, other=0.0)  # [CB, BP]
                p_k = keys + (i_n * C + o_c)[None, :] * E + o_e[:, None]
                b_k = tl.load(p_k, mask=(o_c < C)[None, :] & (o_e < E)[:, None], other=0.0)  # [BE, CB]
                acc = product(b_k, b_d, acc, PRECISION)
            p_d = d_queries + i_n * stride_dn + o_e[:, None] * stride_de + o_64[None, :] * stride_dp
            b_q = (acc * (scale / unit)).to(d_queries.dtype.element_ty)
            tl.store(p_d, b_q, mask=(o_e < E)[:, None] & m_p[None, :])


def region_pooling(cam: Tensor, features: Tensor) -> Tensor:
    """As ``eager.region_pooling``."""
    check(obstacle(cam, features))
    return _pool(cam, features)


def region_correlation(cam: Tensor, keys: Tensor, queries: Tensor, scale: float) -> Tensor:
    """As ``eager.region_correlation``."""
    check(obstacle(cam, keys, queries))
    return _correlate(cam, keys.to(queries.dtype), queries, scale)


def _class_block(classes: int) -> int:
    return min(64, next_power(classes))


def options(classes: int, numbers: str) -> dict[str, int]:
    """Return the launch options of the kernels with a product.

    With two stages, float32 and class blocks other than the paper's spill on some GPUs.
    """
    return OPTIONS if _class_block(classes) == 32 and numbers == "half" else OPTIONS | {"num_stages": 1}


def pool_backward_options(classes: int, numbers: str, family: str) -> dict[str, int]:
    """Return the launch options of the pool's backward kernel on a family of GPUs (``launch.family``).

    With two stages, Triton 3.8 spills on sm_86 and sm_89.
    """
    chosen = options(classes, numbers)
    return chosen | {"num_stages": 1} if family == "ampere" else chosen


def _unit(pixels: int, dtype: torch.dtype) -> int:
    """Return a softmax's factor before a product: float16 would lose 1 / pixels, and its maximum is 65,504."""
    return min(pixels, 1 << 15) if dtype == torch.float16 else 1


def _forward_pool(cam: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and maxima and sums of the softmax (N, C)."""
    (batch, classes, pixels), depth = cam.shape, features.shape[1]
    per_split = triton.cdiv(triton.cdiv(pixels, SPLITS), BP) * BP
    splits = triton.cdiv(pixels, per_split)
    block, numbers = _class_block(classes), precision(features.dtype)
    pooled, high, total = _fake_pool(cam, features)
    highs, sums = (torch.empty(batch, splits, classes, dtype=torch.float32, device=cam.device) for _ in range(2))
    partial = torch.empty(batch, splits, classes, depth, dtype=torch.float32, device=cam.device)
    with on_device(cam):
        _pool_kernel[(splits, triton.cdiv(depth, BD), batch * triton.cdiv(classes, block))](
            partial, highs, sums, cam, features, *cam.stride(), *features.stride(),
            pixels, per_split, classes, depth, splits,
            CB=block, BD=BD, BP=BP, PRECISION=numbers, **options(classes, numbers),
        )  # fmt: skip
        _join_kernel[(classes, batch, triton.cdiv(depth, JOINED))](
            pooled, high, total, partial, highs, sums, classes, depth, splits, DB=JOINED, SB=SPLITS, **OPTIONS,
        )  # fmt: skip
    return pooled, high, total


def _backward_pool(
    grad: Tensor,
    cam: Tensor,
    features: Tensor,
    pooled: Tensor,
    high: Tensor,
    total: Tensor,
    of_cam: bool,
    of_features: bool,
) -> tuple[Tensor, Tensor]:
    (batch, classes, pixels), depth = cam.shape, features.shape[1]
    d_cam, d_features = _fake_backward_pool(grad, cam, features, pooled, high, total, of_cam, of_features)
    grad, numbers = grad.contiguous(), precision(features.dtype)
    along = torch.linalg.vecdot(grad.float(), pooled.float()) if of_cam else high
    launch = pool_backward_options(classes, numbers, family_of(cam.get_device()))
    with on_device(cam):
        _pool_backward_kernel[(triton.cdiv(pixels, BP), batch)](
            d_cam, d_features, grad, along, cam, features, high, total,
            *cam.stride(), *features.stride(), *d_features.stride(),
            pixels, classes, depth, _unit(pixels, features.dtype),
            OF_CAM=of_cam, OF_FEATURES=of_features,
            CB=_class_block(classes), BD=BD, BP=BP, PRECISION=numbers, **launch,
        )  # fmt: skip
    return d_cam, d_features


def _forward_correlate(
    cam: Tensor, keys: Tensor, queries: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, float32 logits, and their maxima and sums (N, C)."""
    (batch, classes, pixels), depth = cam.shape, queries.shape[1]
    blocks, numbers = triton.cdiv(pixels, BP), precision(queries.dtype)
    out, logits, high, total = _fake_correlate(cam, keys, queries, scale)
    highs, sums = (torch.empty(batch, classes, blocks, dtype=torch.float32, device=cam.device) for _ in range(2))
    with on_device(cam):
        _logits_kernel[(blocks, batch)](
            logits, highs, sums, keys.contiguous(), queries, *queries.stride(), pixels, classes, depth, scale, blocks,
            CB=_class_block(classes), BE=BD, BP=BP, PRECISION=numbers, **options(classes, numbers),
        )  # fmt: skip
        _correlate_kernel[(triton.cdiv(pixels, 1024), classes, batch)](
            out, logits, highs, sums, high, total, cam, *cam.stride(), pixels, classes, blocks,
            SB=64, BP=1024, **OPTIONS,
        )  # fmt: skip
    return out, logits, high, total


def _backward_correlate(
    grad: Tensor,
    cam: Tensor,
    keys: Tensor,
    queries: Tensor,
    out: Tensor,
    logits: Tensor,
    high: Tensor,
    total: Tensor,
    scale: float,
    of_cam: bool,
    of_keys: bool,
    of_queries: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, classes, pixels), depth = cam.shape, queries.shape[1]
    outputs = d_cam, d_keys, d_queries = _fake_backward_correlate(
        grad, cam, keys, queries, out, logits, high, total, scale, of_cam, of_keys, of_queries
    )
    of_logits, unit, numbers = of_keys or of_queries, _unit(pixels, queries.dtype), precision(queries.dtype)
    image_scale = None
    if of_logits and queries.dtype == torch.float16:
        image_scale = half_scale(_largest(grad, cam, queries, logits) * unit)
        grad = grad / image_scale
        d_cam, d_keys, d_queries = (torch.empty_like(output, dtype=torch.float32) for output in outputs)
    along = torch.linalg.vecdot(grad.float(), out.float()) if of_logits else high
    d_logits = torch.empty(batch if of_logits else 0, classes, pixels, dtype=queries.dtype, device=cam.device)
    with on_device(cam):
        _correlate_backward_kernel[(triton.cdiv(pixels, BP), batch)](
            d_cam, d_logits, d_queries, grad, along, cam, logits, high, total, keys.contiguous(),
            *grad.stride(), *cam.stride(), *d_queries.stride(), pixels, classes, depth, scale, unit,
            OF_CAM=of_cam, OF_LOGITS=of_logits, OF_QUERIES=of_queries,
            CB=_class_block(classes), BE=BD, BP=BP, PRECISION=numbers, **options(classes, numbers),
        )  # fmt: skip
    if of_keys:
        torch.mul(torch.bmm(d_logits, queries.mT).to(d_keys.dtype), scale / unit, out=d_keys)
    if image_scale is not None:
        multiply((d_cam, d_keys, d_queries), image_scale, outputs)
    return outputs


def _largest(grad: Tensor, cam: Tensor, queries: Tensor, logits: Tensor) -> Tensor:
    """Return a bound, for each image, of the sum over pixels of |d_logits|, and of that of |d_logits queries|."""
    sums = torch.linalg.vector_norm(logits.softmax(dim=2) * cam * grad, 1, dim=2)
    # 2: sum_p(P dP) is no larger than the sum; 1: without queries the bound is that of d_logits
    return 2 * sums.amax(dim=1) * torch.linalg.vector_norm(queries, float("inf"), dim=(1, 2)).clamp(min=1)


def _in_layout_of(tensor: Tensor, wanted: bool) -> Tensor:
    """Return an empty (N, D, P) in the tensor's memory layout, or one of no image if it is not wanted."""
    batch, depth, pixels = tensor.shape
    if tensor.stride(1) == 1:
        return tensor.new_empty(batch if wanted else 0, pixels, depth).mT
    return tensor.new_empty(batch if wanted else 0, depth, pixels)


def _fake_pool(cam: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    statistic = torch.empty(cam.shape[:2], dtype=torch.float32, device=cam.device)
    return features.new_empty(*cam.shape[:2], features.shape[1]), statistic, torch.empty_like(statistic)


def _fake_backward_pool(
    grad: Tensor,
    cam: Tensor,
    features: Tensor,
    pooled: Tensor,
    high: Tensor,
    total: Tensor,
    of_cam: bool,
    of_features: bool,
) -> tuple[Tensor, Tensor]:
    return region_tiled.empty_gradient(cam, of_cam), _in_layout_of(features, of_features)


def _fake_correlate(cam: Tensor, keys: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistic = torch.empty(cam.shape[:2], dtype=torch.float32, device=cam.device)
    logits = torch.empty(cam.shape, dtype=torch.float32, device=cam.device)
    return cam.new_empty(cam.shape), logits, statistic, torch.empty_like(statistic)


def _fake_backward_correlate(
    grad: Tensor,
    cam: Tensor,
    keys: Tensor,
    queries: Tensor,
    out: Tensor,
    logits: Tensor,
    high: Tensor,
    total: Tensor,
    scale: float,
    of_cam: bool,
    of_keys: bool,
    of_queries: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_cam, d_keys = region_tiled.empty_gradient(cam, of_cam), region_tiled.empty_gradient(keys, of_keys)
    return d_cam, d_keys, _in_layout_of(queries, of_queries)


_pool = operation(
    "region_pooling_triton", _forward_pool, _fake_pool, _backward_pool, _fake_backward_pool,
    save=region_tiled.save, differentiate=region_tiled.differentiate,
)  # fmt: skip
_correlate = operation(
    "region_correlation_triton", _forward_correlate, _fake_correlate, _backward_correlate, _fake_backward_correlate,
    save=region_tiled.save, differentiate=region_tiled.differentiate,
)  # fmt: skip
