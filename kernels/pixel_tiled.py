"""Pixel correlation on any device in blocks. It holds a (P, P) matrix only if that is one block: for P up to 256 on a
CPU and 1,024 elsewhere.

With A = relu(g^T g), s = column sums of A + eps and O the output, a column's gradient is
dA[i, j] = (cam[:, i] - O[:, j]) . dO[:, j] / s[j] where A[i, j] > 0. A is symmetric, so one block also gives its mirror
image.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cpn_fast.kernels import eager
from cpn_fast.kernels.operators import operation

_ROWS, _COLUMNS = 256, 512  # a float32 block is half of a 1 MiB cache
_ACCELERATOR_SIDE = 1024  # on an accelerator few large products beat many small ones; 4 MiB in float32


def pixel_correlation(cam: Tensor, embedding: Tensor, eps: float) -> Tensor:
    """As ``eager.pixel_correlation``, computed in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(eager.statistics_dtype(cam), embedding.dtype)
    return _correlate(cam.to(wide), embedding.to(wide), eps).to(cam.dtype)


def _forward(cam: Tensor, embedding: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the output, and the columns' sums + eps (N, 1, P)."""
    out = cam.new_empty(cam.shape)
    total = cam.new_empty(cam.shape[0], 1, cam.shape[2])
    for n in range(cam.shape[0]):
        g = eager.unit_columns(embedding[n : n + 1], eps)[0].contiguous()
        rows = g.mT.contiguous()
        summands = torch.cat([cam[n], cam.new_ones(1, cam.shape[2])])
        sums = torch.zeros_like(summands)
        for i, j, mirrored in _blocks(g):
            _carry(sums, summands, torch.mm(rows[i], g[:, j]).relu_(), i, j, mirrored)
        total[n] = sums[-1:] + eps
        torch.div(sums[:-1], total[n], out=out[n])
    return out, total


def _backward(
    grad: Tensor, cam: Tensor, embedding: Tensor, out: Tensor, total: Tensor, eps: float, cam_needs_grad: bool
) -> tuple[Tensor, Tensor]:
    d_cam = torch.zeros_like(cam if cam_needs_grad else cam[:0], memory_format=torch.contiguous_format)
    d_embedding = embedding.new_empty(embedding.shape)
    for n in range(cam.shape[0]):
        g = eager.unit_columns(embedding[n : n + 1], eps)[0].contiguous()
        rows = g.mT.contiguous()
        scaled = grad[n] / total[n]
        along = (scaled * out[n]).sum(dim=0, keepdim=True)
        one = torch.ones_like(along)
        # left[i] . right[j] = dA[i, j] + dA[j, i] wherever A is positive
        left = torch.cat([cam[n], scaled, one, along]).mT.contiguous()
        right = torch.cat([scaled, cam[n], -along, -one])
        d_rows = torch.zeros_like(rows)
        for i, j, mirrored in _blocks(g):
            affinity = torch.mm(rows[i], g[:, j])
            both = torch.ops.aten.threshold_backward(torch.mm(left[i], right[:, j]), affinity, 0)
            d_rows[i].addmm_(both, rows[j])
            d_rows[mirrored].addmm_(both[:, mirrored.start - j.start :].mT, rows[i])
            if cam_needs_grad:
                _carry(d_cam[n], scaled, affinity.relu_(), i, j, mirrored)
        # through g = e / (||e|| + eps): (dg - g (g . dg) (||e|| + eps) / ||e||) / (||e|| + eps)
        norm = torch.linalg.vector_norm(embedding[n], dim=0)
        along = torch.linalg.vecdot(rows, d_rows) * torch.where(norm > 0, (norm + eps) / norm, 0)
        d_rows.addcmul_(rows, along[:, None], value=-1)
        d_embedding[n] = d_rows.div_((norm + eps)[:, None]).mT
    return d_cam, d_embedding


def _blocks(g: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield blocks (i, j) of the upper triangle, and the part of j whose mirror image lies below the diagonal."""
    pixels = g.shape[1]
    height, width = (_ROWS, _COLUMNS) if g.device.type == "cpu" else (_ACCELERATOR_SIDE, _ACCELERATOR_SIDE)
    for top in range(0, pixels, height):
        bottom = min(top + height, pixels)
        for left in range(top, pixels, width):
            right = min(left + width, pixels)
            yield slice(top, bottom), slice(left, right), slice(min(max(bottom, left), right), right)


def _carry(sums: Tensor, summands: Tensor, affinity: Tensor, i: slice, j: slice, mirrored: slice) -> None:
    """sums += summands @ A for one block of A and its mirror image."""
    sums[:, j].addmm_(summands[:, i], affinity)
    sums[:, i].addmm_(summands[:, mirrored], affinity[:, mirrored.start - j.start :].mT)


def _fake_forward(cam: Tensor, embedding: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return cam.new_empty(cam.shape), cam.new_empty(cam.shape[0], 1, cam.shape[2])


def _fake_backward(
    grad: Tensor, cam: Tensor, embedding: Tensor, out: Tensor, total: Tensor, eps: float, cam_needs_grad: bool
) -> tuple[Tensor, Tensor]:
    return cam.new_empty((cam if cam_needs_grad else cam[:0]).shape), embedding.new_empty(embedding.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    cam, embedding, ctx.eps = inputs
    ctx.save_for_backward(cam, embedding, *output)


def _differentiate(ctx, grad, backward):  # type: ignore[no-untyped-def]
    cam_needs_grad = ctx.needs_input_grad[0]
    with eager.full_precision(grad):
        d_cam, d_embedding = backward(grad, *ctx.saved_tensors, ctx.eps, cam_needs_grad)
    return d_cam if cam_needs_grad else None, d_embedding, None


_correlate = operation(
    "pixel_correlation_tiled", _forward, _fake_forward, _backward, _fake_backward,
    save=_save, differentiate=_differentiate,
)  # fmt: skip
