"""Steps whose gradient is not finite: find them, record their images, and skip the step or stop the run."""

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
from cpn_fast.runtime.files import read_note, write_json

FILE = "nonfinite.json"


def gradient_norm(parameters: Iterable[nn.Parameter], *, zeroes: bool) -> Tensor:
    """Return the gradient's L2 norm, a scalar on its device. ``zeroes`` sets a gradient that is not finite to 0."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if zeroes:
        finite = norm.isfinite()
        for gradient in gradients:
            gradient.copy_(torch.where(finite, gradient, 0))
    return norm


class GradientGuard:
    """Checks the norm of each step's gradient on the host."""

    def __init__(self, folder: Path, ids: Sequence[str], mode: Literal["stop", "skip"], rank: Rank) -> None:
        self.path, self.ids, self.mode, self.rank = folder / FILE, ids, mode, rank

    def passes(self, step: int, norm: float, scale: float, indices: list[int]) -> bool:
        """Return whether a step's gradient was finite. Raises UserError in mode ``stop`` if it was not.

        ``scale`` is the factor of a gradient scaler, or 1. A factor above 1 may be the cause, and the scaler halves it
        at this step: then nothing is recorded or raised. Gradients are averaged over the processes, so all of them find
        the same steps. All processes must call this for the same steps.
        """
        if math.isfinite(norm):
            return True
        if scale > 1:
            return False
        images = list(chain(*self.rank.gather([self.ids[i] for i in indices])))
        if self.rank.first:
            write_json(self.path, [*_recorded(self.path), {"step": step, "images": images}], indent=1)
        if self.mode == "stop":
            raise UserError(
                f"the gradient of step {step} is not finite; its images are {', '.join(images[:8])} "
                f"({self.path}). Lower train.lr or train.momentum and start anew, or go on with train.nonfinite=skip"
            )
        return False


def _recorded(path: Path) -> list[dict[str, Any]]:
    """Return the recorded steps; none of a damaged file, which must not keep new ones from being recorded."""
    recorded = read_note(path)
    return recorded if isinstance(recorded, list) else []
