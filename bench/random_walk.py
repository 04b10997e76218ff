"""The random walk by sparse products against the released code's dense power.

Inputs of both are the scores, and the affinities of an image's 34 directions at stride 8. The generated features are
regions with noise, so that affinities spread over 0 to 1. The sizes are a 448 px crop and a 500 x 375 image.

- released: an hw x hw matrix, to the power beta, columns divided by their sum, squared logt times, times the scores;
- ours: one sparse matrix, 2^logt products with the scores.

Both must agree within 3e-7 a step before anything is timed (in float32 the dense power has a larger error than ours).
Memory is the peak of a walk without its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import (
    arguments,
    folder,
    kernel_columns,
    kernel_time,
    machine,
    peak_extra_bytes,
    plot_bars,
    print_table,
    write_json,
)
from torch import Tensor
from torch.nn import functional as F

from cpn_fast.refinement.affinity import pair_affinities, pairs
from cpn_fast.refinement.walk import random_walk

RADIUS, BETA = 5, 8
CASES = (((56, 56), 6), ((56, 56), 8), ((47, 63), 6))
"""Height and width in cells, logt: 6 is SEAM's, 8 psa's."""
PLANES = 2
"""Background and one class, as in 59 % of VOC's training images."""


def generated(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return features (1, 448, h, w) of 30 regions, and scores (1, 2, h, w)."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(448, 5, 6, generator=generator)
    features = F.interpolate(means[None], size, mode="nearest") + 0.3 * torch.randn(1, 448, *size, generator=generator)
    scores = F.interpolate(torch.rand(1, PLANES, 6, 6, generator=generator), size, mode="bilinear")
    return features.to(device), scores.to(device)


def released(affinities: Tensor, scores: Tensor, logt: int) -> Tensor:
    """Walk densely, as in infer_aff.py: affinities (1, D, h', w'), scores (1, K, h, w)."""
    cells = scores[0, 0].numel()
    grid = torch.arange(cells, device=scores.device).view(scores.shape[2:])
    near, far = (torch.stack(side).flatten() for side in zip(*pairs(grid, RADIUS), strict=True))
    matrix = torch.eye(cells, device=scores.device)
    matrix[near, far] = matrix[far, near] = affinities.flatten()
    matrix = matrix**BETA
    matrix = matrix / matrix.sum(0, keepdim=True)
    for _ in range(logt):
        matrix = matrix @ matrix
    return (scores.flatten(2)[0] @ matrix).view_as(scores)


def main() -> None:
    options = arguments(__doc__).parse_args()
    device = options.device
    rows: list[dict[str, Any]] = []
    bars: dict[str, dict[str, float]] = {}
    described, out = machine(device), folder(options.out, device)
    for size, logt in CASES:
        features, scores = generated(size, device)
        affinities = pair_affinities(features, RADIUS)
        ways: dict[str, Callable[[], Tensor]] = {
            "released": lambda: released(affinities, scores, logt),  # noqa: B023 (called in this round)
            "ours": lambda: random_walk(affinities, scores, radius=RADIUS, beta=BETA, logt=logt),  # noqa: B023
        }
        difference = float((ways["ours"]() - ways["released"]()).abs().max())
        if difference > 3e-7 * 2**logt:
            raise SystemExit(f"{size}, logt {logt}: the walks differ by {difference}")
        group: list[dict[str, Any]] = []
        for way, run in ways.items():
            row: dict[str, Any] = {"cells": "x".join(map(str, size)), "steps": 2**logt, "way": way}
            row |= kernel_columns(run, device, budget=2 if device.type == "cuda" else 20)
            group.append(row | {"extra MB": peak_extra_bytes(run, device) / 1e6})
        time = kernel_time(*group)
        for row in group:
            row["times faster"] = group[0][time] / row[time]
            row["times less memory"] = group[0]["extra MB"] / row["extra MB"]
            row["largest difference"] = difference
        rows += group
        write_json(out / "random_walk.json", described, rows, finished=(size, logt) == CASES[-1])
        bars[f"{size[0]} x {size[1]}, {2**logt} steps"] = {row["way"]: row[time] for row in group}
    print_table("Random walk of one image", rows)
    plot_bars(out / "random_walk.png", "Random walk of one image", "ms", bars)
    print(out / "random_walk.json")


if __name__ == "__main__":
    main()
