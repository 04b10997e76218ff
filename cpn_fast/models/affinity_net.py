"""AffinityNet (Ahn and Kwak, CVPR 2018): features with a small distance between pixels of one class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpn_fast.config import Model
from cpn_fast.models import build_backbone
from cpn_fast.models.backbone import Backbone, Headed

LOW, MIDDLE, LAST = 64, 128, 256  # channels of f8_3, f8_4 and f8_5


class AffinityNet(Headed):
    """A backbone and four 1x1 heads with the released code's names. The loss trains the backbone too.

    It has 106,484,032 parameters on ResNet38d.
    """

    def __init__(self, backbone: Backbone, options: Model) -> None:
        super().__init__(backbone, options)
        low, middle, last = backbone.channels
        features = LOW + MIDDLE + LAST
        self.f8_3 = nn.Conv2d(low, LOW, 1, bias=False)
        self.f8_4 = nn.Conv2d(middle, MIDDLE, 1, bias=False)
        self.f8_5 = nn.Conv2d(last, LAST, 1, bias=False)
        self.f9 = nn.Conv2d(features, features, 1, bias=False)
        for layer in (self.f8_3, self.f8_4, self.f8_5):
            nn.init.kaiming_normal_(layer.weight)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> features (N, 448, h, w) at the backbone's stride."""
        features = self.backbone(images)
        parts = [self.f8_3(features.low), self.f8_4(features.middle), self.f8_5(features.last)]
        return F.elu(self.f9(torch.cat([F.elu(part) for part in parts], dim=1)))


def build_affinity_net(options: Model) -> AffinityNet:
    """Return AffinityNet on a config's backbone, with random weights. Its stride is always 8."""
    options = options.model_copy(update={"stride": 8})
    return AffinityNet(build_backbone(options), options)
