"""Fused operations of weakly supervised segmentation, usable on their own.

Every operation but ``pooled_logits`` takes ``backend``: ``"eager"`` (the plain formula), ``"tiled"`` (any device,
without a full affinity or a full-resolution stack), ``"triton"`` (CUDA), or None for the best one that fits. None is
Triton on CUDA, unless a tensor is float64, an embedding has more than 256 channels, the GPU is older than Ampere or
not NVIDIA's, or products are float32 while ``torch.backends.cuda.matmul.fp32_precision`` is not ``"tf32"``. Otherwise
None is tiled, but eager for the region ops, where eager is as fast. ``torch.export`` gets eager by default, so that the
exported program does not need this package; a program with ``slic`` needs it.

All operations are differentiable in every CAM, embedding, feature, key and query. They work under autocast,
``torch.compile(fullgraph=True)`` and on ``meta``. They raise ValueError or TypeError for wrong shapes, dtypes and
devices. They do not check values, because that would wait for the device: labels other than 0 and 1 give an undefined
result.

``slic`` is different: it computes with integers, has no gradient, and gives the same bits in eager and Triton.

With every backend, eager's formula runs inside a transform of ``torch.func``, inside
``torch.autograd.forward_ad.dual_level`` and for an empty batch (means over nothing are NaN, as in torch). Only eager
has second derivatives and batched gradients (``is_grads_batched``, ``jacobian(vectorize=True)``); other backends raise
RuntimeError.

Products run in the dtype of the embedding, features or queries (autocast's dtype under autocast; tiled: always float32
or float64). Sums, norms and softmaxes run in float32. The tests bound the error for random maps of 99 pixels, 5 classes
and 24 channels: RMS of the error over RMS of the float64 result, the worst of output and gradients, is below

    eager and tiled   2e-6 for float32, 6e-2 for bfloat16, 2e-2 for float16 inputs
    triton            4e-3 for float32, whose products are TF32, 3e-2 for bfloat16, 4e-3 for float16
"""

from __future__ import annotations

import importlib.util
import math
import numbers
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cpn_fast.kernels import eager, losses_tiled, operators, pixel_tiled, region_tiled, slic_eager

__all__ = [
    "Choice",
    "ComplementaryLosses",
    "backends",
    "background_suppression",
    "complementary_losses",
    "pixel_correlation",
    "pooled_logits",
    "region_correlation",
    "region_pooling",
    "slic",
]

Backend = Literal["eager", "tiled", "triton"]

_PIXEL: dict[str, Any] = {"eager": eager, "tiled": pixel_tiled}
_REGION: dict[str, Any] = {"eager": eager, "tiled": region_tiled}
_LOSSES: dict[str, Any] = {"eager": eager, "tiled": losses_tiled}
_SUPPRESSION: dict[str, Any] = {"eager": eager, "tiled": losses_tiled}
_SLIC: dict[str, Any] = {"eager": slic_eager}
if importlib.util.find_spec("triton"):
    from cpn_fast.kernels import losses_triton, pixel_triton, region_triton, slic_triton, suppression_triton
    from cpn_fast.kernels.launch import check

    _PIXEL["triton"] = pixel_triton
    _REGION["triton"] = region_triton
    _LOSSES["triton"] = losses_triton
    _SUPPRESSION["triton"] = suppression_triton
    _SLIC["triton"] = slic_triton


class ComplementaryLosses(NamedTuple):
    """Three scalars: eq. 14 on raw CAMs, eq. 14 on refined CAMs, and eq. 15."""

    tcp: Tensor
    tcp_refined: Tensor
    cpcr: Tensor


class Choice(NamedTuple):
    """The backend that an operation takes for ``backend=None``."""

    backend: Backend
    reason: str | None
    """Why the backend is not Triton; None if it is."""


