"""MobileNetV2 (Sandler et al., CVPR 2018) at output stride 8 or 16, with torchvision's names of weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpn_fast.config import Rgb
from cpn_fast.models.backbone import Backbone, Features

# (expansion, channels, stride) of the blocks features.1 to features.17
_BLOCKS = (
    (1, 16, 1),
    (6, 24, 2), (6, 24, 1),
    (6, 32, 2), (6, 32, 1), (6, 32, 1),
    (6, 64, 2), (6, 64, 1), (6, 64, 1), (6, 64, 1),
    (6, 96, 1), (6, 96, 1), (6, 96, 1),
    (6, 160, 2), (6, 160, 1), (6, 160, 1),
    (6, 320, 1),
)  # fmt: skip
_LOW, _MIDDLE = 6, 13  # the last blocks of 32 and 96 channels
# Scales both maps to the rms of the image (0.57). They are sums without normalisation: rms 5.3 and 3.5 (ImageNet).
_INNER_SCALE = 0.1
_TORCHVISION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # 255 times its mean and std


class MobileNetV2(Backbone):
    """The small backbone, 2,223,872 parameters. TensorFlow's weights take RGB from -1 to 1, torchvision's do not."""

    channels = (32, 96, 1280)
    mean = (127.5, 127.5, 127.5)
    std = (127.5, 127.5, 127.5)
    # The layers at strides 2 and 4 have 2 % of the weights, and the largest activations.
    frozen = ("features.0", "features.1", "features.2", "features.3")
    classifier = ("classifier.*",)

    def __init__(self, stride: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, 32, 3, stride=2)]
        # Once the output stride is reached, the strides of the original become dilations of the depthwise convolutions
        # behind them. At input sides of 32k + 1, every second (fourth) feature equals that of the original.
        inputs, reached, dilation = 32, 2, 1
        for expansion, outputs, step in _BLOCKS:
            strided = reached < stride
            layers.append(InvertedResidual(inputs, outputs, expansion, step if strided else 1, dilation))
            reached, dilation = (reached * step, dilation) if strided else (reached, dilation * step)
            inputs = outputs
        layers.append(_convolution(inputs, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.train()

    def forward(self, images: Tensor) -> Features:
        x, inner = images, []
        for index, layer in enumerate(self.features):
            x = self.through(layer, x)
            if index in (_LOW, _MIDDLE):
                inner.append(x)
        # At output stride 16 the low features have a larger size than the others.
        low, middle = (F.interpolate(f, x.shape[2:], mode="bilinear", align_corners=True) for f in inner)
        return Features(_INNER_SCALE * low, _INNER_SCALE * middle, x)

    def normalisation(self, tensors: Mapping[str, Tensor]) -> tuple[Rgb, Rgb]:
        classifier = tensors.get("classifier.1.weight")
        if classifier is not None and len(classifier) == 1000:  # TensorFlow's has a class more, for background
            return _TORCHVISION
        return self.mean, self.std

    def fit(self, size: int) -> int:
        """Return the nearest 32k + 1. All sides are then odd, and symmetric padding is TensorFlow's 'same' padding."""
        return max(1, (size + 15) // 32) * 32 + 1


class InvertedResidual(nn.Module):
    """1x1 expansion (if above 1), depthwise 3x3, linear 1x1. Adds its input if the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, dilation: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.conv = Folded(
            *([_convolution(inputs, inner, 1)] if expansion > 1 else []),
            _convolution(inner, inner, 3, stride=stride, dilation=dilation, groups=inner),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class Folded(nn.Sequential):
    """Runs a convolution and the batch normalisation behind it as one convolution.

    The statistics are constants, so the function and its gradients stay the same. A CPU takes 0.75 to 0.9 of the time.
    """

    @property
    def folds(self) -> list[tuple[str, str]]:
        """Pairs for ``fold``. It does once for inference what ``forward`` does in every step."""
        names = list(self._modules.items())
        return [(a, b) for (a, _), (b, norm) in itertools.pairwise(names) if isinstance(norm, nn.BatchNorm2d)]

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, nn.Conv2d):
                weight, bias = layer.weight, layer.bias
                if isinstance(following, nn.BatchNorm2d):
                    weight, bias = _folded(layer, following)
                slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and layer.dilation[0] > 1
                if slow and layer.groups > 1:
                    x = dilated_depthwise(x, weight, bias, layer.dilation[0])
                else:
                    x = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
            elif not isinstance(layer, nn.BatchNorm2d):
                x = layer(x)
        return x


def _folded(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution with folded normalisation."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return layer.weight * scale[:, None, None, None], norm.bias - mean * scale


def dilated_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Compute a dilated depthwise 3x3 convolution of x (N, C, H, W), padded to its size, by plain convolutions.

    Each of them takes every d-th row and column. In bf16 on a CPU, torch's dilated convolution takes 2.5 to 5 times as
    long, forward and backward.
    """
    n, c, height, width = x.shape
    d, h, w = dilation, -(-height // dilation), -(-width // dilation)
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, w * d - width, 0, h * d - height))
    x = x.view(n, h, d, w, d, c).permute(2, 4, 0, 1, 3, 5).reshape(d * d * n, h, w, c)
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=c)
    x = x.permute(0, 2, 3, 1).view(d, d, n, h, w, c).permute(2, 3, 0, 4, 1, 5).reshape(n, h * d, w * d, c)
    return x[:, :height, :width].permute(0, 3, 1, 2)


def _convolution(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1, groups: int = 1
) -> Folded:
    padding = dilation * (kernel // 2)
    return Folded(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )
