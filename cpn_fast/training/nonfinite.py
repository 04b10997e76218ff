"""Steps whose gradient is not finite: found, written down with their images, and skipped or made an end of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cpn_fast.runtime.distributed import Rank
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import read_json, write_json

FILE = "nonfinite.json"


def gradient_norm(parameters: Iterable[nn.Parameter], *, zeroes: bool) -> Tensor:
    """The gradient's L2 norm, a scalar on its device; ``zeroes`` makes a gradient that is not finite zero."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if zeroes:
        finite = norm.isfinite()
        for gradient in gradients:
            gradient.copy_(torch.where(finite, gradient, 0))
    return norm


class GradientGuard:
    """Judges the steps by the norms of their gradients, once these have come to the host."""

    def __init__(self, folder: Path, ids: Sequence[str], mode: Literal["stop", "skip"], rank: Rank) -> None:
        self.path, self.ids, self.mode, self.rank = folder / FILE, ids, mode, rank

    def passes(self, step: int, norm: float, scale: float, indices: list[int]) -> bool:
        """Whether a step's gradient was finite. Raises UserError in mode ``stop`` if it was not.

        ``scale`` is what a gradient scaler multiplied the loss by, else 1. Above 1 the scaler may be at fault, which
        halves it at such a step: then nothing is raised nor written down. Gradients are averaged over the processes,
        so that all find the same steps; all must call this for the same ones.
        """
        if math.isfinite(norm):
            return True
        if scale > 1:
            return False
        images = list(chain(*self.rank.gather([self.ids[i] for i in indices])))
        if self.rank.first:
            write_json(self.path, [*_earlier(self.path), {"step": step, "images": images}], indent=1)
        if self.mode == "stop":
            raise UserError(
                f"the gradient of step {step} is not finite; its images are {', '.join(images[:8])} "
                f"({self.path}). Lower train.lr or train.momentum and start anew, or go on with train.nonfinite=skip"
            )
        return False


def _earlier(path: Path) -> list[dict[str, Any]]:
    """What is written down already; of a damaged file nothing, for the steps to come matter more."""
    try:
        return list(read_json(path))
    except (OSError, ValueError, TypeError):
        return []
