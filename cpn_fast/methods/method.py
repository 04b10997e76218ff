"""The interface between the trainer and a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cpn_fast.data.dataset import Sample
from cpn_fast.models.backbone import Headed
from cpn_fast.pipelines.batch import Batch


class Views(NamedTuple):
    """The inputs of the network in one step."""

    inputs: Sequence[tuple[Tensor, ...]]
    """Arguments of each forward pass: images (V * B, 3, H, W), view after view, and the network's other arguments."""
    batch: Batch
    """The batch that the views show."""
    visible: Tensor | None = None
    """(B,) part of the image that a patch view shows, from 0 to 1 (lambda)."""


class Losses(NamedTuple):
    """The result of a method's ``losses``."""

    total: Tensor
    """Weighted sum of the terms, a scalar with a gradient."""
    parts: dict[str, Tensor]
    """Name of a weight in the config -> its unweighted term, detached."""
    logits: Tensor | None = None
    """Logits (B, classes) of the whole images, detached; None if the method does not classify."""


def weighted(parts: dict[str, Tensor], weights: Mapping[str, float], logits: Tensor) -> Losses:
    """Return the losses with the sum of the ``parts``, scalars, times their ``weights``.

    A part of weight 0 has no gradient, and a NaN in it does not spread.
    """
    counted = [weights[name] * part for name, part in parts.items() if weights[name]]
    return Losses(torch.stack(counted).sum(), {name: part.detach() for name, part in parts.items()}, logits.detach())


class Method(Protocol):
    """On a GPU, ``views`` and ``losses`` run the same kernels for all batches of one size, as a CUDA graph needs."""

    @property
    def network(self) -> Headed:
        """The trained network; new methods have random weights."""
        ...

    @property
    def pixel_map(self) -> Literal["superpixels"] | Callable[[Sample], Path] | None:
        """The map of a batch: superpixels, a PNG per image (``TrainingPipeline``'s ``map_path``), or None."""
        ...

    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """Return the inputs of a step. All random numbers come from ``generator``."""
        ...

    def losses(self, outputs: Sequence[Any], views: Views) -> Losses:
        """``outputs`` has one output of the network for each of ``views.inputs``."""
        ...
