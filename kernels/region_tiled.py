"""Region pooling and region correlation on any device, image by image, so that the data fit into a cache.

Both are already linear in the pixels. These versions save passes over the features, and temporaries of their size.
Backward needs sum_p(P dP) of a softmax, which is an inner product of the output and its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpn_fast.kernels import eager
from cpn_fast.kernels.operators import operation


def region_pooling(cam: Tensor, features: Tensor) -> Tensor:
    """As ``eager.region_pooling``, computed in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(eager.statistics_dtype(cam), features.dtype)
    return _pool(cam.to(wide), features.to(wide)).to(features.dtype)


def region_correlation(cam: Tensor, keys: Tensor, queries: Tensor, scale: float) -> Tensor:
    """As ``eager.region_correlation``, computed in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(eager.statistics_dtype(cam), queries.dtype)
    return _correlate(cam.to(wide), keys.to(wide), queries.to(wide), scale).to(cam.dtype)


def _forward_pool(cam: Tensor, features: Tensor) -> tuple[Tensor]:
    (pooled,) = _fake_pool(cam, features)
    for n in range(len(cam)):
        torch.mm(cam[n].softmax(dim=1), features[n].mT, out=pooled[n])
    return (pooled,)


def _backward_pool(
    grad: Tensor, cam: Tensor, features: Tensor, pooled: Tensor, of_cam: bool, of_features: bool
) -> tuple[Tensor, Tensor]:
    d_cam, d_features = _fake_backward_pool(grad, cam, features, pooled, of_cam, of_features)
    along = torch.linalg.vecdot(grad, pooled)[:, :, None]
    for n in range(len(cam)):
        share = cam[n].softmax(dim=1)
        if of_features:
            torch.mm(grad[n].mT, share, out=d_features[n])
        if of_cam:
            torch.mm(grad[n], features[n], out=d_cam[n]).sub_(along[n]).mul_(share)
    return d_cam, d_features


def _forward_correlate(cam: Tensor, keys: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output, and the softmax over pixels."""
    out, share = _fake_correlate(cam, keys, queries, scale)
    for n in range(len(cam)):
        torch.softmax(torch.mm(keys[n], queries[n]).mul_(scale), dim=1, out=share[n])
        torch.mul(cam[n], share[n], out=out[n])
    return out, share


def _backward_correlate(
    grad: Tensor,
    cam: Tensor,
    keys: Tensor,
    queries: Tensor,
    out: Tensor,
    share: Tensor,
    scale: float,
    of_cam: bool,
    of_keys: bool,
    of_queries: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_cam, d_keys, d_queries = _fake_backward_correlate(
        grad, cam, keys, queries, out, share, scale, of_cam, of_keys, of_queries
    )
    along = torch.linalg.vecdot(grad, out)[:, :, None]
    for n in range(len(cam)):
        weighted = torch.mul(grad[n], share[n], out=d_cam[n]) if of_cam else grad[n] * share[n]
        d_logits = (weighted * cam[n]).addcmul_(share[n], along[n], value=-1).mul_(scale)
        if of_keys:
            torch.mm(d_logits, queries[n].mT, out=d_keys[n])
        if of_queries:
            torch.mm(keys[n].mT, d_logits, out=d_queries[n])
    return d_cam, d_keys, d_queries


def empty_gradient(tensor: Tensor, wanted: bool) -> Tensor:
    """Return an empty contiguous gradient, without images if it is not wanted."""
    return tensor.new_empty((tensor if wanted else tensor[:0]).shape)


def _fake_pool(cam: Tensor, features: Tensor) -> tuple[Tensor]:
    return (cam.new_empty(cam.shape[0], cam.shape[1], features.shape[1]),)


def _fake_backward_pool(
    grad: Tensor, cam: Tensor, features: Tensor, pooled: Tensor, of_cam: bool, of_features: bool
) -> tuple[Tensor, Tensor]:
    return empty_gradient(cam, of_cam), empty_gradient(features, of_features)


def _fake_correlate(cam: Tensor, keys: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return cam.new_empty(cam.shape), cam.new_empty(cam.shape)


def _fake_backward_correlate(
    grad: Tensor,
    cam: Tensor,
    keys: Tensor,
    queries: Tensor,
    out: Tensor,
    share: Tensor,
    scale: float,
    of_cam: bool,
    of_keys: bool,
    of_queries: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradient(cam, of_cam), empty_gradient(keys, of_keys), empty_gradient(queries, of_queries)


def save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.others = [value for value in inputs if not isinstance(value, Tensor)]
    ctx.save_for_backward(*inputs[: len(inputs) - len(ctx.others)], *output)


def differentiate(ctx, grad, backward):  # type: ignore[no-untyped-def]
    """Return ``backward``'s gradient of each input tensor, and None for the numbers after the tensors."""
    needed = ctx.needs_input_grad[: len(ctx.needs_input_grad) - len(ctx.others)]
    with eager.full_precision(grad):
        gradients = backward(grad, *ctx.saved_tensors, *ctx.others, *needed)
    return *(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True)), *(
        None for _ in ctx.others
    )


_pool = operation(
    "region_pooling_tiled", _forward_pool, _fake_pool, _backward_pool, _fake_backward_pool,
    save=save, differentiate=differentiate,
)  # fmt: skip
_correlate = operation(
    "region_correlation_tiled", _forward_correlate, _fake_correlate, _backward_correlate, _fake_backward_correlate,
    save=save, differentiate=differentiate,
)  # fmt: skip
