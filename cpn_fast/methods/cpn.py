"""CPN: the CAM of an image agrees with the CAMs of a complementary pair of patch images (paper section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from cpn_fast.config import Config
from cpn_fast.kernels import background_suppression, complementary_losses, pooled_logits
from cpn_fast.methods.method import Losses, Views, weighted
from cpn_fast.methods.patches import complementary_pair, normalised_fill
from cpn_fast.models.network import Cams, build_network
from cpn_fast.pipelines.batch import Batch


class Cpn:
    """Image, patches and complement in one forward pass of 3 B images. This is exact, since BN is frozen."""

    def __init__(self, config: Config) -> None:
        self.network = build_network(config)
        self.patches = config.patches
        self.options = config.loss
        self.weights = {"classification": 1.0, **config.loss.model_dump()}
        self.pixel_map: Literal["superpixels"] | None = "superpixels" if config.patches.kind == "superpixel" else None
        self.patch_limit = config.superpixels.count
        self.fill = normalised_fill(config.patches, self.network.mean, self.network.std)

    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        if self.fill is not None:
            self.fill = self.fill.to(batch.images.device)  # only once: a CUDA graph cannot capture a copy from the host
        pair = complementary_pair(
            batch.images,
            batch.pixel_map,
            self.patches,
            self.fill,
            generator,
            patch_limit=self.patch_limit,
            place=batch.place,
        )
        images = torch.cat([batch.images, pair.visible, pair.complement])
        return Views([(images, batch.labels.repeat(3, 1))], batch, pair.share)

    def losses(self, outputs: Sequence[Cams], views: Views) -> Losses:
        """Return the losses of eqs. 13 to 15 and the released background suppression.

        An image without tags has a foreground of 0, so its eq. 14 and its suppression are 0. Its eq. 15 pulls the
        refined background to 1 in the paper's form (``background: before-lambda``, ``refined_background: own``). In the
        released form eq. 15 is 2 for this image, without a gradient.
        """
        (cams,) = outputs
        size, options = views.batch.size, self.options
        ((_, labels),) = views.inputs
        logits = pooled_logits(cams.raw[:, 1:], size=size)
        parts = {"classification": F.multilabel_soft_margin_loss(logits, labels)}
        assert views.visible is not None
        raw = cams.raw.unflatten(0, (3, -1))
        refined = None if cams.refined is None else cams.refined.unflatten(0, (3, -1))
        parts |= complementary_losses(
            raw,
            refined,
            views.visible,
            views.batch.labels,
            size=size,
            normalise=options.normalise,
            background=options.background,
            refined_background=options.refined_background,
            cpcr_target=options.cpcr_target,
            detach_refined_pair=options.detach_refined_pair,
            hard_share=options.hard_share,
            hard_over=options.hard_over,
        )._asdict()
        if cams.refined is not None and options.background_suppression:
            parts["background_suppression"] = background_suppression(cams.refined, labels, size=size)
        return weighted(parts, self.weights, logits.chunk(3)[0])
