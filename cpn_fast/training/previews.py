"""Pictures of CAMs for TensorBoard while a network trains."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cpn_fast.config import Config
from cpn_fast.data.pictures import cam_overlay
from cpn_fast.models.network import Network
from cpn_fast.runtime.precision import autocast

COUNT, SIDE = 4, 160
"""Number of images, and side of a picture in pixels."""


class Previews:
    """Draws the CAMs of a few images."""

    def __init__(self, shown: Sequence[tuple[np.ndarray, np.ndarray]], config: Config, network: Network) -> None:
        """``shown`` holds images, uint8 RGB (H, W, 3), with their labels, bool (classes,)."""
        self.network, self.precision = network, config.train.precision
        self.device = next(network.parameters()).device
        self.images = np.stack([_fitted(image, config.augment.crop) for image, _ in shown])
        self.warned = False
        self.labels = torch.from_numpy(np.stack([label for _, label in shown])).to(self.device)

    def picture(self) -> np.ndarray | None:
        """Return uint8 RGB: a row per image, with the image, the maximum of its raw CAMs, and that of its refined CAMs.

        Returns None if the GPU's memory is full, with a warning on stderr the first time. Training goes on.
        """
        try:
            return self._drawn()
        except torch.OutOfMemoryError:
            if not self.warned:
                print("Warning: no pictures of CAMs: the GPU's memory is full", file=sys.stderr)
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
            # Not network(...): torch.compile may have replaced it for the shapes of training.
            cams = self.network.forward(images.contiguous(memory_format=torch.channels_last), self.labels.float())
        small = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in self.images]
        columns = [small] + [self._over(small, maps) for maps in cams if maps is not None]
        return np.concatenate([np.concatenate(column) for column in columns], axis=1)

    def _over(self, images: Sequence[np.ndarray], maps: Tensor) -> list[np.ndarray]:
        heat = (F.relu(maps[:, 1:].float()) * self.labels[:, :, None, None]).amax(1, keepdim=True)
        heat = heat / heat.amax((2, 3), keepdim=True).clamp(min=1e-5)
        heat = F.interpolate(heat, (SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0]
        return [cam_overlay(image, plane) for image, plane in zip(images, heat.cpu().numpy(), strict=True)]


def _fitted(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image to a long side of ``side``; put it at the top left of a black square."""
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(scale * length)) for length in image.shape[:2])
    square = np.zeros((side, side, 3), np.uint8)
    square[:height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return square
