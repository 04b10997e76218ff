"""Pictures of CAMs while a network trains, for TensorBoard."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cpn_fast.config import Config
from cpn_fast.models.network import Network
from cpn_fast.runtime.precision import autocast

COUNT, SIDE = 4, 160
"""Images, and pixels of a picture's side."""


class Gallery:
    """A few images, whose CAMs are drawn whenever it is asked for them."""

    def __init__(self, shown: Sequence[tuple[np.ndarray, np.ndarray]], config: Config, network: Network) -> None:
        """``shown`` holds images, uint8 RGB (H, W, 3), with their labels, bool (classes,)."""
        self.network, self.precision = network, config.train.precision
        self.device = next(network.parameters()).device
        self.images = np.stack([_fitted(image, config.augment.crop) for image, _ in shown])
        self.warned = False
        self.labels = torch.from_numpy(np.stack([label for _, label in shown])).to(self.device)

    def picture(self) -> np.ndarray | None:
        """uint8 RGB: a row for each image, beside it the strongest of its classes' raw and, if any, refined CAMs.

        None, with a warning on stderr the first time, where the GPU's memory is full: training goes on without it.
        """
        try:
            return self._drawn()
        except torch.OutOfMemoryError:
            if not self.warned:
                print("Warning: no pictures of CAMs, for which the GPU's memory has no room", file=sys.stderr)
            self.warned = True
            return None
        finally:
            self.network.train()

    @torch.no_grad()
    def _drawn(self) -> np.ndarray:
        mean, std = (torch.tensor(value, device=self.device) for value in (self.network.mean, self.network.std))
        images = ((torch.from_numpy(self.images).to(self.device) - mean) / std).permute(0, 3, 1, 2)
        self.network.eval()
        with autocast(self.precision, self.device):
            # Not the call, which torch.compile may have taken over for the shapes of training.
            cams = self.network.forward(images.contiguous(memory_format=torch.channels_last), self.labels.float())
        small = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in self.images]
        columns = [small] + [self._over(small, maps) for maps in cams if maps is not None]
        return np.concatenate([np.concatenate(column) for column in columns], axis=1)

    def _over(self, images: Sequence[np.ndarray], maps: Tensor) -> list[np.ndarray]:
        heat = (F.relu(maps[:, 1:].float()) * self.labels[:, :, None, None]).amax(1, keepdim=True)
        heat = heat / heat.amax((2, 3), keepdim=True).clamp(min=1e-5)
        heat = F.interpolate(heat, (SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0]
        levels = (255 * heat).round().byte().cpu().numpy()
        coloured = [cv2.cvtColor(cv2.applyColorMap(own, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB) for own in levels]
        return [cv2.addWeighted(image, 0.5, own, 0.5, 0) for image, own in zip(images, coloured, strict=True)]


def _fitted(image: np.ndarray, side: int) -> np.ndarray:
    """Resized to a long side of ``side``, at the top left of a black square."""
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(scale * length)) for length in image.shape[:2])
    square = np.zeros((side, side, 3), np.uint8)
    square[:height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return square
