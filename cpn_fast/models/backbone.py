"""What the heads ask of a backbone: three feature maps at output stride 8, and how to feed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from cpn_fast.config import Model, Rgb


class Features(NamedTuple):
    """Maps (N, C, h, w) of one size: each side of the input ceil-halved three times.

    low and middle are to be about as large as the normalised image, which enters PCM and PRCM beside them. PRCM's
    logits go with their square: ten times as large, its softmax over pixels is a hard maximum, and SEAM* diverges.
    """

    low: Tensor
    middle: Tensor
    last: Tensor


class Backbone(nn.Module):
    """Base of the backbones: images (N, 3, H, W), normalised with ``mean`` and ``std``, to Features.

    Batch normalisation always runs on its stored statistics, and neither it nor the submodules named by ``frozen``
    are trained. A subclass calls ``train()`` once its submodules exist.

    In training nothing is folded: ``torch.compile`` fuses a normalisation with the ReLU behind it, needs no gradient of
    its factors, and keeps 2 activations of a residual block where autograd keeps 4. For inference there is ``fold``.
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
    recomputes = False
    """Whether training keeps only the inputs of blocks and computes what is inside them again in the backward pass
    (``train.checkpoint_activations``). A triplet of 448 px through ResNet38d then keeps 1.2 GB in fp32 instead of 2.4
    without ``torch.compile``, and costs 7.95 TFLOP instead of 6.67."""

    def forward(self, images: Tensor) -> Features:
        raise NotImplementedError

    def through(self, block: nn.Module, *inputs: Tensor) -> Any:
        """A block's output. Blocks draw no random numbers, so that computing one again gives the same."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def fit(self, size: int) -> int:
        """The input side nearest to ``size`` (pixels) that the backbone is made for."""
        return size

    def pretrained(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a file of pretrained weights under the backbone's own names."""
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
    """A backbone with heads on it: what is trained. Submodules other than ``backbone`` are heads, new and faster."""

    def __init__(self, backbone: Backbone, options: Model) -> None:
        super().__init__()
        self.backbone = backbone
        self.mean, self.std = options.mean or backbone.mean, options.std or backbone.std
