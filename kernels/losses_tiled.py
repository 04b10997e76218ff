"""The losses image by image on present classes only. The forward pass already forms the gradients.

An absent class is zero in every normalised map, so it adds nothing to a sum and gets no gradient. The losses are
scalars, so the forward pass knows their gradients up to the factor that backward multiplies in. Memory holds one
image's maps of its present classes at full resolution, never (1 + C) maps. It holds the errors of all images only if
errors of a whole batch compete (``hard_over="batch"``, and enough classes are present for a choice).

A NaN in a map has the same effect as in the plain formula, which multiplies absent classes by 0 and so keeps their NaN:
a loss is finite exactly where eager's is, and a gradient that has a NaN in eager has one here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpn_fast.kernels import eager
from cpn_fast.kernels.eager import NORMALISE_EPS, Variant, counted
from cpn_fast.kernels.operators import operation

SCHEMA = (
    "(Tensor cam, Tensor? refined, Tensor visible, Tensor labels, SymInt[] size, str normalise, str background, "
    "str refined_background, str cpcr_target, bool detach_refined_pair, float hard_share, str hard_over, "
    "bool needs_cam, bool needs_refined) -> (Tensor, Tensor, Tensor)"
)  # the tensors, the fields of Variant, and two flags for gradients
DIRECTIONS = ((1, 2), (2, 1))  # CPCR: the branch to subtract from the image's map, and the branch to guide


def complementary_losses(
    cam: Tensor, refined: Tensor | None, visible: Tensor, labels: Tensor, variant: Variant
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``eager.complementary_losses``."""
    tcp, tcp_refined, cpcr = _losses(cam, refined, visible, labels, *variant, *needed(cam, refined)).unbind()
    return tcp, tcp_refined, cpcr


