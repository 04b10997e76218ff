"""What the trainer asks of a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cpn_fast.data.dataset import Sample
from cpn_fast.models.backbone import Headed
from cpn_fast.pipelines.training import Batch


class Views(NamedTuple):
    """What goes through the network in one step."""

    inputs: Sequence[tuple[Tensor, ...]]
    """Arguments of each forward pass: images (V * B, 3, H, W), view after view, and what else the network takes."""
    batch: Batch
    """What they are views of."""
    visible: Tensor | None = None
    """(B,) share of the image that a patch view shows (lambda)."""


class Losses(NamedTuple):
    total: Tensor
    parts: dict[str, Tensor]
    """Unweighted terms by the name of their weight in the config, detached."""
    logits: Tensor | None = None
    """(B, classes) of the whole image, detached; None if the method does not classify."""


class Method(Protocol):
    @property
    def network(self) -> Headed:
        """What is trained, built with random weights."""
        ...

    @property
    def map(self) -> Literal["superpixels"] | Callable[[Sample], Path] | None:
        """What a batch's map holds: superpixels, a PNG per image (``TrainingPipeline``'s ``map_path``), or nothing."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether views and losses run the same kernels whatever a batch of one size holds, as a CUDA graph needs."""
        ...

    def views(self, batch: Batch, generator: torch.Generator) -> Views: ...

    def losses(self, outputs: Sequence[Any], views: Views) -> Losses:
        """``outputs`` are the network's, one for each of ``views.inputs``."""
        ...
