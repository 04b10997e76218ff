"""SEAM (Wang et al., CVPR 2020): the CAMs of an image and of its smaller copy agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cpn_fast.config import Config
from cpn_fast.kernels import background_suppression, pooled_logits
from cpn_fast.kernels.eager import full_precision, mean_of_largest, normalise, statistics_dtype, upsample
from cpn_fast.methods.method import Losses, Views, weighted
from cpn_fast.models.network import Cams, build_network
from cpn_fast.pipelines.batch import Batch


class Seam:
    """Two forward passes in a step: the image, and the image scaled down. SEAM* is SEAM with ``model.prcm``."""

    pixel_map = None

    def __init__(self, config: Config) -> None:
        self.network = build_network(config)
        self.options, self.general = config.seam, config.loss
        self.weights = {"classification": 1.0, **self.general.model_dump(), **self.options.model_dump()}

    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        size = [self.network.backbone.fit(int(self.options.scale * side)) for side in batch.images.shape[2:]]
        small = F.interpolate(batch.images, size, mode="bilinear", align_corners=True)
        return Views([(batch.images, batch.labels), (small, batch.labels)], batch)

    def losses(self, outputs: Sequence[Cams], views: Views) -> Losses:
        """Return the losses: classification and suppression as means over both scales, ER and ECR between them."""
        sizes = [(images.shape[2], images.shape[3]) for images, _ in views.inputs]
        labels = views.batch.labels
        logits = [pooled_logits(cams.raw[:, 1:], size=size) for cams, size in zip(outputs, sizes, strict=True)]
        parts = {"classification": torch.stack([F.multilabel_soft_margin_loss(x, labels) for x in logits]).mean()}
        refined = [cams.refined for cams in outputs if cams.refined is not None]
        if self.general.background_suppression:
            suppressed = [background_suppression(x, labels, size=s) for x, s in zip(refined, sizes, strict=True)]
            parts["background_suppression"] = torch.stack(suppressed).mean()
        parts["er"], parts["ecr"] = equivariance_losses(
            [cams.raw for cams in outputs],
            refined,
            labels,
            sizes=sizes,
            how=self.general.normalise,
            hard_share=self.general.hard_share,
        )
        return weighted(parts, self.weights, logits[0])


def equivariance_losses(
    raw: Sequence[Tensor],
    refined: Sequence[Tensor],
    labels: Tensor,
    *,
    sizes: Sequence[tuple[int, int]],
    how: str,
    hard_share: float,
) -> tuple[Tensor, Tensor]:
    """Return ER and ECR of released SEAM, two scalars.

    ``raw`` and ``refined`` hold the maps (N, 1 + C, h, w) of the image and of its small copy. The maps are upsampled to
    ``sizes``, (H, W) of the two images, and normalised there (``Loss.normalise``). Those of the image then shrink to
    the size of the copy.

    ER is the mean difference of the raw foreground maps. ECR compares the refined map of one scale, background
    included, with the raw map of the other. Of a raw map each pixel keeps its best class, and the background is 1 minus
    its score. Per image the largest ``hard_share`` of the errors count. An image without tags has no foreground: its ER
    is 0, and its ECR makes the refined background constant.
    """
    with full_precision(raw[0]):
        raw = [
            _normalised(maps, labels, size, sizes[-1], how, own_background=False)
            for maps, size in zip(raw, sizes, strict=True)
        ]
        refined = [
            _normalised(maps, labels, size, sizes[-1], how, own_background=True)
            for maps, size in zip(refined, sizes, strict=True)
        ]
        er = (raw[0] - raw[1])[:, 1:].abs().mean()
        targets = [_best_class(maps.detach()) for maps in raw]
        errors = [(targets[1] - refined[0]).abs(), (targets[0] - refined[1]).abs()]
        return er, torch.stack([mean_of_largest(error.flatten(1), hard_share).mean() for error in errors]).sum()


def _normalised(
    maps: Tensor, labels: Tensor, size: tuple[int, int], target: tuple[int, int], how: str, *, own_background: bool
) -> Tensor:
    """Normalise maps at ``size`` and resize them to ``target``: (N, 1 + C, *target), 0 for absent classes.

    A CPU enlarges only the maps of present classes. A GPU and compiled code enlarge all: they would have to wait for
    the number of present classes, and a CUDA graph cannot.
    """
    present = torch.cat([torch.full_like(labels[:, :1], own_background), labels], dim=1) > 0
    maps = maps.to(statistics_dtype(maps))
    if maps.is_cuda or torch.compiler.is_compiling():
        full = upsample(normalise(upsample(maps, size), how), target)
        return full.where(present[:, :, None, None], 0)
    full, at = maps.new_zeros(*maps.shape[:2], *target), present.nonzero(as_tuple=True)
    if not len(at[0]):  # only images without tags
        return full
    chosen = normalise(upsample(maps[at][None], size), how)
    return full.index_put(at, upsample(chosen, target)[0])


def _best_class(maps: Tensor) -> Tensor:
    foreground = maps[:, 1:]
    best = foreground.amax(dim=1, keepdim=True)
    return torch.cat([1 - best, foreground.where(foreground == best, 0)], dim=1)
