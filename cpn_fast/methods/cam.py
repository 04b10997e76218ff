"""The plain CAM: a classifier with a 1x1 head, trained on whole images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from cpn_fast.config import Config
from cpn_fast.kernels import pooled_logits
from cpn_fast.methods.method import Losses, Views
from cpn_fast.models.network import Cams, build_network
from cpn_fast.pipelines.batch import Batch


class PlainCam:
    """The classifier alone: one view, and the classification loss."""

    pixel_map = None

    def __init__(self, config: Config) -> None:
        self.network = build_network(config)

    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        return Views([(batch.images, batch.labels)], batch)

    def losses(self, outputs: Sequence[Cams], views: Views) -> Losses:
        logits = pooled_logits(outputs[0].raw[:, 1:], size=views.batch.size)
        loss = F.multilabel_soft_margin_loss(logits, views.batch.labels)
        return Losses(loss, {"classification": loss.detach()}, logits.detach())
