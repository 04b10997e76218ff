"""Steps whose gradient is not finite: found, written down with their images, and skipped or made an end of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cpn_fast.errors import UserError
from cpn_fast.files import read_json, replacing
from cpn_fast.ranks import Rank

FILE = "nonfinite.json"


class _Step(NamedTuple):
    number: int
    norm: Tensor
    indices: list[Tensor]


class GradientGuard:
    """Looks at every step's gradient on the device; the host hears of it in ``check``, and need not wait before."""

    def __init__(self, folder: Path, ids: Sequence[str], mode: Literal["stop", "skip"], rank: Rank) -> None:
        self.path, self.ids, self.mode, self.rank = folder / FILE, ids, mode, rank
        self.unchecked: list[_Step] = []

    def see(self, step: int, parameters: Iterable[nn.Parameter], indices: list[Tensor]) -> Tensor:
        """Call before the optimiser's step, with the batches' ``indices``; returns the gradient's L2 norm, a scalar.

        In mode ``skip`` a gradient that is not finite becomes zero.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.mode == "skip":
            finite = norm.isfinite()
            for gradient in gradients:
                gradient.copy_(torch.where(finite, gradient, 0))
        self.unchecked.append(_Step(step, norm, indices))
        return torch.where(norm.isfinite(), norm, 0) if self.mode == "skip" else norm

    def check(self) -> int:
        """How many steps since the last call were not finite. Raises UserError in mode ``stop`` if there is one.

        Gradients are averaged over the processes, so that all find the same steps.
        """
        steps, self.unchecked = self.unchecked, []
        norms = torch.stack([step.norm for step in steps]).tolist() if steps else []
        bad = [step for step, norm in zip(steps, norms, strict=True) if not abs(norm) < float("inf")]
        if not bad:
            return 0
        own = [[self.ids[i] for indices in step.indices for i in indices.tolist()] for step in bad]
        everywhere = [list(chain(*parts)) for parts in zip(*self.rank.gather(own), strict=True)]
        found = [{"step": step.number, "images": images} for step, images in zip(bad, everywhere, strict=True)]
        if self.rank.first:
            with replacing(self.path) as file:
                file.write(json.dumps([*_earlier(self.path), *found], indent=1).encode())
        if self.mode == "stop":
            raise UserError(
                f"the gradient of step {bad[0].number} is not finite; its images are {', '.join(everywhere[0][:8])} "
                f"({self.path}). Lower train.lr or train.momentum and start anew, or go on with train.nonfinite=skip"
            )
        return len(bad)


def _earlier(path: Path) -> list[dict[str, Any]]:
    """What is written down already; of a damaged file nothing, for the steps to come matter more."""
    try:
        return list(read_json(path))
    except (OSError, ValueError, TypeError):
        return []
