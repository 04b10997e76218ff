"""Affinities of neighbouring pixels (Ahn and Kwak, CVPR 2018): pairs, their labels, the loss.

Everything is on the feature grid at stride 8. The inner grid leaves out radius - 1 cells on the left, on the right and
at the bottom. A pair is a cell of the inner grid and a cell below it, or right of it, that is nearer than radius. At
radius 5 there are 34 directions and, on 56 x 56 cells, 84,864 pairs. There is no table of pairs: for each direction,
both ends of all pairs are two views of one map.
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
    """Return the steps (dy, dx) of half a disc, dx^2 + dy^2 < radius^2, without (0, 0)."""
    reach = range(1 - radius, radius)
    return [(dy, dx) for dy in range(radius) for dx in reach if dx * dx + dy * dy < radius**2 and (dy, dx) > (0, 0)]


def fitting_radius(radius: int, height: int, width: int) -> int:
    """Return the radius, or a smaller one that fits a small map, as in SEAM's code."""
    edge = min(height, width)
    return radius if edge > 2 * radius else (edge - 1) // 2


def pairs(maps: Tensor, radius: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both ends of all pairs for each direction: maps (..., h, w) -> (..., h - radius + 1, w - 2 radius + 2)."""
    reach = max(radius, 1) - 1
    height, width = maps.shape[-2] - reach, maps.shape[-1] - 2 * reach
    near = maps[..., :height, reach : reach + width]
    for dy, dx in directions(radius):
        yield near, maps[..., dy : dy + height, reach + dx : reach + dx + width]


def pair_affinities(features: Tensor, radius: int) -> Tensor:
    """Return exp(-mean over channels of |f_i - f_j|): features (N, C, h, w) -> float32 (N, D, h', w'), D directions.

    The backward pass computes the differences again, so only the features stay in memory.
    """
    features = features.float()
    planes = [
        checkpoint(_affinity, near, far, use_reentrant=False, preserve_rng_state=False)
        for near, far in pairs(features, radius)
    ]
    return torch.stack(planes, dim=1) if planes else features[:, :0]  # a radius of 1 has no pairs


def _affinity(near: Tensor, far: Tensor) -> Tensor:
    return torch.exp(-(near - far).abs().mean(dim=1))


# Labels and loss


def combined_labels(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return certain labels, uint8 (H, W), from the masks of the CRFs with a low and with a high alpha.

    Classes are those that beat the large background score of the low alpha. Background is where it wins with the small
    score of the high alpha. All other pixels are IGNORE.
    """
    labels = np.where(low == 0, np.uint8(IGNORE), low)
    labels[high == 0] = 0
    return labels


def cell_labels(labels: Tensor) -> Tensor:
    """``combined_labels`` on the feature grid: integers (N, H, W), padding -1 -> int64 (N, H / 8, W / 8), rounded up.

    A cell is background if at least half of its pixels are. Otherwise it is its most frequent class, if this class has
    more pixels than background and IGNORE together. Otherwise it is IGNORE. The released code averages the CRF's scores
    over a cell for each alpha and takes the largest one. But an image's scores take megabytes, and masks kilobytes.
    """
    below, right = (-side % STRIDE for side in labels.shape[1:])
    labels = F.pad(labels.long(), (0, right, 0, below), value=-1)
    cells = labels.unflatten(2, (-1, STRIDE)).unflatten(1, (-1, STRIDE)).transpose(2, 3).flatten(3)
    cells = cells.where(cells >= 0, IGNORE)
    low = cells.where(cells != IGNORE, 0).mode(dim=3).values
    background = (cells == 0).sum(dim=3) * 2 >= cells.shape[3]
    return low.where(low > 0, IGNORE).where(~background, 0)


class AffinityLosses(NamedTuple):
    """Mean losses of three kinds of pairs; 0 for a kind without pairs."""

    background: Tensor
    """Mean of -log a over pairs within the background."""
    foreground: Tensor
    """Mean of -log a over pairs within a class."""
    different: Tensor
    """Mean of -log(1 - a) over pairs with different labels."""

    @property
    def total(self) -> Tensor:
        return self.background / 4 + self.foreground / 4 + self.different / 2


def affinity_losses(affinities: Tensor, labels: Tensor, radius: int) -> AffinityLosses:
    """Return the released losses of ``pair_affinities`` (N, D, h', w') with ``cell_labels`` (N, h, w)."""
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
