"""The segmenter: DeepLab v1 with a large field of view (Chen et al., ICLR 2015) on any backbone."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from cpn_fast.config import Config, Model
from cpn_fast.models import build_backbone
from cpn_fast.models.backbone import Backbone, Headed
from cpn_fast.models.dropout import SharedDropout

INNER = 512  # channels of the two convolutions of the head


class DeepLab(Headed):
    """A backbone and the released trainer's head: 3x3 with dilation 12, 1x1, and the classifier.

    ``classes`` counts the foreground. All convolutions train, also those that a CAM's backbone keeps frozen. Batch
    normalisation uses stored statistics in the backbone and those of the batch in the head. Under torchrun a process
    uses those of its share, and the statistics of the first process are stored. The factors of batch normalisation
    never train.
    """

    folds = (("conv_fov", "bn_fov"), ("conv_fov2", "bn_fov2"))

    def __init__(self, backbone: Backbone, classes: int, options: Model, *, bn_momentum: float) -> None:
        super().__init__(backbone, options)
        self.conv_fov = nn.Conv2d(backbone.channels[2], INNER, 3, padding=12, dilation=12, bias=False)
        self.bn_fov = nn.BatchNorm2d(INNER, momentum=bn_momentum).requires_grad_(False)
        self.conv_fov2 = nn.Conv2d(INNER, INNER, 1, bias=False)
        self.bn_fov2 = nn.BatchNorm2d(INNER, momentum=bn_momentum).requires_grad_(False)
        self.dropout1 = SharedDropout(0.5)
        self.cls_conv = nn.Conv2d(INNER, 1 + classes, 1)
        for layer in (self.conv_fov, self.conv_fov2):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        # With the released initialisation of this layer the first cross-entropy of 21 classes is 12. Since batch
        # normalisation has fixed statistics, such gradients set nearly all last features of MobileNetV2 to 0.
        nn.init.normal_(self.cls_conv.weight, std=0.01)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.requires_grad_(True)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> logits (N, 1 + classes, h, w) at the backbone's stride."""
        x = F.relu(self.bn_fov(self.conv_fov(self.backbone(images).last)))
        x = F.relu(self.bn_fov2(self.conv_fov2(x)))
        return self.cls_conv(self.dropout1(x))


def build_deeplab(config: Config) -> DeepLab:
    """Return the config's segmenter with random weights."""
    backbone = build_backbone(config.model)
    return DeepLab(backbone, len(config.classes), config.model, bn_momentum=config.segment.bn_momentum)
