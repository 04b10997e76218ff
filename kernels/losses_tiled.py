"""The losses image by image on present classes only, gradients formed in the forward pass.

An absent class is zero in every normalised map, so it adds nothing to any sum and gets no gradient; the losses are
scalars, so their gradients are known up to the factor that backward multiplies in. What is held at full resolution is
one image's maps of its present classes, never (1 + C) maps. Only where errors of a whole batch compete
(``hard_over="batch"``, and enough classes are present for a choice) are the errors of all images held at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpn_fast.kernels import eager
from cpn_fast.kernels.eager import NORMALISE_EPS, Variant, counted

SCHEMA = (
    "(Tensor cam, Tensor? refined, Tensor visible, Tensor labels, SymInt[] size, str normalise, str background, "
    "str refined_background, str cpcr_target, bool detach_refined_pair, float hard_share, str hard_over, "
    "bool needs_grad) -> (Tensor, Tensor, Tensor, Tensor)"
)  # the fields of Variant between the tensors and needs_grad
DIRECTIONS = ((1, 2), (2, 1))  # CPCR: the branch taken from the image's map, and the one whose refined map it guides


def complementary_losses(
    cam: Tensor, refined: Tensor | None, visible: Tensor, labels: Tensor, variant: Variant
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``eager.complementary_losses``."""
    needs_grad = torch.is_grad_enabled() and (cam.requires_grad or (refined is not None and refined.requires_grad))
    losses = _losses(cam, refined, visible, labels, *variant, needs_grad)[0]
    tcp, tcp_refined, cpcr = losses.unbind()
    return tcp, tcp_refined, cpcr


