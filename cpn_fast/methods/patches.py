"""Complementary pairs: an image with randomly hidden patches, and the same image with only those patches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cpn_fast.config import Patches, Rgb


class Pair(NamedTuple):
    """Two views of a batch. Each patch is shown in one and hidden in the other."""

    visible: Tensor
    """(B, 3, H, W), with hidden patches filled."""
    complement: Tensor
    """(B, 3, H, W), with visible patches filled."""
    share: Tensor
    """(B,) float32, part of the image that ``visible`` shows, from 0 to 1 (lambda)."""


def complementary_pair(
    images: Tensor,
    superpixels: Tensor | None,
    config: Patches,
    fill: Tensor | None,
    generator: torch.Generator,
    *,
    patch_limit: int,
    place: tuple[int, int] = (0, 1),
) -> Pair:
    """Hide patches of normalised images, (B, 3, H, W) of any float dtype, on their device and without a host sync.

    ``superpixels`` (B, H, W) holds integer labels from 0 to ``patch_limit - 1``, and -1 for padding. Padding stays
    unchanged in both images. Padding and labels outside the crop do not count. Grids ignore ``superpixels`` and
    ``patch_limit``. ``fill`` (3,) is the normalised colour of hidden pixels; None is 0. Random numbers come only from
    ``generator``, on its device: the same state gives the same pair. ``place`` (number, world): the images are part
    ``number`` of a batch in ``world`` equal parts, and get the same pairs as in the whole batch. Raises ValueError if
    the config splits images by superpixels and there are none.
    """
    if config.kind == "grid":
        patches, patch_limit = _grid(images, config.grid_sizes, generator, place)
    elif superpixels is None:
        raise ValueError("superpixels is None, but patches.kind is superpixel")
    else:
        patches = superpixels.flatten(1).long()
    inside = patches >= 0
    patches = patches.where(inside, patch_limit)
    present = torch.zeros(len(images), patch_limit + 1, dtype=torch.bool, device=images.device)
    present = present.scatter_(1, patches, True)[:, :-1]
    if config.kind == "superpixel" and config.sampling == "with-replacement":
        hidden = _draw_with_replacement(present, config.hide, generator, place)
    else:
        hidden = _uniform(present.shape, present.device, generator, place) < config.hide

    covered = torch.nn.functional.pad(hidden, (0, 1)).gather(1, patches)
    if config.share == "pixels":
        share = 1 - covered.sum(1) / inside.sum(1)
    else:
        share = (present & ~hidden).sum(1) / present.sum(1)
    covered, shown = (mask.view(-1, 1, *images.shape[2:]) for mask in (covered, ~covered & inside))
    colour = images.new_zeros(()) if fill is None else fill.to(images).view(3, 1, 1)
    return Pair(images.where(~covered, colour), images.where(~shown, colour), share)


def normalised_fill(config: Patches, mean: Rgb, std: Rgb) -> Tensor | None:
    """Return ``patches.fill`` for ``complementary_pair``, for images normalised as (x - mean) / std."""
    return None if config.fill is None else (torch.tensor(config.fill) - torch.tensor(mean)) / torch.tensor(std)


def _grid(
    images: Tensor, sizes: tuple[int, ...], generator: torch.Generator, place: tuple[int, int]
) -> tuple[Tensor, int]:
    """Return numbers of square cells (B, H * W) and their bound. The side is random per image; border cells are cut."""
    height, width = images.shape[2:]
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    cells = [(y // size)[:, None] * math.ceil(width / size) + x // size for size in sizes]
    drawn = _uniform((len(images),), images.device, generator, place).mul(len(sizes)).long()
    return torch.stack(cells).flatten(1)[drawn], math.ceil(height / min(sizes)) * math.ceil(width / min(sizes))


def _draw_with_replacement(present: Tensor, hide: float, generator: torch.Generator, place: tuple[int, int]) -> Tensor:
    """Draw floor(hide * n) of an image's n present patches, with replacement; return bool like ``present``."""
    count = present.sum(1, keepdim=True)
    draws = math.floor(hide * present.shape[1])
    ranks = (_uniform((len(present), draws), present.device, generator, place) * count).long()
    # Images need different numbers of draws, but one shape: surplus draws fall on an extra rank.
    surplus = torch.arange(draws, device=present.device) >= (hide * count.double()).floor()
    ranks = ranks.masked_fill(surplus, present.shape[1])
    drawn = torch.zeros_like(torch.nn.functional.pad(present, (0, 1))).scatter_(1, ranks, True)
    return drawn.gather(1, present.cumsum(1).sub(1).clamp(min=0)) & present


def _uniform(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator, place: tuple[int, int]
) -> Tensor:
    """Draw float32 from [0, 1) for all parts; return this part. A product with an integer n never rounds up to n."""
    number, world = place
    drawn = torch.rand((world, *shape), generator=generator, device=generator.device)
    return drawn[number].to(device)