def background_suppression(refined: Tensor, labels: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """As ``eager.background_suppression``."""
    return _suppression(refined, labels, size, share, needed(refined)[0])


def needed(*tensors: Tensor | None) -> list[bool]:
    """Return which tensors need a gradient."""
    wanted = torch.is_grad_enabled()
    return [wanted and tensor is not None and tensor.requires_grad for tensor in tensors]


class _Resize(NamedTuple):
    """Bilinear upsampling as two products: ``rows`` (H, h) @ maps @ ``columns`` (W, w) transposed."""

    rows: Tensor
    columns: Tensor
    finite: bool
    """Whether all maps are finite. A product would spread a pixel's infinity times 0 over its row and column."""

    def up(self, maps: Tensor) -> Tensor:
        """(B, K, h, w) -> (B, K, H * W)"""
        if not self.finite:
            one_by_one = maps.flatten(0, 1)[:, None]  # interpolate refuses maps without channels
            large = eager.upsample(one_by_one, (len(self.rows), len(self.columns)))
            return large.flatten(1).unflatten(0, maps.shape[:2])
        return (self.rows @ maps @ self.columns.mT).flatten(2)

    def down(self, grad: Tensor) -> Tensor:
        """The adjoint: (..., H * W) -> (..., h, w)"""
        return self.rows.mT @ grad.unflatten(-1, (len(self.rows), len(self.columns))) @ self.columns


class _Maps(NamedTuple):
    """One image's normalised maps of B branches and K channels at full resolution, and the inputs of their gradient."""

    values: Tensor  # (B, K, P), scaled by the branch's weight
    upsampled: Tensor  # (B, K, P)
    high: Tensor  # (B, K, 1), maximum of the positive part
    low: Tensor  # (B, K, 1), its minimum; zeros if normalisation takes no minimum
    slope: Tensor  # (B, K, 1), factor from upsampled to values
    span: Tensor  # (B, K, 1), divisor of the maps

    def branches(self, start: int, stop: int) -> _Maps:
        return _Maps(*(tensor[start:stop] for tensor in self))


class _Cut(NamedTuple):
    """The smallest error that counts, and the weight of errors that are equal to it."""

    last: Tensor
    weight: Tensor


def _forward(
    cam: Tensor, refined: Tensor | None, visible: Tensor, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (3,), TCP's gradient of cam[0], and one tensor of five gradients.

    The five are refined TCP's gradients of refined (3) and CPCR's of refined[1:] (2).
    """
    *fields, needs_cam, needs_refined = options
    variant = Variant(*fields)
    size, normalise, hard_over = variant.size, variant.normalise, variant.hard_over
    batch, channels = cam.shape[1:3]
    pixels = size[0] * size[1]
    resize = _resize(size, cam) if refined is None else _resize(size, cam, refined)
    weights = torch.stack([torch.ones_like(visible), visible, 1 - visible])[:, :, None, None]
    full = weights if variant.background == "before-lambda" else torch.ones_like(weights)
    own_background = variant.refined_background == "own"
    present = [row.nonzero().flatten() + 1 for row in labels]

    losses = cam.new_zeros(3)
    d_cam, d_refined = (part.zero_() for part in empty_gradients(cam, refined, needs_cam, needs_refined))
    d_tcp, d_cpcr = d_refined[:3], d_refined[3:]
    share_of_tcp = 1 / (batch * (channels - 1) * pixels)
    count = counted((batch if hard_over == "batch" else 1) * channels * pixels, variant.hard_share)
    share_of_cpcr = 1 / (count if hard_over == "batch" else count * batch)

    def maps(source: Tensor, n: int, picked: Tensor) -> _Maps:
        return _normalise(source[:, n].index_select(1, picked), weights[:, n], resize, normalise)

    def refined_maps(n: int) -> _Maps:
        assert refined is not None
        return maps(refined, n, torch.cat([present[n].new_zeros(1), present[n]]) if own_background else present[n])

    def residuals(n: int, raw: _Maps, refined_n: _Maps) -> list[Tensor]:
        """CPCR's target minus refined map, (1 + K, P) for each direction, background first."""
        targets = _with_background(raw.values, full[:, n])
        guided = refined_n.values if own_background else _with_background(refined_n.values, full[:, n])
        some_absent = len(present[n]) < channels - 1
        return [_target(targets[0] - targets[s], variant.cpcr_target, some_absent) - guided[h] for s, h in DIRECTIONS]

    cuts: list[_Cut | None] = [None, None]
    if refined is not None and hard_over == "batch" and sum(len(p) + 1 for p in present) * pixels > count:
        held = [residuals(n, maps(cam, n, present[n]), refined_maps(n)) for n in range(batch)]
        cuts = [_cut(torch.cat([both[d].flatten() for both in held]), count) for d in range(len(DIRECTIONS))]
        del held

    for n, classes in enumerate(present):
        if not resize.finite:
            flaws = _flaws(cam[:, n], resize)
            losses[0] += flaws[:, 1:].sum()
            if variant.cpcr_target == "difference":
                losses[2] += flaws[:, 1:].sum()
                d_cpcr[:, n] += flaws[:, 1:].sum()
            if needs_cam:
                d_cam[n] += flaws[0]
            if refined is not None:
                flaws = _flaws(refined[:, n], resize)
                losses[1:] += torch.stack([flaws[:, 1:].sum(), flaws[1:, 1:].sum()])
                if needs_refined:
                    d_tcp[:, n] += flaws
        raw = maps(cam, n, classes)
        loss, grad = _tcp(raw.values, share_of_tcp)
        losses[0] += loss
        if needs_cam:
            d_cam[n, classes] = resize.down(_through_normalise(grad[None], raw.branches(0, 1), normalise))[0]
        if refined is None:
            continue

        refined_n = refined_maps(n)
        first = 1 if own_background else 0
        loss, of_image = _tcp(refined_n.values[:, first:], share_of_tcp)
        losses[1] += loss
        both = residuals(n, raw, refined_n)
        if hard_over == "image":
            chosen = (len(classes) + 1) * pixels > count
            cuts = [_cut(residual.flatten(), count) if chosen else None for residual in both]
        signed_weights = [
            _counting(residual, cut).mul_(share_of_cpcr) for residual, cut in zip(both, cuts, strict=True)
        ]
        for residual, counts in zip(both, signed_weights, strict=True):
            losses[2] += torch.dot(residual.flatten(), counts.flatten())
        if not needs_refined:
            continue

        picked = torch.cat([classes.new_zeros(1), classes]) if own_background else classes
        grad = torch.zeros_like(refined_n.values)
        grad[0, first:] = of_image
        if not variant.detach_refined_pair:
            grad[1:, first:] = -of_image
        d_tcp[:, n, picked] = resize.down(_through_normalise(grad, refined_n, normalise))
        grad = _of_guided(signed_weights, refined_n.values, own_background)
        d_cpcr[:, n, picked] = resize.down(_through_normalise(grad, refined_n.branches(1, 3), normalise))
    return losses, d_cam, d_refined


def _tcp(values: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return TCP of normalised maps (3, K, P), and its gradient of the image's maps (K, P)."""
    inconsistent = values[2] + values[1] - values[0]
    return inconsistent.abs().sum() * factor, inconsistent.sign_().mul_(-factor)


def _of_guided(signed_weights: Sequence[Tensor], values: Tensor, own_background: bool) -> Tensor:
    """Return CPCR's gradient of the refined maps of the pair (2, K, P), from that of the residuals (1 + K, P)."""
    grad = torch.zeros_like(values[1:])
    for (_, guided), weights in zip(DIRECTIONS, signed_weights, strict=True):
        if own_background:
            grad[guided - 1] = -weights
        else:
            grad[guided - 1] = _through_strongest(weights[:1], values[guided]) - weights[1:]
    return grad


def _resize(size: Sequence[int], *maps: Tensor) -> _Resize:
    like = maps[0]

    def matrix(small: int, large: int) -> Tensor:
        return eager.upsample(torch.eye(small, dtype=like.dtype, device=like.device)[None, None], (large, small))[0, 0]

    finite = all(bool(some.isfinite().all()) for some in maps)
    return _Resize(matrix(like.shape[-2], size[0]), matrix(like.shape[-1], size[1]), finite)


def _flaws(maps: Tensor, resize: _Resize) -> Tensor:
    """Return what unused maps (B, K, h, w) add: 0 times each positive part, NaN or 0, (B, K, 1, 1)."""
    return resize.up(maps.detach()).clamp_min_(0).mul_(0).sum(dim=2)[:, :, None, None]


def _normalise(source: Tensor, weight: Tensor, resize: _Resize, how: str) -> _Maps:
    upsampled = resize.up(source)
    high = upsampled.amax(dim=2, keepdim=True).clamp_min_(0)
    low = upsampled.amin(dim=2, keepdim=True).clamp_min_(0) if how == "min-max" else torch.zeros_like(high)
    span = high - low + NORMALISE_EPS
    values = (upsampled - low).sub_(NORMALISE_EPS) if how == "min-max" else upsampled.clone()
    values.clamp_min_(0).div_(span).mul_(weight)  # rounds as in eager, so that the same values tie
    return _Maps(values, upsampled, high, low, weight / span, span)


def _through_normalise(grad: Tensor, maps: _Maps, how: str) -> Tensor:
    """Return the gradient of the upsampled maps from the gradient of their values."""
    d_span = -torch.linalg.vecdot(grad, maps.values)[:, :, None] / maps.span
    grad = torch.ops.aten.threshold_backward(grad, maps.values, 0).mul_(maps.slope)
    ends = [(maps.high, d_span)]
    if how == "min-max":
        ends.append((maps.low, -grad.sum(dim=2, keepdim=True) - d_span))
    for end, d_end in ends:
        if not end.any():  # the relu cuts off a non-positive end
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
    """(1, P) -> (K, P): share the gradient of each pixel's maximum equally among its strongest classes."""
    if len(values) == 1:
        return grad
    strongest = (values == _strongest(values)).to(grad.dtype)
    return strongest * (grad / strongest.sum(dim=0))


def _target(difference: Tensor, kind: str, some_absent: bool) -> Tensor:
    """Return CPCR's target from the difference (1 + K, P). Absent classes enter the maximum as zeros."""
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
    """Return the gradient of the sum of the errors that count."""
    sign = residual.sign()
    if cut is None:
        return sign
    errors = residual.abs()
    return sign.mul_((errors > cut.last).to(sign.dtype).add_((errors == cut.last) * cut.weight))


def empty_gradients(cam: Tensor, refined: Tensor | None, needs_cam: bool, needs_refined: bool) -> tuple[Tensor, Tensor]:
    """Return empty gradients of cam[0], (N, 1 + C, h, w) or of no image, and of refined, five of these or none."""
    one = cam.shape[1:] if needs_cam else (0, *cam.shape[2:])
    five = (5 if needs_refined else 0, *cam.shape[1:])
    return cam.new_empty(one), cam.new_empty(five)


def fake(cam: Tensor, refined: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return cam.new_empty(3), *empty_gradients(cam, refined, *options[-2:])


def backward(
    grad: Tensor, cam: Tensor, refined: Tensor | None, d_cam: Tensor, d_refined: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of cam and of refined. A gradient that is not needed has no branch."""
    tcp, tcp_refined, cpcr = grad.unbind()
    of_cam, of_refined = fake_backward(grad, cam, refined, d_cam, d_refined)
    if len(of_cam):
        torch.mul(d_cam, tcp, out=of_cam[0])
        of_cam[1:].zero_()
    if len(of_refined):
        torch.mul(d_refined[:3], tcp_refined, out=of_refined)
        of_refined[1:].addcmul_(d_refined[3:], cpcr)
    return of_cam, of_refined


def fake_backward(
    grad: Tensor, cam: Tensor, refined: Tensor | None, d_cam: Tensor, d_refined: Tensor
) -> tuple[Tensor, Tensor]:
    of_cam = cam.new_empty((3 if len(d_cam) else 0, *cam.shape[1:]))
    return of_cam, cam.new_empty((3 if len(d_refined) else 0, *cam.shape[1:]))


def save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:2], *output[1:])


def differentiate(ctx, grad, backward):  # type: ignore[no-untyped-def]
    of_cam, of_refined = backward(grad, *ctx.saved_tensors)
    needs_cam, needs_refined = ctx.needs_input_grad[:2]
    return of_cam if needs_cam else None, of_refined if needs_refined else None, *[None] * 12


_losses = operation(
    "complementary_losses_tiled", _forward, fake, backward, fake_backward,
    save=save, differentiate=differentiate, schema=SCHEMA, fuse_backward=True,
)  # fmt: skip


def _forward_suppression(
    refined: Tensor, labels: Tensor, size: list[int], share: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss () and its gradient."""
    batch = len(refined)
    count = counted(size[0] * size[1], share)
    resize = _resize(size, refined)
    loss, gradient = (part.zero_() for part in fake_suppression(refined, labels, size, share, needs_grad))
    if not resize.finite:
        flaws = refined.detach().new_zeros(refined.shape)
        flaws[:, 1:] = torch.where(labels[:, :, None, None] == 0, refined[:, 1:], 0) * 0
        loss += flaws.sum()
        gradient += flaws if needs_grad else 0
    for n, row in enumerate(labels):
        classes = row.nonzero().flatten() + 1
        upsampled = resize.up(refined[n : n + 1].index_select(1, classes))[0]
        scores = _strongest(upsampled).relu_()
        last = scores.flatten().kthvalue(count).values
        if last == 0 and resize.finite:
            continue
        below, equal = scores < last, scores == last
        weight = (count - below.sum()).to(scores.dtype) / equal.sum()
        counts = (below.to(scores.dtype) + equal * weight) / (count * batch)
        loss += (scores * counts).sum()
        if needs_grad:
            counts.masked_fill_(scores <= 0, 0).masked_fill_(scores.isnan(), torch.nan)
            gradient[n, classes] = resize.down(_through_strongest(counts, upsampled))
    return loss, gradient


def fake_suppression(
    refined: Tensor, labels: Tensor, size: list[int], share: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    return refined.new_empty(()), refined.new_empty((refined if needs_grad else refined[:0]).shape)


def backward_suppression(grad: Tensor, refined: Tensor, gradient: Tensor) -> Tensor:
    return gradient * grad


def fake_backward_suppression(grad: Tensor, refined: Tensor, gradient: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


def save_suppression(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0], output[1])


def differentiate_suppression(ctx, grad, backward):  # type: ignore[no-untyped-def]
    return backward(grad, *ctx.saved_tensors), *[None] * 4


_suppression = operation(
    "background_suppression_tiled", _forward_suppression, fake_suppression, backward_suppression,
    fake_backward_suppression, save=save_suppression, differentiate=differentiate_suppression, fuse_backward=True,
)  # fmt: skip
