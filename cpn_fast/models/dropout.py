"""Dropout that does not depend on the number of processes that share a step's images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SharedDropout(nn.Dropout):
    """``nn.Dropout`` that draws the mask for the images of all processes. Each process takes its rows.

    With equal states of the random generator, several processes drop the same values as one process with all images.
    """

    number, world = 0, 1
    images = 1
    """Images of this process in a step. An input has one row per image, or several views of them, view after view."""

    def drawn(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Draw the mask as torch's dropout does: 0 or 1 / (1 - p), (N, *shape) for ``like`` (N, ...)."""
        views = len(like) // self.images if self.world > 1 else 1
        mask = torch.empty(len(like) * self.world, *shape, dtype=like.dtype, device=like.device)
        mask = mask.bernoulli_(1 - self.p).div_(1 - self.p)
        return mask.unflatten(0, (views, self.world, -1))[:, self.number].flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.drawn(x, tuple(x.shape[1:])) if self.training else x


class SharedDropout2d(SharedDropout, nn.Dropout2d):
    """``nn.Dropout2d`` that draws the mask as ``SharedDropout``."""

    def mask(self, like: Tensor, channels: int) -> Tensor:
        """Draw a mask for ``forward``: 0 or 1 / (1 - p), (N, channels, 1, 1) for ``like`` (N, ...)."""
        return self.drawn(like, (channels, 1, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` was drawn before; a part of the network that is computed twice needs the same one."""
        if not self.training:
            return x
        return x * (self.mask(x, x.shape[1]) if mask is None else mask)
