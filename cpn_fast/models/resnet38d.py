"""ResNet38d: the wide ResNet of Wu, Shen and van den Hengel (model A1), dilated to output stride 8.

Submodules have the names in the released checkpoints, so these load without renaming.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpn_fast.models.backbone import Backbone, Features
from cpn_fast.models.dropout import SharedDropout2d


class ResNet38d(Backbone):
    """The paper's backbone, 105,070,912 parameters. ``low`` and ``middle`` are the activated inputs of b5 and b6."""

    channels = (512, 1024, 4096)
    mean = (123.675, 116.28, 103.53)
    std = (58.395, 57.12, 57.375)
    frozen = ("conv1a", "b2", "b2_1", "b2_2")
    folds = (("conv1a", "b2.bn_branch2a"),)

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, 64, 3, padding=1, bias=False)

        self.b2 = Block(64, 128, 128, stride=2)
        self.b2_1 = Block(128, 128, 128)
        self.b2_2 = Block(128, 128, 128)

        self.b3 = Block(128, 256, 256, stride=2)
        self.b3_1 = Block(256, 256, 256)
        self.b3_2 = Block(256, 256, 256)

        self.b4 = Block(256, 512, 512, stride=2)
        self.b4_1 = Block(512, 512, 512)
        self.b4_2 = Block(512, 512, 512)
        self.b4_3 = Block(512, 512, 512)
        self.b4_4 = Block(512, 512, 512)
        self.b4_5 = Block(512, 512, 512)

        self.b5 = Block(512, 512, 1024, dilations=(1, 2))
        self.b5_1 = Block(1024, 512, 1024, dilations=(2, 2))
        self.b5_2 = Block(1024, 512, 1024, dilations=(2, 2))

        self.b6 = Bottleneck(1024, 2048, dilation=4, dropout=0.3)
        self.b7 = Bottleneck(2048, 4096, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(4096)
        self.train()

    def forward(self, images: Tensor) -> Features:
        x = self.conv1a(images)
        for block in (self.b2, self.b2_1, self.b2_2, self.b3, self.b3_1, self.b3_2):
            x, _ = self.through(block, x)
        for block in (self.b4, self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5):
            x, _ = self.through(block, x)
        x, low = self.through(self.b5, x)
        x, _ = self.through(self.b5_1, x)
        x, _ = self.through(self.b5_2, x)
        x, middle = self.through(self.b6, x, *self.b6.masks(x))
        x, _ = self.through(self.b7, x, *self.b7.masks(x))
        return Features(low, middle, _activate(self.bn7, x))


class Block(nn.Module):
    """Pre-activated residual block of two 3x3 convolutions. Returns its output and its activated input."""

    folds = (("conv_branch2a", "bn_branch2b1"),)

    def __init__(
        self, inputs: int, inner: int, outputs: int, *, stride: int = 1, dilations: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        first, second = dilations
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, inner, 3, stride, padding=first, dilation=first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(inner)
        self.conv_branch2b1 = nn.Conv2d(inner, outputs, 3, padding=second, dilation=second, bias=False)
        projects = inputs != outputs or stride != 1
        self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if projects else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        activated = _activate(self.bn_branch2a, x)
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(activated)
        branch = self.conv_branch2a(activated)
        branch = self.conv_branch2b1(_activate(self.bn_branch2b1, branch))
        return shortcut + branch, activated


class Bottleneck(nn.Module):
    """Pre-activated 1x1, dilated 3x3, 1x1 with channel dropout. Returns its output and its activated input."""

    folds = (("conv_branch2a", "bn_branch2b1"), ("conv_branch2b1", "bn_branch2b2"))

    def __init__(self, inputs: int, outputs: int, *, dilation: int, dropout: float) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, outputs // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(outputs // 4)
        self.dropout_2b1 = SharedDropout2d(dropout)
        self.conv_branch2b1 = nn.Conv2d(outputs // 4, outputs // 2, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(outputs // 2)
        self.dropout_2b2 = SharedDropout2d(dropout)
        self.conv_branch2b2 = nn.Conv2d(outputs // 2, outputs, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, bias=False)

    def masks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Draw the dropout masks of ``forward(x)``; none outside training."""
        if not self.training:
            return ()
        pairs = ((self.dropout_2b1, self.conv_branch2b1), (self.dropout_2b2, self.conv_branch2b2))
        return tuple(dropout.mask(x, convolution.in_channels) for dropout, convolution in pairs)

    def forward(self, x: Tensor, *masks: Tensor) -> tuple[Tensor, Tensor]:
        first, second = masks or (None, None)
        activated = _activate(self.bn_branch2a, x)
        branch = self.conv_branch2a(activated)
        branch = self.conv_branch2b1(self.dropout_2b1(_activate(self.bn_branch2b1, branch), first))
        branch = self.conv_branch2b2(self.dropout_2b2(_activate(self.bn_branch2b2, branch), second))
        return self.conv_branch1(activated) + branch, activated


def _activate(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return torch.relu_(norm(x))
