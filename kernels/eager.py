"""The plain formula of every op. The tests compare the tiled and Triton versions with it.

Inputs may be float64, float32, bfloat16 or float16. Norms, sums and softmaxes run in float32 (float64 for float64),
products in the inputs' dtype. This module defines ties for all backends: equal extrema share the gradient equally. The
hardest errors are a fixed number; errors that are equal at its limit share the places that are left.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NORMALISE_EPS = 1e-5

_AS_IT_IS = nullcontext()


class Variant(NamedTuple):
    """Variant of ``complementary_losses``. Its parameters of the same names explain the values."""

    size: tuple[int, int]
    normalise: str = "min-max"
    background: str = "after-lambda"
    refined_background: str = "recomputed"
    cpcr_target: str = "one-hot"
    detach_refined_pair: bool = False
    hard_share: float = 0.2
    hard_over: str = "image"


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast. Backward passes need it too: they may run inside the caller's autocast."""
    if autocast_is_on(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return _AS_IT_IS


def autocast_is_on(tensor: Tensor) -> bool:
    """Return whether autocast is on for the tensor's device type. ``meta`` has no autocast."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def unit_columns(embedding: Tensor, eps: float) -> Tensor:
    """(N, D, P) divided by each column's L2 norm + eps (eq. 10 as released), in the embedding's dtype."""
    wide = embedding.to(statistics_dtype(embedding))
    return (wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + eps)).to(embedding.dtype)


def pixel_correlation(cam: Tensor, embedding: Tensor, eps: float) -> Tensor:
    """Eqs. 8 to 10: ``cam`` (N, C, P) carried along the column-normalised relu(g^T g) of ``embedding`` (N, D, P)."""
    g = unit_columns(embedding, eps)
    affinity = (g.mT @ g).relu()
    total = affinity.sum(dim=1, keepdim=True, dtype=statistics_dtype(embedding)) + eps
    return (cam.to(g.dtype) @ (affinity / total).to(g.dtype)).to(cam.dtype)


def region_pooling(cam: Tensor, features: Tensor) -> Tensor:
    """Region vectors Z (N, C, D): softmax of ``cam`` (N, C, P) over pixels times ``features`` (N, D, P) transposed."""
    share = cam.softmax(dim=2, dtype=statistics_dtype(cam))
    return share.to(features.dtype) @ features.mT


def region_correlation(cam: Tensor, keys: Tensor, queries: Tensor, scale: float) -> Tensor:
    """Eq. 11: ``cam`` (N, C, P) times the softmax over pixels of scale * ``keys`` (N, C, E) @ ``queries`` (N, E, P)."""
    logits = (keys.to(queries.dtype) @ queries).to(statistics_dtype(queries)) * scale
    return (cam * logits.softmax(dim=2)).to(cam.dtype)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) -> (N, C, H, W), bilinear, corners aligned."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def complementary_losses(
    cam: Tensor, refined: Tensor | None, visible: Tensor, labels: Tensor, variant: Variant
) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs. 14 to 16 at full resolution; arguments as in ``cpn_fast.kernels.complementary_losses``."""
    weights = torch.stack([torch.ones_like(visible), visible, 1 - visible])[:, :, None, None, None]
    present = torch.cat([torch.ones_like(labels[:, :1]), labels], dim=1)[:, :, None, None]

    raw = [
        w * normalise(upsample(maps, variant.size), variant.normalise) * present
        for w, maps in zip(weights, cam, strict=True)
    ]
    tcp = (raw[2].detach() + raw[1].detach() - raw[0])[:, 1:].abs().mean()
    if refined is None:
        return tcp, torch.zeros_like(tcp), torch.zeros_like(tcp)

    refined_maps = [
        w * normalise(upsample(maps, variant.size), variant.normalise) * present
        for w, maps in zip(weights, refined, strict=True)
    ]
    pair = refined_maps[2] + refined_maps[1]
    tcp_refined = ((pair.detach() if variant.detach_refined_pair else pair) - refined_maps[0])[:, 1:].abs().mean()

    targets = [_with_background(maps, w, variant.background).detach() for w, maps in zip(weights, raw, strict=True)]
    if variant.refined_background == "recomputed":
        refined_maps = [
            _with_background(maps, w, variant.background) for w, maps in zip(weights, refined_maps, strict=True)
        ]
    cpcr = tcp.new_zeros(())
    for seen, hidden in ((1, 2), (2, 1)):
        target = targets[0] - targets[seen]
        if variant.cpcr_target == "one-hot":
            target = torch.where(target == target.amax(dim=1, keepdim=True), target, 0)
        errors = (target - refined_maps[hidden]).abs()
        rows = errors.flatten(1) if variant.hard_over == "image" else errors.reshape(1, -1)
        cpcr = cpcr + mean_of_largest(rows, variant.hard_share).mean()
    return tcp, tcp_refined, cpcr


def background_suppression(refined: Tensor, labels: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """Mean of the lowest ``share`` of each image's strongest present foreground score, at full resolution."""
    strongest = (upsample(refined[:, 1:], size) * labels[:, :, None, None]).amax(dim=1).flatten(1).relu()
    return -mean_of_largest(-strongest, share).mean()


def counted(elements: int, share: float) -> int:
    """Return the number of elements in a share, ``int`` of the product, but at least one."""
    return max(1, int(share * elements))


def normalise(maps: Tensor, how: str) -> Tensor:
    """Bring the positive part of each map (N, C, H, W) to 0 to 1: ``max`` divides it by its maximum, ``min-max``
    stretches it from its minimum to its maximum."""
    positive = maps.relu()
    high = positive.amax(dim=(2, 3), keepdim=True)
    if how == "max":
        return positive / (high + NORMALISE_EPS)
    low = positive.amin(dim=(2, 3), keepdim=True)
    return (positive - low - NORMALISE_EPS).relu() / (high - low + NORMALISE_EPS)


def _with_background(maps: Tensor, weight: Tensor, when: str) -> Tensor:
    """Put eq. 16 into channel 0. Before lambda: weight * (1 - max of the unscaled map) = weight - max of the scaled."""
    foreground = maps[:, 1:]
    full = 1.0 if when == "after-lambda" else weight
    return torch.cat([full - foreground.amax(dim=1, keepdim=True), foreground], dim=1)


def mean_of_largest(rows: Tensor, share: float) -> Tensor:
    """Return the mean of the largest ``share`` of each row. Equal values share the last places."""
    count = counted(rows.shape[1], share)
    if count == rows.shape[1]:
        return rows.mean(dim=1)
    last = rows.detach().topk(count, dim=1).values[:, -1:]
    above, equal = rows > last, rows == last
    weight = (count - above.sum(dim=1, keepdim=True)).to(rows.dtype) / equal.sum(dim=1, keepdim=True)
    return (rows * (above + equal * weight)).sum(dim=1) / count