def background_suppression(refined: Tensor, labels: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """As ``eager.background_suppression``."""
    return _suppression(refined, labels, size, share, torch.is_grad_enabled() and refined.requires_grad)[0]


class _Resize(NamedTuple):
    """Bilinear upsampling as two products: ``rows`` (H, h) @ maps @ ``columns`` (W, w) transposed."""

    rows: Tensor
    columns: Tensor

    def up(self, maps: Tensor) -> Tensor:
        """(..., h, w) -> (..., H * W)"""
        return (self.rows @ maps @ self.columns.mT).flatten(-2)

    def down(self, grad: Tensor) -> Tensor:
        """The adjoint: (..., H * W) -> (..., h, w)"""
        return self.rows.mT @ grad.unflatten(-1, (len(self.rows), len(self.columns))) @ self.columns


class _Maps(NamedTuple):
    """One image's normalised maps of B branches and K channels at full resolution, and what their gradient needs."""

    values: Tensor  # (B, K, P), scaled by the branch's weight
    upsampled: Tensor  # (B, K, P)
    high: Tensor  # (B, K, 1), of the positive part
    low: Tensor  # (B, K, 1); zeros where normalisation takes no minimum
    slope: Tensor  # (B, K, 1), from upsampled to values
    span: Tensor  # (B, K, 1), what the maps were divided by

    def branches(self, start: int, stop: int) -> _Maps:
        return _Maps(*(tensor[start:stop] for tensor in self))


class _Cut(NamedTuple):
    """The smallest error that counts, and the weight of errors equal to it."""

    last: Tensor
    place: Tensor


@torch.library.custom_op("cpn_fast::complementary_losses_tiled", mutates_args=(), schema=SCHEMA)
def _losses(
    cam: Tensor, refined: Tensor | None, visible: Tensor, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses (3,); gradients of TCP for cam[0], of refined TCP for refined, of CPCR for refined[1:]."""
    variant, needs_grad = Variant(*options[:-1]), options[-1]
    size, normalise, hard_over = variant.size, variant.normalise, variant.hard_over
    batch, channels = cam.shape[1:3]
    pixels = size[0] * size[1]
    resize = _resize(cam, size)
    weights = torch.stack([torch.ones_like(visible), visible, 1 - visible])[:, :, None, None]
    full = weights if variant.background == "before-lambda" else torch.ones_like(weights)
    own_background = variant.refined_background == "own"
    present = [row.nonzero().flatten() + 1 for row in labels]

    losses = cam.new_zeros(3)
    gradients = empty_gradients(cam, needs_grad)
    d_tcp, d_refined, d_cpcr = (gradient.zero_() for gradient in gradients)
    share_of_tcp = 1 / (batch * (channels - 1) * pixels)
    count = counted((batch if hard_over == "batch" else 1) * channels * pixels, variant.hard_share)
    share_of_cpcr = 1 / (count if hard_over == "batch" else count * batch)

    def maps(source: Tensor, n: int, picked: Tensor) -> _Maps:
        return _normalise(source[:, n].index_select(1, picked), weights[:, n], resize, normalise)

    def refined_maps(n: int) -> _Maps:
        assert refined is not None
        return maps(refined, n, torch.cat([present[n].new_zeros(1), present[n]]) if own_background else present[n])

    def residuals(n: int, raw: _Maps, own: _Maps) -> list[Tensor]:
        """CPCR's target minus refined map, (1 + K, P) for each direction, background first."""
        targets = _with_background(raw.values, full[:, n])
        guided = own.values if own_background else _with_background(own.values, full[:, n])
        some_absent = len(present[n]) < channels - 1
        return [_target(targets[0] - targets[s], variant.cpcr_target, some_absent) - guided[h] for s, h in DIRECTIONS]

    cuts: list[_Cut | None] = [None, None]
    if refined is not None and hard_over == "batch" and sum(len(p) + 1 for p in present) * pixels > count:
        held = [residuals(n, maps(cam, n, present[n]), refined_maps(n)) for n in range(batch)]
        cuts = [_cut(torch.cat([both[d].flatten() for both in held]), count) for d in range(len(DIRECTIONS))]
        del held

    for n, classes in enumerate(present):
        raw = maps(cam, n, classes)
        inconsistent = raw.values[2] + raw.values[1] - raw.values[0]
        losses[0] += inconsistent.abs().sum() * share_of_tcp
        if needs_grad:
            grad = inconsistent.sign_().mul_(-share_of_tcp)[None]
            d_tcp[n, classes] = resize.down(_through_normalise(grad, raw.branches(0, 1), normalise))[0]
        if refined is None:
            continue

        own = refined_maps(n)
        first = 1 if own_background else 0
        inconsistent = own.values[2, first:] + own.values[1, first:] - own.values[0, first:]
        losses[1] += inconsistent.abs().sum() * share_of_tcp
        both = residuals(n, raw, own)
        if hard_over == "image":
            chosen = (len(classes) + 1) * pixels > count
            cuts = [_cut(residual.flatten(), count) if chosen else None for residual in both]
        signed_weights = [
            _counting(residual, cut).mul_(share_of_cpcr) for residual, cut in zip(both, cuts, strict=True)
        ]
        for residual, counts in zip(both, signed_weights, strict=True):
            losses[2] += torch.dot(residual.flatten(), counts.flatten())
        if not needs_grad:
            continue

        picked = torch.cat([classes.new_zeros(1), classes]) if own_background else classes
        grad = torch.zeros_like(own.values)
        grad[0, first:] = inconsistent.sign_().mul_(-share_of_tcp)
        if not variant.detach_refined_pair:
            grad[1:, first:] = -inconsistent
        d_refined[:, n, picked] = resize.down(_through_normalise(grad, own, normalise))
        grad = torch.zeros_like(own.values[1:])
        for (_, hidden), counts in zip(DIRECTIONS, signed_weights, strict=True):
            if own_background:
                grad[hidden - 1] = -counts
            else:
                grad[hidden - 1] = _through_strongest(counts[:1], own.values[hidden]) - counts[1:]
        d_cpcr[:, n, picked] = resize.down(_through_normalise(grad, own.branches(1, 3), normalise))
    return losses, *gradients


def _resize(like: Tensor, size: Sequence[int]) -> _Resize:
    def matrix(small: int, large: int) -> Tensor:
        return eager.upsample(torch.eye(small, dtype=like.dtype, device=like.device)[None, None], (large, small))[0, 0]

    return _Resize(matrix(like.shape[-2], size[0]), matrix(like.shape[-1], size[1]))


def _normalise(source: Tensor, weight: Tensor, resize: _Resize, how: str) -> _Maps:
    upsampled = resize.up(source)
    high = upsampled.amax(dim=2, keepdim=True).clamp_min_(0)
    low = upsampled.amin(dim=2, keepdim=True).clamp_min_(0) if how == "min-max" else torch.zeros_like(high)
    span = high - low + NORMALISE_EPS
    values = (upsampled - low).sub_(NORMALISE_EPS) if how == "min-max" else upsampled.clone()
    values.clamp_min_(0).div_(span).mul_(weight)  # rounded as in eager, so that the same values tie
    return _Maps(values, upsampled, high, low, weight / span, span)


def _through_normalise(grad: Tensor, maps: _Maps, how: str) -> Tensor:
    """Gradient of the upsampled maps from that of their values."""
    d_span = -torch.linalg.vecdot(grad, maps.values)[:, :, None] / maps.span
    grad = torch.ops.aten.threshold_backward(grad, maps.values, 0).mul_(maps.slope)
    ends = [(maps.high, d_span)]
    if how == "min-max":
        ends.append((maps.low, -grad.sum(dim=2, keepdim=True) - d_span))
    for end, d_end in ends:
        if not end.any():  # a non-positive end is cut off by the relu
            continue
        reached = maps.upsampled == end
        share = torch.where(end > 0, d_end / reached.sum(dim=2, keepdim=True).clamp_min_(1), 0)
        branch, channel, pixel = reached.nonzero(as_tuple=True)
        grad[branch, channel, pixel] += share[branch, channel, 0]
    return grad


def _strongest(values: Tensor) -> Tensor:
    """(..., K, P) -> (..., 1, P); zeros where no class is present."""
    if values.shape[-2] == 0:
        return values.new_zeros(*values.shape[:-2], 1, values.shape[-1])
    return values.amax(dim=-2, keepdim=True)


def _with_background(values: Tensor, full: Tensor) -> Tensor:
    """Eq. 16 before the foreground: (B, K, P) -> (B, 1 + K, P)."""
    return torch.cat([full - _strongest(values), values], dim=1)


def _through_strongest(grad: Tensor, values: Tensor) -> Tensor:
    """(1, P) -> (K, P): the gradient of each pixel's maximum goes to its strongest classes in equal shares."""
    if len(values) == 1:
        return grad
    strongest = (values == _strongest(values)).to(grad.dtype)
    return strongest * (grad / strongest.sum(dim=0))


def _target(difference: Tensor, kind: str, some_absent: bool) -> Tensor:
    """CPCR's target from the difference (1 + K, P); absent classes take part in the maximum with their zeros."""
    if kind == "difference":
        return difference
    largest = difference.amax(dim=0)
    if some_absent:
        largest.clamp_min_(0)
    return torch.where(difference == largest, difference, 0)


def _cut(residual: Tensor, count: int) -> _Cut:
    errors = residual.abs()
    last = errors.kthvalue(len(errors) - count + 1).values
    return _Cut(last, (count - (errors > last).sum()).to(errors.dtype) / (errors == last).sum())


def _counting(residual: Tensor, cut: _Cut | None) -> Tensor:
    """Gradient of the sum of the errors that count."""
    sign = residual.sign()
    if cut is None:
        return sign
    errors = residual.abs()
    return sign.mul_((errors > cut.last).to(sign.dtype).add_((errors == cut.last) * cut.place))


def empty_gradients(cam: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    one, three = (cam[0], cam) if needs_grad else (cam[0, :0], cam[:0])
    two = three[1:]
    return tuple(cam.new_empty(part.shape) for part in (one, three, two))  # type: ignore[return-value]


@_losses.register_fake
def fake(cam: Tensor, refined: Tensor | None, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return cam.new_empty(3), *empty_gradients(cam, rest[-1])


def save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.has_refined = inputs[1] is not None
    ctx.save_for_backward(*output[1:])


def differentiate(ctx, grad, *_):  # type: ignore[no-untyped-def]
    d_tcp, d_refined, d_cpcr = ctx.saved_tensors
    tcp, tcp_refined, cpcr = grad.unbind()
    d_cam = torch.cat([(d_tcp * tcp)[None], torch.zeros_like(d_cpcr)])
    total = d_refined * tcp_refined + torch.cat([torch.zeros_like(d_tcp)[None], d_cpcr * cpcr])
    return d_cam, total if ctx.has_refined else None, *[None] * 11


_losses.register_autograd(differentiate, setup_context=save)


@torch.library.custom_op("cpn_fast::background_suppression_tiled", mutates_args=())
def _suppression(
    refined: Tensor, labels: Tensor, size: list[int], share: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """The loss () and its gradient."""
    batch = len(refined)
    count = counted(size[0] * size[1], share)
    resize = _resize(refined, size)
    loss = refined.new_zeros(())
    gradient = torch.zeros_like(refined if needs_grad else refined[:0], memory_format=torch.contiguous_format)
    for n, row in enumerate(labels):
        classes = row.nonzero().flatten() + 1
        upsampled = resize.up(refined[n].index_select(0, classes))
        scores = _strongest(upsampled).relu_()
        last = scores.flatten().kthvalue(count).values
        if last == 0:
            continue
        below, equal = scores < last, scores == last
        place = (count - below.sum()).to(scores.dtype) / equal.sum()
        counts = (below.to(scores.dtype) + equal * place) / (count * batch)
        loss += (scores * counts).sum()
        if needs_grad:
            counts *= scores > 0
            gradient[n, classes] = resize.down(_through_strongest(counts, upsampled))
    return loss, gradient


@_suppression.register_fake
def fake_suppression(
    refined: Tensor, labels: Tensor, size: list[int], share: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    return refined.new_empty(()), refined.new_empty((refined if needs_grad else refined[:0]).shape)


def save_suppression(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])


def differentiate_suppression(ctx, grad, _):  # type: ignore[no-untyped-def]
    return ctx.saved_tensors[0] * grad, *[None] * 4


_suppression.register_autograd(differentiate_suppression, setup_context=save_suppression)
