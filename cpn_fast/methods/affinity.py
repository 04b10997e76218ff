"""AffinityNet's training: pairs of cells with equal or different labels, which stage ``refine`` made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cpn_fast.config import Config
from cpn_fast.data.dataset import Sample
from cpn_fast.methods.method import Losses, Views
from cpn_fast.models.affinity_net import build_affinity_net
from cpn_fast.pipelines.batch import Batch
from cpn_fast.refinement.affinity import affinity_losses, cell_labels, fitting_radius, pair_affinities


class Affinity:
    """Labels are the masks ``labels/ID.png`` beside the run's folder, with 255 for unknown pixels."""

    def __init__(self, config: Config) -> None:
        self.network = build_affinity_net(config.model)
        self.radius = config.affinity.radius
        self.labels = config.out / "labels"

    def pixel_map(self, sample: Sample) -> Path:
        return self.labels / f"{sample.id}.png"

    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        return Views([(batch.images,)], batch)

    def losses(self, outputs: Sequence[Tensor], views: Views) -> Losses:
        (features,) = outputs
        assert views.batch.pixel_map is not None
        height, width = features.shape[2:]
        radius = fitting_radius(self.radius, height, width)
        # A timm model may leave out the last cells, which lie only partly in the image.
        labels = cell_labels(views.batch.pixel_map)[:, :height, :width]
        terms = affinity_losses(pair_affinities(features, radius), labels, radius)
        return Losses(terms.total, {name: term.detach() for name, term in terms._asdict().items()})
