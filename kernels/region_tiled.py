"""Region pooling and region correlation on any device, image by image, so that what is worked on fits a cache.

Both are linear in the pixels already; what is left to gain is passes over the features and temporaries of their size.
What backward needs of a softmax, sum_p(P dP), is an inner product of the output and its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpn_fast.kernels import eager


def region_pooling(cam: Tensor, features: Tensor) -> Tensor:
    """As ``eager.region_pooling``, computed in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(eager.statistics_dtype(cam), features.dtype)
    return _pool(cam.to(wide), features.to(wide)).to(features.dtype)


def region_correlation(cam: Tensor, keys: Tensor, queries: Tensor, scale: float) -> Tensor:
    """As ``eager.region_correlation``, computed in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(eager.statistics_dtype(cam), queries.dtype)
    return _correlate(cam.to(wide), keys.to(wide), queries.to(wide), scale)[0].to(cam.dtype)


@torch.library.custom_op("cpn_fast::region_pooling_tiled", mutates_args=())
def _pool(cam: Tensor, features: Tensor) -> Tensor:
    pooled = cam.new_empty(cam.shape[0], cam.shape[1], features.shape[1])
    for n in range(len(cam)):
        torch.mm(cam[n].softmax(dim=1), features[n].mT, out=pooled[n])
    return pooled


@torch.library.custom_op("cpn_fast::region_pooling_tiled_backward", mutates_args=())
def _pool_backward(grad: Tensor, cam: Tensor, features: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    d_cam, d_features = cam.new_empty(cam.shape), features.new_empty(features.shape)
    along = torch.linalg.vecdot(grad, pooled)[:, :, None]
    for n in range(len(cam)):
        share = cam[n].softmax(dim=1)
        torch.mm(grad[n].mT, share, out=d_features[n])
        torch.mm(grad[n], features[n], out=d_cam[n]).sub_(along[n]).mul_(share)
    return d_cam, d_features


@torch.library.custom_op("cpn_fast::region_correlation_tiled", mutates_args=())
def _correlate(cam: Tensor, keys: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output, and the softmax over pixels."""
    out, share = cam.new_empty(cam.shape), cam.new_empty(cam.shape)
    for n in range(len(cam)):
        torch.softmax(torch.mm(keys[n] * scale, queries[n]), dim=1, out=share[n])
        torch.mul(cam[n], share[n], out=out[n])
    return out, share


@torch.library.custom_op("cpn_fast::region_correlation_tiled_backward", mutates_args=())
def _correlate_backward(
    grad: Tensor, cam: Tensor, keys: Tensor, queries: Tensor, out: Tensor, share: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_keys, d_queries = keys.new_empty(keys.shape), queries.new_empty(queries.shape)
    d_cam = cam.new_empty(cam.shape)
    along = torch.linalg.vecdot(grad, out)[:, :, None]
    for n in range(len(cam)):
        torch.mul(grad[n], share[n], out=d_cam[n])
        d_logits = (d_cam[n] * cam[n]).addcmul_(share[n], along[n], value=-1).mul_(scale)
        torch.mm(d_logits, queries[n].mT, out=d_keys[n])
        torch.mm(keys[n].mT, d_logits, out=d_queries[n])
    return d_cam, d_keys, d_queries


@_pool.register_fake
def _(cam: Tensor, features: Tensor) -> Tensor:
    return cam.new_empty(cam.shape[0], cam.shape[1], features.shape[1])


@_pool_backward.register_fake
def _(grad: Tensor, cam: Tensor, features: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    return cam.new_empty(cam.shape), features.new_empty(features.shape)


@_correlate.register_fake
def _(cam: Tensor, keys: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return cam.new_empty(cam.shape), cam.new_empty(cam.shape)


@_correlate_backward.register_fake
def _(
    grad: Tensor, cam: Tensor, keys: Tensor, queries: Tensor, out: Tensor, share: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return cam.new_empty(cam.shape), keys.new_empty(keys.shape), queries.new_empty(queries.shape)


def _save_pool(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output)


def _differentiate_pool(ctx, grad):  # type: ignore[no-untyped-def]
    with eager.full_precision(grad):
        return _pool_backward(grad, *ctx.saved_tensors)


def _save_correlate(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate_correlate(ctx, grad, _):  # type: ignore[no-untyped-def]
    with eager.full_precision(grad):
        return *_correlate_backward(grad, *ctx.saved_tensors, ctx.scale), None


_pool.register_autograd(_differentiate_pool, setup_context=_save_pool)
_correlate.register_autograd(_differentiate_correlate, setup_context=_save_correlate)
