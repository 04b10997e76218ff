"""The demo's backbone: it trains from random weights on a laptop's CPU in minutes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpn_fast.models.backbone import Backbone, Features

_INNER_SCALE = 0.2  # with unit variance in every channel, PRCM's softmax would be a hard maximum


class Narrow(Backbone):
    """Residual net of 263,824 parameters.

    Stored batch statistics need pretraining, so it uses group normalisation. This learns quickly only together with
    standardised convolution weights (Qiao et al., 2019).
    """

    channels = (48, 64, 96)
    mean = (127.5, 127.5, 127.5)
    std = (127.5, 127.5, 127.5)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(StandardisedConv2d(3, 16, 3, stride=2), nn.GroupNorm(2, 16), nn.ReLU(inplace=True))
        self.low = nn.Sequential(Residual(16, 32, stride=2), Residual(32, 48, stride=2))
        self.middle = Residual(48, 64)
        self.last = Residual(64, 96, dilation=2)
        self.train()

    def fit(self, size: int) -> int:
        return max(size, 16)  # a single cell has no statistics

    def forward(self, images: Tensor) -> Features:
        low = self.stem(images)
        for block in self.low:
            low = self.through(block, low)
        middle = self.through(self.middle, low)
        # Features after a ReLU have similar directions everywhere. Affinities need the differences within an image.
        low, inner = (_INNER_SCALE * F.group_norm(x, x.shape[1]) for x in (low, middle))
        return Features(low, inner, self.through(self.last, middle))


class Residual(nn.Module):
    """Two 3x3 convolutions beside a 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = StandardisedConv2d(inputs, outputs, 3, stride=stride, dilation=dilation)
        self.norm1 = nn.GroupNorm(outputs // 8, outputs)
        self.conv2 = StandardisedConv2d(outputs, outputs, 3, dilation=dilation)
        self.norm2 = nn.GroupNorm(outputs // 8, outputs)
        self.project = StandardisedConv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.relu_(self.norm1(self.conv1(x)))
        return torch.relu_(self.norm2(self.conv2(branch)) + self.project(x))


class StandardisedConv2d(nn.Conv2d):
    """Padded convolution that standardises its filters to mean 0 and norm 1."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        scale = torch.rsqrt(variance * self.weight[0].numel() + 1e-4)
        return self._conv_forward(x, (self.weight - mean) * scale, None)