def backends(device: torch.device, dtype: torch.dtype, *, channels: int = 192) -> dict[str, Choice]:
    """Return the choice of ``backend=None`` on a device: operation -> choice. It compiles and launches nothing.

    The choices hold for float32 CAMs, and for embeddings, features, keys and queries of ``dtype`` (under autocast,
    autocast's dtype) with ``channels``.
    """
    cam = torch.empty(1, 2, 1, device=device)
    features, keys = (torch.empty(1, *shape, dtype=dtype, device=device) for shape in ((channels, 1), (2, channels)))
    return {
        "pixel_correlation": _fitting(_PIXEL, cam, features),
        "region_pooling": _fitting(_REGION, cam, features),
        "region_correlation": _fitting(_REGION, cam, keys, features),
        "complementary_losses": _fitting(_LOSSES, cam),
        "background_suppression": _fitting(_SUPPRESSION, cam),
        "slic": _fitting(_SLIC, torch.empty(1, 3, 1, 1, dtype=torch.uint8, device=device)),
    }


def pixel_correlation(cam: Tensor, embedding: Tensor, *, eps: float = 1e-5, backend: Backend | None = None) -> Tensor:
    """Refine a CAM along pixel affinities (PCM, eqs. 8 to 10 as released).

    ``cam`` (N, C, H, W) and ``embedding`` (N, D, H, W), not yet normalised, give (N, C, H, W) in the CAM's dtype:
    g = embedding / (its L2 norm over D + eps), A = relu(g^T g) with each column divided by its sum + eps, cam @ A.
    """
    _check_maps("cam", cam, "embedding", embedding)
    _check_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps: expected 0 or more, found {eps}")
    embedding = _autocast(embedding)
    module = _choose(_PIXEL, backend, cam, embedding)
    with eager.full_precision(cam):
        return module.pixel_correlation(cam.flatten(2), embedding.flatten(2), eps).reshape(cam.shape)


