"""Channel dropout that does not depend on how many processes share a step's images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SharedDropout2d(nn.Dropout2d):
    """``nn.Dropout2d`` whose mask is drawn for the images of all processes, each of which takes its own rows of it.

    With equal states of the random generator, several processes drop what one process with all the images would.
    """

    number, world = 0, 1
    images = 1
    """Of this process in a step: an input's rows are as many, or several views of them, view after view."""

    def forward(self, x: Tensor) -> Tensor:
        if self.world == 1 or not self.training:
            return super().forward(x)
        views = len(x) // self.images
        # As torch's own dropout draws it, so that the numbers are the same.
        mask = torch.empty(views * self.world * self.images, x.shape[1], 1, 1, dtype=x.dtype, device=x.device)
        mask = mask.bernoulli_(1 - self.p).div_(1 - self.p)
        return x * mask.unflatten(0, (views, self.world, self.images))[:, self.number].flatten(0, 1)
