"""What the heads ask of a backbone: three feature maps at output stride 8, and how to feed it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from typing_extensions import Self

from cpn_fast.config import Model, Rgb


class Features(NamedTuple):
    """Maps (N, C, h, w) of one size: each side of the input ceil-halved three times."""

    low: Tensor
    middle: Tensor
    last: Tensor


class Backbone(nn.Module):
    """Base of the backbones: images (N, 3, H, W), normalised with ``mean`` and ``std``, to Features.

    Batch normalisation always runs on its stored statistics, and neither it nor the submodules named by ``frozen``
    are trained. A subclass calls ``train()`` once its submodules exist.
    """

    channels: tuple[int, int, int]
    """Channels of low, middle and last."""
    mean: Rgb
    std: Rgb
    """x -> (x - mean) / std on RGB from 0 to 255."""
    frozen: tuple[str, ...] = ()
    """Submodules whose weights never train."""
    classifier: tuple[str, ...] = ()
    """Patterns of the classifier keys that pretrained files carry and a CAM has no use for."""

    def forward(self, images: Tensor) -> Features:
        raise NotImplementedError

    def fit(self, size: int) -> int:
        """The input side nearest to ``size`` (pixels) that the backbone is made for."""
        return size

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)
        return self


class Headed(nn.Module):
    """A backbone with heads on it: what is trained. Submodules other than ``backbone`` are heads, new and faster."""

    def __init__(self, backbone: Backbone, options: Model) -> None:
        super().__init__()
        self.backbone = backbone
        self.mean, self.std = options.mean or backbone.mean, options.std or backbone.std
