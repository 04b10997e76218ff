"""Training of the segmenter on masks: cross entropy per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cpn_fast.config import Config
from cpn_fast.data.dataset import Sample
from cpn_fast.data.masks import IGNORE
from cpn_fast.kernels.eager import upsample
from cpn_fast.methods.method import Losses, Views
from cpn_fast.models.deeplab import build_deeplab
from cpn_fast.pipelines.batch import Batch


class Segmentation:
    """``masks`` has ``ID.png`` for every training image. Pixels with IGNORE and padding have no loss."""

    def __init__(self, config: Config, masks: Path) -> None:
        self.network = build_deeplab(config)
        self.masks = masks

    def pixel_map(self, sample: Sample) -> Path:
        return self.masks / f"{sample.id}.png"

    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        return Views([(batch.images,)], batch)

    def losses(self, outputs: Sequence[Tensor], views: Views) -> Losses:
        (logits,) = outputs
        assert views.batch.pixel_map is not None
        truth = views.batch.pixel_map.long()
        truth = truth.where(truth >= 0, IGNORE)
        scores = upsample(logits.float(), views.batch.size)
        total = F.cross_entropy(scores, truth, ignore_index=IGNORE, reduction="sum")
        loss = total / (truth != IGNORE).sum().clamp(min=1)
        return Losses(loss, {"cross_entropy": loss.detach()})