def region_pooling(cam: Tensor, features: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Region vectors: the softmax of ``cam`` (N, C, H, W) over pixels, times ``features`` (N, D, H, W): (N, C, D).

    The result has the features' dtype.
    """
    _check_maps("cam", cam, "features", features)
    features = _autocast(features)
    module = _choose(_REGION, backend, cam, features)
    with eager.full_precision(cam):
        return module.region_pooling(cam.flatten(2), features.flatten(2))


def region_correlation(
    cam: Tensor, keys: Tensor, queries: Tensor, *, scale: float, backend: Backend | None = None
) -> Tensor:
    """Weight a CAM by how well each pixel fits each region (PRCM, eq. 11).

    ``cam`` (N, C, H, W) times the softmax over pixels of scale * ``keys`` (N, C, E) @ ``queries`` (N, E, H, W):
    (N, C, H, W) in the CAM's dtype.
    """
    _check_maps("cam", cam, "queries", queries)
    _check_number("scale", scale)
    expected = (*cam.shape[:2], queries.shape[1])
    if keys.shape != expected:
        raise ValueError(f"keys: expected (N, C, E) = {expected} from cam and queries, found {tuple(keys.shape)}")
    _check_floating("keys", keys)
    _check_device("keys", keys, "cam", cam)
    keys, queries = _autocast(keys), _autocast(queries)
    module = _choose(_REGION, backend, cam, keys, queries)
    with eager.full_precision(cam):
        return module.region_correlation(cam.flatten(2), keys, queries.flatten(2), scale).reshape(cam.shape)


def complementary_losses(
    cam: Tensor,
    refined: Tensor | None,
    visible: Tensor,
    labels: Tensor,
    *,
    size: tuple[int, int],
    normalise: Literal["max", "min-max"] = "min-max",
    background: Literal["before-lambda", "after-lambda"] = "after-lambda",
    refined_background: Literal["own", "recomputed"] = "recomputed",
    cpcr_target: Literal["difference", "one-hot"] = "one-hot",
    detach_refined_pair: bool = False,
    hard_share: float = 0.2,
    hard_over: Literal["image", "batch"] = "image",
    backend: Backend | None = None,
) -> ComplementaryLosses:
    """Triplet consistency (TCP, eq. 14) and cross regularisation (CPCR, eqs. 15 and 16) of a complementary pair.

    Shapes: ``cam`` (3, N, 1 + C, h, w), the CAM logits of image, visible patches and their complement, where eq. 16
    replaces channel 0, the background; ``refined`` of the same shape, or None (then TCP on raw maps is the only loss
    and the others are 0); ``visible`` (N,), lambda of branch 1 (branch 2 has 1 - lambda); ``labels`` (N, C), 0 or 1;
    ``size`` (H, W), to which all maps are first upsampled bilinearly with aligned corners.

    normalise: divide each map by its ``max``, or also subtract its minimum; then multiply by label and lambda.
    background: take 1 - max(foreground) before or after the map is scaled by its lambda.
    refined_background: the refined map's ``own`` channel 0, or eq. 16 again.
    cpcr_target: the ``difference`` of image and branch, or only each pixel's largest channel of the difference.
    detach_refined_pair: stop the gradient of branches 1 and 2 in TCP on refined maps (on raw maps it always stops).
    hard_share: share of the largest CPCR errors that count.
    hard_over: whether errors compete within each ``image`` or in the whole ``batch``.

    Everything is computed in float32 (float64 for float64 inputs).
    """
    if cam.ndim != 5 or cam.shape[0] != 3 or cam.shape[2] < 2 or 0 in cam.shape[2:]:
        raise ValueError(f"cam: expected (3, N, 1 + C, h, w), only N may be 0, found {tuple(cam.shape)}")
    _check_floating("cam", cam)
    if refined is not None:
        if refined.shape != cam.shape:
            raise ValueError(f"refined: expected the shape of cam, {tuple(cam.shape)}, found {tuple(refined.shape)}")
        _check_floating("refined", refined)
        _check_device("refined", refined, "cam", cam)
    if visible.shape != cam.shape[1:2]:
        raise ValueError(f"visible: expected {tuple(cam.shape[1:2])}, found {tuple(visible.shape)}")
    _check_floating("visible", visible)
    _check_device("visible", visible, "cam", cam)
    _check_labels(labels, "cam", cam)
    _check_size(size)
    _check_share("hard_share", hard_share)
    for name, value, known in (
        ("normalise", normalise, ("max", "min-max")),
        ("background", background, ("before-lambda", "after-lambda")),
        ("refined_background", refined_background, ("own", "recomputed")),
        ("cpcr_target", cpcr_target, ("difference", "one-hot")),
        ("hard_over", hard_over, ("image", "batch")),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
    variant = eager.Variant(
        size, normalise, background, refined_background, cpcr_target, detach_refined_pair, hard_share, hard_over
    )
    module = _choose(_LOSSES, backend, cam)
    wide = eager.statistics_dtype(cam)
    with eager.full_precision(cam):
        losses = module.complementary_losses(
            cam.to(wide), None if refined is None else refined.to(wide), visible.to(wide), labels.to(wide), variant
        )
    return ComplementaryLosses(*losses)


def background_suppression(
    refined: Tensor, labels: Tensor, *, size: tuple[int, int], share: float = 0.25, backend: Backend | None = None
) -> Tensor:
    """Return the mean of the lowest ``share`` of each image's pixel scores, a scalar; not in the paper.

    ``refined`` (N, 1 + C, h, w) is upsampled to ``size`` (H, W) without normalisation; ``labels`` (N, C), 0 or 1. The
    score of a pixel is its largest foreground channel, where absent classes and negative scores count as 0.
    """
    if refined.ndim != 4 or refined.shape[1] < 2 or 0 in refined.shape[1:]:
        raise ValueError(f"refined: expected (N, 1 + C, h, w), only N may be 0, found {tuple(refined.shape)}")
    _check_floating("refined", refined)
    _check_labels(labels, "refined", refined)
    _check_size(size)
    _check_share("share", share)
    module = _choose(_SUPPRESSION, backend, refined)
    wide = eager.statistics_dtype(refined)
    with eager.full_precision(refined):
        return module.background_suppression(refined.to(wide), labels.to(wide), size, share)


def pooled_logits(cam: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Return the mean over pixels of ``cam`` (N, C, h, w) upsampled bilinearly (aligned corners) to ``size``: (N, C).

    Upsampling is linear and separable, so a weighted mean of the small map is enough. No large map is formed.
    """
    if cam.ndim != 4 or 0 in cam.shape[1:]:
        raise ValueError(f"cam: expected (N, C, h, w), only N may be 0, found {tuple(cam.shape)}")
    _check_floating("cam", cam)
    _check_size(size)
    wide = eager.statistics_dtype(cam)
    with eager.full_precision(cam):
        height, width = (
            eager.upsample(torch.eye(small, dtype=wide, device=cam.device)[None, None], (large, small))[0, 0].mean(0)
            for small, large in zip(cam.shape[2:], size, strict=True)
        )
        return ((cam.to(wide) * width).sum(dim=3) * height).sum(dim=2)


def slic(
    images: Tensor,
    *,
    count: int,
    compactness: float,
    iterations: int,
    mask: Tensor | None = None,
    backend: Literal["eager", "triton"] | None = None,
) -> Tensor:
    """Compute SLIC superpixels: int32 (B, H, W). See Achanta et al. 2012, and docs/superpixels.md for the differences.

    ``images`` (B, 3, H, W) are sRGB from 0 to 255, uint8 or floating; floating values are rounded and clamped. Labels
    run from 0 without gaps, in the order of their regions' first pixels. There are at most ``count`` labels, and each
    is one 4-connected region. Where ``mask`` (B, H, W), bool, is False, labels are -1 and colours do not matter. If
    the mask has more than ``count`` pieces, the last pieces share the last label. ``compactness`` is the weight of
    distance against colour, ``iterations`` is the number of k-means rounds.

    The result has the same bits on every device, with every backend and on every call. It is not differentiable. Sides
    must be below 2^20 and their product below 2^31. Triton does not wait for the host and can be captured in a CUDA
    graph. Eager loops until regions are joined, which on CUDA waits for the device.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images: expected (B, 3, H, W), H and W at least 1, found {tuple(images.shape)}")
    if max(images.shape[2:]) >= 1 << 20 or images.shape[2] * images.shape[3] >= 1 << 31:
        raise ValueError(f"images: expected sides below 2^20 and less than 2^31 pixels, found {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise TypeError(f"images: expected uint8 or a floating dtype, found {images.dtype}")
        images = images.detach().round().clamp(0, 255).to(torch.uint8)
    if mask is not None:
        expected = (len(images), *images.shape[2:])
        if mask.shape != expected:
            raise ValueError(f"mask: expected (B, H, W) = {expected} from images, found {tuple(mask.shape)}")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool, found {mask.dtype}")
        _check_device("mask", mask, "images", images)
    for name, number, limit in (("count", count, 32_000), ("iterations", iterations, 1_000)):
        if not _is_whole(number):
            raise TypeError(f"{name}: expected a whole number, found {number!r}")
        if not 1 <= number <= limit:
            raise ValueError(f"{name}: expected 1 to {limit:,}, found {number}")
    _check_number("compactness", compactness)
    if not 0 < compactness <= 10_000:
        raise ValueError(f"compactness: expected above 0 and at most 10,000, found {compactness}")
    if backend is not None and backend not in _SLIC:
        raise ValueError(f"backend: expected one of {', '.join(_SLIC)} or None, found {backend!r}")
    if backend == "triton" and (reason := slic_triton.obstacle(images)) is not None:
        raise ValueError(f"backend 'triton' {reason}: use 'eager'")
    module = _SLIC[_fitting(_SLIC, images).backend if backend is None else backend] if len(images) else slic_eager
    return module.slic(images, mask, count, float(compactness), iterations)


def _choose(modules: dict[str, Any], backend: str | None, *tensors: Tensor) -> Any:
    """Return the module of a backend, for None the best for the tensors. The last tensor is the products' operand."""
    if backend is not None and backend not in modules:
        raise ValueError(f"backend: expected one of {', '.join(modules)} or None, found {backend!r}")
    if backend == "triton":
        check(modules["triton"].obstacle(*tensors))
    if operators.transformed() or tensors[0].numel() == 0 or (backend is None and operators.exporting()):
        return eager
    return modules[_fitting(modules, *tensors).backend if backend is None else backend]


def _fitting(modules: dict[str, Any], *tensors: Tensor) -> Choice:
    plain: Backend = "tiled"
    if modules is _REGION or modules is _SLIC:  # eager region ops are linear in the pixels and as fast
        plain = "eager"
    if not tensors[-1].is_cuda:
        return Choice(plain, f"triton needs CUDA, found {tensors[-1].device}")
    if "triton" not in modules:
        return Choice(plain, "Triton is not installed")
    reason = modules["triton"].obstacle(*tensors)
    if reason is not None:
        return Choice(plain, f"triton {reason}")
    multiplies = modules is _PIXEL or modules is _REGION
    if multiplies and tensors[-1].dtype == torch.float32 and not _tf32_allowed():
        return Choice(plain, "triton's products of float32 are TF32, which torch.backends.cuda.matmul does not allow")
    return Choice("triton", None)


@operators.constant
def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # torch's older switches set it too


def _autocast(tensor: Tensor) -> Tensor:
    """Cast to autocast's dtype if autocast is on. float64 stays, as under autocast."""
    if eager.autocast_is_on(tensor) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))
    return tensor


