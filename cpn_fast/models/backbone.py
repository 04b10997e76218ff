"""The interface of backbones: three feature maps at output stride 8 or 16, and the properties of the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from cpn_fast.config import Model, Rgb


class Features(NamedTuple):
    """Maps (N, C, h, w) of one size. At stride 8 each side of the input is halved three times and rounded up; some of
    timm's models, such as ConvNeXt, round down.

    The values of low and middle should be about as large as those of the normalised image, which enters PCM and PRCM
    beside them. PRCM's logits grow with the square of the values: at ten times the size, its softmax over pixels is a
    hard maximum, and SEAM* diverges.
    """

    low: Tensor
    middle: Tensor
    last: Tensor


class Backbone(nn.Module):
    """Base class of the backbones: images (N, 3, H, W), normalised with ``mean`` and ``std`` -> Features.

    Batch normalisation always uses its stored statistics. It is not trained, nor are the submodules named in
    ``frozen``. A subclass calls ``train()`` once its submodules exist.

    Training does not fold batch normalisation: ``torch.compile`` fuses it with the ReLU behind it, needs no gradient of
    its factors, and keeps 2 activations of a residual block instead of autograd's 4. Inference uses ``fold``.
    """

    channels: tuple[int, int, int]
    """Channels of low, middle and last."""
    mean: Rgb
    std: Rgb
    """Normalisation x -> (x - mean) / std of RGB from 0 to 255."""
    frozen: tuple[str, ...] = ()
    """Submodules whose weights never train."""
    classifier: tuple[str, ...] = ()
    """Patterns of classifier keys in pretrained files. CAMs do not use these weights."""
    recomputes = False
    """Whether training keeps only the inputs of blocks, and the backward pass computes each block again
    (``train.checkpoint_activations``). Without ``torch.compile``, a triplet of 448 px through ResNet38d then keeps
    1.2 GB instead of 2.4 in fp32, and takes 7.95 TFLOP instead of 6.67."""

    def forward(self, images: Tensor) -> Features:
        """Return the features of normalised images (N, 3, H, W)."""
        raise NotImplementedError

    def through(self, block: nn.Module, *inputs: Tensor) -> Any:
        """Return a block's output. Blocks draw no random numbers, so a second computation gives the same output."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def fit(self, size: int) -> int:
        """Return the side (pixels) nearest to ``size`` that suits the backbone."""
        return size

    def normalisation(self, tensors: Mapping[str, Tensor]) -> tuple[Rgb, Rgb]:
        """Return ``mean`` and ``std`` with which a file of pretrained weights was trained."""
        return self.mean, self.std

    def pretrained(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a file of pretrained weights to the backbone's names."""
        return dict(tensors)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)
        return self


class Headed(nn.Module):
    """A backbone with heads. All submodules but ``backbone`` are heads, which learn faster."""

    def __init__(self, backbone: Backbone, options: Model) -> None:
        super().__init__()
        self.backbone = backbone
        self.mean, self.std = options.mean or backbone.mean, options.std or backbone.std


Net = TypeVar("Net", bound=Headed)


def to_device(network: Net, device: torch.device) -> Net:
    """Move a network to a device, in channels-last memory, where convolutions are fastest. Returns the network."""
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
