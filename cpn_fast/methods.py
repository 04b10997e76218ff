"""What a training method adds to the trainer: the views it makes of a batch and the losses of their CAMs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cpn_fast.config import Config, Rgb
from cpn_fast.kernels import background_suppression, complementary_losses, pooled_logits
from cpn_fast.models.network import Cams
from cpn_fast.patches import complementary_pair
from cpn_fast.pipelines.training import Batch


class Views(NamedTuple):
    """What goes through the network in one forward pass."""

    images: Tensor
    """(V * B, 3, H, W), view after view."""
    labels: Tensor
    """(V * B, classes)."""
    visible: Tensor | None
    """(B,) share of the image that the patch view shows (lambda)."""


class Losses(NamedTuple):
    total: Tensor
    parts: dict[str, Tensor]
    """Unweighted terms by the name of their weight in the config, detached."""
    logits: Tensor
    """(B, classes) of the whole image, detached."""


class Method(Protocol):
    uses_superpixels: bool

    def views(self, batch: Batch, generator: torch.Generator) -> Views: ...

    def losses(self, cams: Cams, views: Views, size: tuple[int, int]) -> Losses: ...


class PlainCam:
    """A classifier with a 1x1 head, trained on whole images."""

    uses_superpixels = False

    def __init__(self, config: Config, mean: Rgb, std: Rgb) -> None:
        del config, mean, std  # it has no options

    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        return Views(batch.images, batch.labels, None)

    def losses(self, cams: Cams, views: Views, size: tuple[int, int]) -> Losses:
        logits = pooled_logits(cams.raw[:, 1:], size=size)
        loss = F.multilabel_soft_margin_loss(logits, views.labels)
        return Losses(loss, {"classification": loss.detach()}, logits.detach())


class Cpn:
    """The triplet of image, patches and complement, in one forward pass of 3 B images (exact: BN is frozen)."""

    def __init__(self, config: Config, mean: Rgb, std: Rgb) -> None:
        self.patches = config.patches
        self.options = config.loss
        self.uses_superpixels = config.patches.kind == "superpixel"
        self.patch_limit = config.superpixels.count
        fill = config.patches.fill
        self.fill = None if fill is None else (torch.tensor(fill) - torch.tensor(mean)) / torch.tensor(std)

    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        pair = complementary_pair(
            batch.images, batch.superpixels, self.patches, self.fill, generator, patch_limit=self.patch_limit
        )
        images = torch.cat([batch.images, pair.visible, pair.complement])
        return Views(images, batch.labels.repeat(3, 1), pair.share)

    def losses(self, cams: Cams, views: Views, size: tuple[int, int]) -> Losses:
        """Eqs. 13 to 15 and the released background suppression."""
        logits = pooled_logits(cams.raw[:, 1:], size=size)
        parts = {"classification": F.multilabel_soft_margin_loss(logits, views.labels)}
        assert views.visible is not None
        raw = cams.raw.unflatten(0, (3, -1))
        refined = None if cams.refined is None else cams.refined.unflatten(0, (3, -1))
        labels = views.labels.unflatten(0, (3, -1))[0]
        options = self.options
        parts |= complementary_losses(
            raw,
            refined,
            views.visible,
            labels,
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
            parts["background_suppression"] = background_suppression(cams.refined, views.labels, size=size)
        weights = {"classification": 1.0, **options.model_dump()}
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return Losses(total, {name: part.detach() for name, part in parts.items()}, logits.detach().chunk(3)[0])


METHODS: dict[str, Callable[[Config, Rgb, Rgb], Method]] = {"cam": PlainCam, "cpn": Cpn}
