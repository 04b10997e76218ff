"""Complementary pairs: an image whose patches are hidden at random, and the same image with only those shown."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cpn_fast.config import Patches, Rgb


class Pair(NamedTuple):
    visible: Tensor
    """(B, 3, H, W), hidden patches filled."""
    complement: Tensor
    """(B, 3, H, W), visible patches filled."""
    share: Tensor
    """(B,) float32, how much of the image ``visible`` shows (lambda)."""


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

    ``superpixels`` (B, H, W) holds integer labels from 0 to ``patch_limit - 1``, and -1 where padding is: that stays as
    it is in both images. Labels that a crop lacks, and padding, count nowhere. Grids ignore both arguments. ``fill``
    (3,) is the normalised colour of hidden pixels, None is 0. Every random number comes from ``generator``, on its own
    device: the same state gives the same pair. ``place`` (number, world) says that these are the number-th of world
    equal parts of the images, which then become the pairs that the whole would.
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
    """``patches.fill`` as ``complementary_pair`` takes it, for images normalised as (x - mean) / std."""
    return None if config.fill is None else (torch.tensor(config.fill) - torch.tensor(mean)) / torch.tensor(std)


def _grid(
    images: Tensor, sizes: tuple[int, ...], generator: torch.Generator, place: tuple[int, int]
) -> tuple[Tensor, int]:
    """Square cells of a side drawn per image, the last ones cut off: cell numbers (B, H * W) and their bound."""
    height, width = images.shape[2:]
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    cells = [(y // size)[:, None] * math.ceil(width / size) + x // size for size in sizes]
    drawn = _uniform((len(images),), images.device, generator, place).mul(len(sizes)).long()
    return torch.stack(cells).flatten(1)[drawn], math.ceil(height / min(sizes)) * math.ceil(width / min(sizes))


def _draw_with_replacement(present: Tensor, hide: float, generator: torch.Generator, place: tuple[int, int]) -> Tensor:
    """Draw floor(hide * n) of an image's n present patches, a patch perhaps more than once: bool like ``present``."""
    count = present.sum(1, keepdim=True)
    draws = math.floor(hide * present.shape[1])
    ranks = (_uniform((len(present), draws), present.device, generator, place) * count).long()
    # The number of draws differs between images, but the shapes must not: surplus draws fall on an extra rank.
    surplus = torch.arange(draws, device=present.device) >= (hide * count.double()).floor()
    ranks = ranks.masked_fill(surplus, present.shape[1])
    drawn = torch.zeros_like(torch.nn.functional.pad(present, (0, 1))).scatter_(1, ranks, True)
    return drawn.gather(1, present.cumsum(1).sub(1).clamp(min=0)) & present


def _uniform(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator, place: tuple[int, int]
) -> Tensor:
    """float32 from [0, 1), drawn for all parts; its product with a whole number n never rounds up to n."""
    number, world = place
    drawn = torch.rand((world, *shape), generator=generator, device=generator.device)
    return drawn[number].to(device)
