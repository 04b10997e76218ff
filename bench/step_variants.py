"""ResNet38d computed in other ways, with the same weights and, up to rounding, the same results and gradients.

These are candidates for the training step, to be decided on a GPU: each is a row of ``train_step.py``. A variant that
is not faster there will be removed. A faster one will replace the plain form in ``cpn_fast/models``.
"""

from __future__ import annotations

from typing import Any

import timing  # noqa: F401 (puts this tree on the path)
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpn_fast.models.backbone import Features
from cpn_fast.models.resnet38d import Block, Bottleneck, ResNet38d


class Variant(ResNet38d):
    """``interleaved``: dilated 3x3 convolutions run without dilation on images of every d-th pixel.

    The pixels of a map are re-ordered into its d x d interleaved images, whose neighbours are d pixels apart in the
    map. On them a convolution of dilation d is a plain one, with the same zero padding. The value 2 is for b5 alone; 4
    is for b5 to b7, where b6 and b7 re-order the pixels once more by 2. Maps whose sides are not divisible use the
    plain form. All operations between these convolutions are per pixel, so the order does not matter to them.

    ``folded``: each frozen normalisation after a convolution becomes part of the convolution's weight and a bias. The
    convolution adds the bias and applies the ReLU in its epilogue (cuDNN's, on a GPU). The gradient of the weight goes
    through the product of weight and scale. The 17 normalisations after a residual sum stay.
    """

    interleaved = 1
    folded = False

    def forward(self, images: Tensor) -> Features:
        x = self.conv1a(images) if not self.folded else conv_norm_relu(self.conv1a, self.b2.bn_branch2a, images)
        x, _ = self.block(self.b2, x, activated=self.folded)
        for block in (self.b2_1, self.b2_2, self.b3, self.b3_1, self.b3_2):
            x, _ = self.block(block, x)
        for block in (self.b4, self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5):
            x, _ = self.block(block, x)
        most = self.interleaved if all(side % self.interleaved == 0 for side in x.shape[2:]) else 1
        masks = self.b6.masks(x), self.b7.masks(x)
        by = min(most, 2)
        x, low = self.block(self.b5, x, by=by)
        for block in (self.b5_1, self.b5_2):
            x, _ = self.block(block, x, order=by)
        order = most if most == 4 else 1
        x = interleave(x, 2) if order == 4 else deinterleave(x, by)
        x, middle = self.bottleneck(self.b6, x, masks[0], order)
        x, _ = self.bottleneck(self.b7, x, masks[1], order)
        return Features(low, self.plain(middle, order), self.plain(activate(self.bn7, x), order))

    def block(
        self, block: Block, x: Tensor, *, activated: bool = False, order: int = 1, by: int = 1
    ) -> tuple[Tensor, Tensor]:
        """As ``Block.forward``, for pixels in interleaved ``order``; ``by`` re-orders them before the second layer."""
        inputs = x if activated else activate(block.bn_branch2a, x)
        branch = self.conv(block.conv_branch2a, block.bn_branch2b1, inputs, order)
        shortcut = x if block.conv_branch1 is None else block.conv_branch1(interleave(inputs, by))
        branch = undilated(block.conv_branch2b1, interleave(branch, by), order * by)
        return shortcut + branch, inputs

    def bottleneck(self, block: Bottleneck, x: Tensor, masks: tuple[Tensor, ...], order: int) -> tuple[Tensor, Tensor]:
        first, second = (mask.repeat_interleave(order * order, 0) for mask in masks) if masks else (None, None)
        inputs = activate(block.bn_branch2a, x)
        branch = self.conv(block.conv_branch2a, block.bn_branch2b1, inputs, order)
        branch = block.dropout_2b1(branch, first)
        branch = self.conv(block.conv_branch2b1, block.bn_branch2b2, branch, order)
        branch = block.conv_branch2b2(block.dropout_2b2(branch, second))
        return block.conv_branch1(inputs) + branch, inputs

    def conv(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, order: int) -> Tensor:
        """Apply convolution, normalisation and ReLU."""
        if self.folded:
            return conv_norm_relu(convolution, norm, x, order)
        return activate(norm, undilated(convolution, x, order))

    def plain(self, x: Tensor, order: int) -> Tensor:
        """Undo the order of b6 and b7, which has two steps of 2."""
        return deinterleave(deinterleave(x, 2), 2) if order == 4 else x


def variant(interleaved: int, folded: bool) -> Variant:
    """Return the network with these switches."""
    network = Variant()
    network.interleaved, network.folded = interleaved, folded
    return network


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


def geometry(convolution: nn.Conv2d, order: int) -> tuple[list[int], list[int], list[int]]:
    """Return stride, padding and dilation of the convolution on pixels in interleaved order."""
    if convolution.kernel_size == (1, 1):
        return [*convolution.stride], [0, 0], [1, 1]
    dilation = [side // order for side in convolution.dilation]
    assert convolution.padding == convolution.dilation
    return [*convolution.stride], dilation, dilation


def undilated(convolution: nn.Conv2d, x: Tensor, order: int) -> Tensor:
    """Apply the convolution to pixels in interleaved order."""
    return F.conv2d(x, convolution.weight, None, *geometry(convolution, order))


def activate(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return torch.relu_(norm(x))


def conv_norm_relu(convolution: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, order: int = 1) -> Tensor:
    """Compute ``relu(norm(convolution(x)))`` by one convolution with the norm's factors in its weight.

    It follows autocast.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, bias = convolution.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return conv_relu(x.to(dtype), weight.to(dtype), bias.to(dtype), *geometry(convolution, order))


@torch.library.custom_op("cpn_bench::conv_relu", mutates_args=())
def conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Convolution, bias and ReLU in one kernel of cuDNN. Of the three outputs backward needs only the last."""
    if x.is_cuda:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, 1)
    return F.conv2d(x, weight, bias, stride, padding, dilation).relu_()


@conv_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    return torch.empty_like(F.conv2d(x, weight, bias, stride, padding, dilation))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, output = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]  # the bias of a frozen norm is a constant
    d_x, d_weight, _ = torch.ops.aten.convolution_backward(
        gradient * (output > 0), x, weight, None, *ctx.options, False, [0, 0], 1, wanted
    )
    return d_x, d_weight, None, None, None, None


conv_relu.register_autograd(_backward, setup_context=_keep)
