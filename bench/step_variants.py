"""ResNet38d's dilated convolutions on interleaved pixels: the same weights and, up to rounding, the same results.

``interleave`` re-orders the pixels of a map into d x d images, whose neighbours are d pixels apart in the map. On them
a convolution of dilation d is a plain one, with the same zero padding. On an H100 plain convolutions are faster. A map
whose sides are not divisible by d takes the dilated convolution.

There are two forms, each a row of ``train_step.py``. They are candidates for the training step, to be decided on a GPU:
the better one will replace the plain form in ``cpn_fast/models`` if it is faster; the other will be removed.
"""

from __future__ import annotations

import timing  # noqa: F401 (puts this tree on the path)
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpn_fast.models.backbone import Features
from cpn_fast.models.resnet38d import Block, Bottleneck, ResNet38d


class Interleaved(nn.Conv2d):
    """A dilated 3x3 convolution that re-orders its input and its output. Compiled, both are part of what is around."""

    def forward(self, x: Tensor) -> Tensor:
        by = self.dilation[0]
        if any(side % by for side in x.shape[2:]):
            return super().forward(x)
        return deinterleave(F.conv2d(interleave(x, by), self.weight, None, self.stride, padding=1), by)


def with_interleaved_convolutions() -> ResNet38d:
    """Return the network with ``Interleaved`` for each dilated convolution."""
    network = ResNet38d()
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.dilation[0] > 1:
            module.__class__ = Interleaved
    return network


class InterleavedBlocks(ResNet38d):
    """Pixels stay in interleaved order from b5 to b7: by 2 from b5's second convolution on, and by 4 from b6 on.

    All operations between these convolutions are per pixel, so the order does not matter to them.
    """

    def forward(self, images: Tensor) -> Features:
        x = self.conv1a(images)
        for block in (self.b2, self.b2_1, self.b2_2, self.b3, self.b3_1, self.b3_2):
            x, _ = block(x)
        for block in (self.b4, self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5):
            x, _ = block(x)
        by = 2 if all(side % 4 == 0 for side in x.shape[2:]) else 1
        masks = self.b6.masks(x), self.b7.masks(x)
        x, low = self.block(self.b5, x, 1, by)
        for block in (self.b5_1, self.b5_2):
            x, _ = self.block(block, x, by)
        x = interleave(x, by)
        x, middle = self.bottleneck(self.b6, x, masks[0], by * by)
        x, _ = self.bottleneck(self.b7, x, masks[1], by * by)
        last = activate(self.bn7, x)
        return Features(low, *(deinterleave(deinterleave(maps, by), by) for maps in (middle, last)))

    def block(self, block: Block, x: Tensor, order: int, by: int = 1) -> tuple[Tensor, Tensor]:
        """As ``Block.forward``, for pixels in interleaved ``order``; ``by`` re-orders them before the second layer."""
        inputs = activate(block.bn_branch2a, x)
        branch = activate(block.bn_branch2b1, convolve(block.conv_branch2a, inputs, order))
        shortcut = x if block.conv_branch1 is None else block.conv_branch1(interleave(inputs, by))
        return shortcut + convolve(block.conv_branch2b1, interleave(branch, by), order * by), inputs

    def bottleneck(self, block: Bottleneck, x: Tensor, masks: tuple[Tensor, ...], order: int) -> tuple[Tensor, Tensor]:
        first, second = (mask.repeat_interleave(order * order, 0) for mask in masks) if masks else (None, None)
        inputs = activate(block.bn_branch2a, x)
        branch = block.dropout_2b1(activate(block.bn_branch2b1, block.conv_branch2a(inputs)), first)
        branch = activate(block.bn_branch2b2, convolve(block.conv_branch2b1, branch, order))
        branch = block.conv_branch2b2(block.dropout_2b2(branch, second))
        return block.conv_branch1(inputs) + branch, inputs


def interleave(x: Tensor, by: int) -> Tensor:
    """(N, C, h, w) -> (N by by, C, h / by, w / by): image (n, i, j) has every by-th pixel from (i, j) on."""
    if by == 1:
        return x
    count, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(count, height // by, by, width // by, by, channels)
    images = pixels.permute(0, 2, 4, 1, 3, 5).reshape(count * by * by, height // by, width // by, channels)
    return images.permute(0, 3, 1, 2)  # in channels-last memory, like all maps


def deinterleave(x: Tensor, by: int) -> Tensor:
    """Undo ``interleave``."""
    if by == 1:
        return x
    count, channels, height, width = x.shape
    images = x.permute(0, 2, 3, 1).reshape(count // by**2, by, by, height, width, channels)
    pixels = images.permute(0, 3, 1, 4, 2, 5).reshape(count // by**2, height * by, width * by, channels)
    return pixels.permute(0, 3, 1, 2)


def convolve(convolution: nn.Conv2d, x: Tensor, order: int) -> Tensor:
    """Apply a 3x3 convolution, padded by its dilation, to pixels in interleaved order."""
    assert convolution.padding == convolution.dilation
    dilation = convolution.dilation[0] // order
    return F.conv2d(x, convolution.weight, None, convolution.stride, dilation, dilation)


def activate(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return torch.relu_(norm(x))
