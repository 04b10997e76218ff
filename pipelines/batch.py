"""A batch of the training pipeline. This file needs no DALI, so neither do methods and their steps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One rank's part of a step, on the pipeline's device."""

    images: Tensor
    """float32 (B, 3, crop, crop), normalised; padding is 0."""
    pixel_map: Tensor | None
    """int32 (B, crop, crop), labels of pixels (superpixels, classes). Padding is -1 in maps from files; ``online``
    superpixels cover the padding too."""
    labels: Tensor
    """float32 (B, classes), 0 or 1."""
    indices: Tensor
    """int64 (B,), indices of the samples."""
    place: tuple[int, int] = (0, 1)
    """This rank and the number of ranks: the part of the step's images."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.images.shape[2:]
        return height, width
