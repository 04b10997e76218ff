"""Affinities of neighbouring pixels (Ahn and Kwak, CVPR 2018): pairs, their labels, the loss.

All of it lives on the feature grid at stride 8. A pair is a cell of the inner grid, which leaves out radius - 1 cells
on the left, on the right and at the bottom, together with a cell below it or right of it that is nearer than radius:
34 directions and, on 56 x 56 cells, 84,864 pairs at radius 5. No table of pairs is kept: direction by direction, both
ends of all pairs are two views of one map.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cpn_fast.data.masks import IGNORE

STRIDE = 8


def directions(radius: int) -> list[tuple[int, int]]:
    """Steps (dy, dx) of half a disc, dx^2 + dy^2 < radius^2, without the step that stays."""
    reach = range(1 - radius, radius)
    return [(dy, dx) for dy in range(radius) for dx in reach if dx * dx + dy * dy < radius**2 and (dy, dx) > (0, 0)]


def fitting_radius(radius: int, height: int, width: int) -> int:
    """The radius, or what a map too small for it can hold, as in SEAM's code."""
    edge = min(height, width)
    return radius if edge > 2 * radius else (edge - 1) // 2


def pairs(maps: Tensor, radius: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both ends of all pairs in each direction: maps (..., h, w) -> views (..., h - radius + 1, w - 2 radius + 2)."""
    reach = max(radius, 1) - 1
    height, width = maps.shape[-2] - reach, maps.shape[-1] - 2 * reach
    near = maps[..., :height, reach : reach + width]
    for dy, dx in directions(radius):
        yield near, maps[..., dy : dy + height, reach + dx : reach + dx + width]


def pair_affinities(features: Tensor, radius: int) -> Tensor:
    """exp(-mean over channels of |f_i - f_j|): features (N, C, h, w) -> float32 (N, D, h', w') in D directions.

    The backward pass computes the differences again, so that memory stays at that of the features.
    """
    features = features.float()
    planes = [
        checkpoint(_affinity, near, far, use_reentrant=False, preserve_rng_state=False)
        for near, far in pairs(features, radius)
    ]
    return torch.stack(planes, dim=1) if planes else features[:, :0]  # a map of one or two cells has no pairs


def _affinity(near: Tensor, far: Tensor) -> Tensor:
    return torch.exp(-(near - far).abs().mean(dim=1))


# Labels and loss


def combined_labels(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """What both CRFs are sure of, uint8 (H, W): a class where it beats the large background score of the low alpha,
    background where it wins with the small score of the high alpha, IGNORE between them.
    """
    labels = np.where(low == 0, np.uint8(IGNORE), low)
    labels[high == 0] = 0
    return labels


def cell_labels(labels: Tensor) -> Tensor:
    """``combined_labels`` on the feature grid: integers (N, H, W), padding -1 -> int64 (N, H / 8, W / 8), rounded up.

    A cell is background if half of it is surely that, else the class that most of it is surely, else IGNORE. The
    released code averages the CRF's scores over a cell, for either alpha by itself, and takes the larger one, but
    scores of an image are megabytes, and masks of which one wins are kilobytes.
    """
    below, right = (-side % STRIDE for side in labels.shape[1:])
    labels = F.pad(labels.long(), (0, right, 0, below), value=-1)
    cells = labels.unflatten(2, (-1, STRIDE)).unflatten(1, (-1, STRIDE)).transpose(2, 3).flatten(3)
    cells = cells.where(cells >= 0, IGNORE)
    low = cells.where(cells != IGNORE, 0).mode(dim=3).values
    background = (cells == 0).sum(dim=3) * 2 >= cells.shape[3]
    return low.where(low > 0, IGNORE).where(~background, 0)


class AffinityLosses(NamedTuple):
    """Means over the pairs of one kind; 0 where there is no such pair."""

    background: Tensor
    """-log a over pairs within the background."""
    foreground: Tensor
    """-log a over pairs within a class."""
    different: Tensor
    """-log(1 - a) over pairs of different labels."""

    @property
    def total(self) -> Tensor:
        return self.background / 4 + self.foreground / 4 + self.different / 2


def affinity_losses(affinities: Tensor, labels: Tensor, radius: int) -> AffinityLosses:
    """The released loss: affinities (N, D, h', w') of ``pair_affinities``, labels (N, h, w) of ``cell_labels``."""
    sides = [torch.stack(side, dim=1) for side in zip(*pairs(labels, radius), strict=True)]
    if not sides:
        return AffinityLosses(*[affinities.sum()] * 3)
    near, far = sides
    known = (near != IGNORE) & (far != IGNORE)
    same = known & (near == far)
    attracted, repelled = -torch.log(affinities + 1e-5), -torch.log(1 + 1e-5 - affinities)

    def mean(values: Tensor, chosen: Tensor) -> Tensor:
        return (values * chosen).sum() / (chosen.sum() + 1e-5)

    return AffinityLosses(
        mean(attracted, same & (near == 0)), mean(attracted, same & (near > 0)), mean(repelled, known & (near != far))
    )
