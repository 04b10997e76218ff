"""The network on a backbone: a class head, and the refinement of CAMs by PCM and PRCM (paper section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpn_fast.config import Config, Model
from cpn_fast.kernels import pixel_correlation, region_correlation, region_pooling
from cpn_fast.models import build_backbone
from cpn_fast.models.backbone import Backbone, Headed
from cpn_fast.models.dropout import SharedDropout2d

LOW, MIDDLE, EMBEDDING = 64, 128, 192  # channels of f8_3, f8_4, f9 and f10
HEADS = ("fc8", "f8_3", "f8_4", "f8_5", "f9", "f10", "conv_fov", "bn_fov", "conv_fov2", "bn_fov2", "cls_conv")
"""Names of the heads of all networks: Network, AffinityNet and DeepLab."""


class Cams(NamedTuple):
    """Class activation maps (N, 1 + classes, h, w); channel 0 is background."""

    raw: Tensor
    """Logits of the class head."""
    refined: Tensor | None
    """The CAM after PCM and PRCM, not negative; None if both are off."""


def normalised_cam(cam: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the input of PCM and PRCM: foreground with peak 1 and only each pixel's best class, background 1 - best.

    cam (N, 1 + C, h, w) logits, labels (N, C) or None for all classes -> float32 (N, 1 + C, h, w), no gradient.
    """
    foreground = F.relu(cam.detach()[:, 1:].float())
    peak = foreground.amax(dim=(2, 3), keepdim=True) + 1e-5
    foreground = F.relu(foreground - 1e-5) / peak
    if labels is not None:
        foreground = foreground * labels[:, :, None, None]
    best = foreground.amax(dim=1, keepdim=True)
    return torch.cat([1 - best, foreground.where(foreground == best, 0)], dim=1)


def printed_correlation(cam: Tensor, embedding: Tensor, *, norm: str, total: str, eps: float = 1e-5) -> Tensor:
    """Compute PCM with eqs. 9 and 10 as the paper prints them; it holds a matrix (h w) x (h w). The kernels lack it.

    The shapes are those of ``kernels.pixel_correlation``. ``norm`` and ``total`` are ``Model.pcm_norm`` and
    ``Model.pcm_sum``.
    """
    with torch.autocast(cam.device.type, enabled=False):  # sums over thousands of pixels need float32
        g = embedding.flatten(2).float()
        size = g.norm(dim=1, keepdim=True) if norm == "l2" else g.abs().sum(dim=1, keepdim=True) ** 2
        g = g / (size + eps)
        affinity = F.relu(g.transpose(1, 2) @ g)
        dims = (1,) if total == "column" else (1, 2)
        affinity = affinity / (affinity.sum(dim=dims, keepdim=True) + eps)
        return (cam.flatten(2).float() @ affinity).view_as(cam)


class Network(Headed):
    """Backbone, 1x1 class head ``fc8`` and the refinement heads, with the released code's names and channel order.

    ``classes`` counts the foreground. The refined map trains only the four refinement heads: the features are detached,
    and the CAM is a constant.
    """

    def __init__(self, backbone: Backbone, classes: int, options: Model) -> None:
        super().__init__(backbone, options)
        self.options = options
        low, middle, last = backbone.channels
        self.dropout7 = SharedDropout2d(0.5)
        self.fc8 = nn.Conv2d(last, 1 + classes, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)
        if options.pcm or options.prcm:
            self.f8_3 = nn.Conv2d(low, LOW, 1, bias=False)
            self.f8_4 = nn.Conv2d(middle, MIDDLE, 1, bias=False)
            self.f9 = nn.Conv2d(3 + LOW + MIDDLE, EMBEDDING, 1, bias=False)
            for layer in (self.f8_3, self.f8_4):
                nn.init.kaiming_normal_(layer.weight)
            nn.init.xavier_uniform_(self.f9.weight, gain=4)
        if options.prcm:
            self.f10 = nn.Conv2d(3 + LOW + MIDDLE, EMBEDDING, 1, bias=False)
            nn.init.xavier_uniform_(self.f10.weight, gain=4)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Cams:
        """Normalised images (N, 3, H, W), labels (N, C) for ``mask_absent`` -> Cams at the backbone's stride."""
        features = self.backbone(images)
        cam = self.fc8(self.dropout7(features.last))
        if not (self.options.pcm or self.options.prcm):
            return Cams(cam, None)
        if self.options.mask_absent and labels is None:
            raise ValueError("model.mask_absent needs image labels")
        small = F.interpolate(images, cam.shape[2:], mode="bilinear", align_corners=True)
        low = F.relu(self.f8_3(features.low.detach()))
        middle = F.relu(self.f8_4(features.middle.detach()))
        context = torch.cat([small.to(low.dtype), low, middle], dim=1)
        return Cams(cam, self._refine(normalised_cam(cam, labels if self.options.mask_absent else None), context))

    def _refine(self, cam: Tensor, context: Tensor) -> Tensor:
        embedding = self.f9(context)
        terms = []
        if self.options.pcm:
            norm, total = self.options.pcm_norm, self.options.pcm_sum
            if (norm, total) == ("l2", "column"):
                terms.append(pixel_correlation(cam, embedding))
            else:
                terms.append(printed_correlation(cam, embedding, norm=norm, total=total))
        if self.options.prcm:
            terms.append(self._region_term(cam, context, embedding))
        return torch.stack(terms).sum(dim=0) if len(terms) > 1 else terms[0]

    def _region_term(self, cam: Tensor, context: Tensor, embedding: Tensor) -> Tensor:
        """Return PRCM (eq. 11) times the CAM."""
        regions = region_pooling(cam, context)  # (N, 1 + C, 195)
        keys = self.f10(regions.transpose(1, 2).unsqueeze(3))  # (N, 192, 1 + C, 1)
        if self.options.prcm_relu:
            keys, embedding = F.relu(keys), F.relu(embedding)
        n, channels, classes, _ = keys.shape
        if self.options.prcm_keys == "reread":
            keys = keys.reshape(n, classes, channels)  # the published model's layout, not a transpose
        else:
            keys = keys.squeeze(3).transpose(1, 2)
        scale = classes**-0.5 if self.options.prcm_scale == "classes" else 1.0
        return region_correlation(cam, keys, embedding, scale=scale)


def build_network(config: Config) -> Network:
    """Return the config's network with random weights."""
    return Network(build_backbone(config.model), len(config.classes), config.model)
