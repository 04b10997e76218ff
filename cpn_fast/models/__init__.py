"""Backbones, and the networks on top of them."""

from __future__ import annotations

from cpn_fast.config import TIMM, Model
from cpn_fast.models.backbone import Backbone, Features
from cpn_fast.models.mobilenet_v2 import MobileNetV2
from cpn_fast.models.narrow import Narrow
from cpn_fast.models.resnet38d import ResNet38d
from cpn_fast.models.timm_backbone import TimmBackbone

__all__ = ["Backbone", "Features", "build_backbone"]


def build_backbone(options: Model) -> Backbone:
    """Return the config's backbone with random weights. Raises UserError for a model that timm cannot build."""
    if options.backbone.startswith(TIMM):
        return TimmBackbone(options.backbone.removeprefix(TIMM), options.stride)
    if options.backbone == "resnet38d":
        return ResNet38d()
    if options.backbone == "mobilenet_v2":
        return MobileNetV2(options.stride)
    return Narrow()
