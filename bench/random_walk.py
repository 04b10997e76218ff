"""The random walk by sparse products against the released code's dense power.

Input of both are the affinities of an image's 34 directions, at stride 8, and the scores. Generated features: regions
with noise, so that affinities spread over 0 to 1. Sizes are those of a 448 px crop and of a 500 x 375 image.

- released: an hw x hw matrix, to the power beta, columns divided by their sum, squared logt times; times 21 planes;
- released, present planes: the same, times background and one class alone;
- ours: one sparse matrix, 2^logt products with the present planes.

Both must agree within 1e-5 before anything is timed. Memory is what a walk takes beside its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import arguments, folder, machine, median_seconds, peak_extra_bytes, plot_bars, print_table, write_json
from torch import Tensor
from torch.nn import functional as F

from cpn_fast.affinity import pair_affinities, pairs, random_walk

RADIUS, BETA = 5, 8
SIZES = ((56, 56), (47, 63))
PRESENT, PLANES = 2, 21
"""Background and one class, as in 59 % of VOC's training images; all 21, as the released code walks them."""


def generated(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (1, 448, h, w) of 30 regions, and scores (1, 2, h, w)."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(448, 5, 6, generator=generator)
    features = F.interpolate(means[None], size, mode="nearest") + 0.3 * torch.randn(1, 448, *size, generator=generator)
    scores = F.interpolate(torch.rand(1, PRESENT, 6, 6, generator=generator), size, mode="bilinear")
    return features.to(device), scores.to(device)


def released(affinities: Tensor, scores: Tensor, logt: int) -> Tensor:
    """Dense, as in infer_aff.py: affinities (1, D, h', w'), scores (1, K, h, w)."""
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
    for size in SIZES:
        features, scores = generated(size, device)
        affinities = pair_affinities(features, RADIUS)
        all_planes = F.pad(scores, (0, 0, 0, 0, 0, PLANES - PRESENT))
        for logt in (6, 8):
            walked = random_walk(affinities, scores, radius=RADIUS, beta=BETA, logt=logt)
            difference = float((walked - released(affinities, scores, logt)).abs().max())
            if difference > 1e-5:
                raise SystemExit(f"{size}, logt {logt}: the walks differ by {difference}")
            ways: dict[str, Callable[[], Tensor]] = {
                "released": lambda: released(affinities, all_planes, logt),  # noqa: B023 (called in this round)
                "released, present planes": lambda: released(affinities, scores, logt),  # noqa: B023
                "ours": lambda: random_walk(affinities, scores, radius=RADIUS, beta=BETA, logt=logt),  # noqa: B023
            }
            group = []
            for way, run in ways.items():
                median, low, high = (1e3 * seconds for seconds in median_seconds(run, device, budget=30))
                row: dict[str, Any] = {"cells": "x".join(map(str, size)), "steps": 2**logt, "way": way, "ms": median}
                group.append(row | {"p20": low, "p80": high, "extra MB": peak_extra_bytes(run, device) / 1e6})
            for row in group:
                row["times faster"] = group[0]["ms"] / row["ms"]
                row["times less memory"] = group[0]["extra MB"] / row["extra MB"]
                row["largest difference"] = difference if row["way"] == "ours" else None
            rows += group
            bars[f"{size[0]} x {size[1]}, {2**logt} steps"] = {row["way"]: row["ms"] for row in group}
    print_table("Random walk of one image", rows)
    place = folder(options.out, device)
    write_json(place / "random_walk.json", machine(device), rows)
    plot_bars(place / "random_walk.png", "Random walk of one image", "ms", bars)
    print(place / "random_walk.json")


if __name__ == "__main__":
    main()
