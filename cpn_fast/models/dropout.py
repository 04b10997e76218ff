"""Dropout that does not depend on how many processes share a step's images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SharedDropout(nn.Dropout):
    """``nn.Dropout`` whose mask is drawn for the images of all processes, each of which takes its own rows of it.

    With equal states of the random generator, several processes drop what one process with all the images would.
    """

    number, world = 0, 1
    images = 1
    """Of this process in a step: an input's rows are as many, or several views of them, view after view."""

    def drawn(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """0 or 1 / (1 - p), (N, *shape) for ``like`` (N, ...), drawn as torch's own dropout draws it."""
        views = len(like) // self.images if self.world > 1 else 1
        mask = torch.empty(len(like) * self.world, *shape, dtype=like.dtype, device=like.device)
        mask = mask.bernoulli_(1 - self.p).div_(1 - self.p)
        return mask.unflatten(0, (views, self.world, -1))[:, self.number].flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.drawn(x, tuple(x.shape[1:])) if self.training else x


class SharedDropout2d(SharedDropout, nn.Dropout2d):
    """``nn.Dropout2d`` of that kind."""

    def mask(self, like: Tensor, channels: int) -> Tensor:
        """Draw what ``forward`` multiplies by: 0 or 1 / (1 - p), (N, channels, 1, 1) for ``like`` (N, ...)."""
        return self.drawn(like, (channels, 1, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` is one that was drawn before, for a part of the network that is computed twice."""
        if not self.training:
            return x
        return x * (self.mask(x, x.shape[1]) if mask is None else mask)