def _check_maps(name: str, first: Tensor, other_name: str, other: Tensor) -> None:
    for label, tensor in ((name, first), (other_name, other)):
        if tensor.ndim != 4 or 0 in tensor.shape[1:]:
            raise ValueError(f"{label}: expected four dimensions, only the first may be 0, found {tuple(tensor.shape)}")
        _check_floating(label, tensor)
    if first.shape[0] != other.shape[0] or first.shape[2:] != other.shape[2:]:
        raise ValueError(
            f"{other_name}: expected N, H and W of {name} {tuple(first.shape)}, found {tuple(other.shape)}"
        )
    _check_device(other_name, other, name, first)


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name}: expected a floating dtype (float64, float32, bfloat16 or float16), found {tensor.dtype}"
        )


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected on {other.device} like {other_name}, found on {tensor.device}")


def _check_labels(labels: Tensor, maps_name: str, maps: Tensor) -> None:
    """Check shape and device; ``maps`` (..., N, 1 + C, h, w). A check of values would wait for the device."""
    *_, batch, channels, _, _ = maps.shape
    if labels.shape != (batch, channels - 1):
        raise ValueError(f"labels: expected (N, C) = {(batch, channels - 1)}, found {tuple(labels.shape)}")
    _check_device("labels", labels, maps_name, maps)


def _check_size(size: tuple[int, int]) -> None:
    if not isinstance(size, (tuple, list)) or not all(_is_whole(side) for side in size):
        raise TypeError(f"size: expected (H, W), two whole numbers, found {size!r}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected (H, W), 1 or more each, found {tuple(size)}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt, numbers.Integral))


def _check_number(name: str, value: float) -> None:
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a number, found a tensor, which would get no gradient")
    if not isinstance(value, (float, int, torch.SymFloat, torch.SymInt, numbers.Real)):
        raise TypeError(f"{name}: expected a number, found {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, found {value}")


def _check_share(name: str, share: float) -> None:
    _check_number(name, share)
    if not 0 < share <= 1:
        raise ValueError(f"{name}: expected a share in (0, 1], found {share}")
