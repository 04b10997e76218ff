"""``cpn-fast reproduce``: the paper's tables and figures, as runs that differ from one config in a few keys.

``RUNS`` says what is trained, ``TABLES`` what is shown of it beside the paper's figure. Runs are named after the
config, shared between tables, and continued or left alone when they are there.
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cpn_fast import cam, evaluate, ranks, train
from cpn_fast import run as chain
from cpn_fast.config import Config, load
from cpn_fast.dataset import load_samples
from cpn_fast.errors import UserError
from cpn_fast.files import replacing
from cpn_fast.patches import complementary_pair
from cpn_fast.pipelines.superpixels import segment_batch
from cpn_fast.pipelines.training import TrainingPipeline

CPN = "cpn"
RUNS: dict[str, tuple[str, ...]] = {
    CPN: (),
    "cam": ("method=cam", "model.pcm=false", "model.prcm=false", "cam.map=raw"),
    "seam": ("method=seam", "model.prcm=false"),
    "seam-prcm": ("method=seam",),
    "tcp": ("model.prcm=false", "loss.cpcr=0"),
    "cpcr": ("model.prcm=false", "loss.hard_share=1"),
    "ohem": ("model.prcm=false",),
    **{f"hide-{share}": (f"patches.hide={share}",) for share in (0.1, 0.2, 0.3, 0.4, 0.5)},
    **{f"superpixels-{count}": (f"superpixels.count={count}",) for count in (5, 50, 100, 200, 500, 1000, 8000)},
    **{
        f"grid-{a}-{b}": ("patches.kind=grid", "patches.share=patches", f"patches.grid_sizes=[{a}, {b}]")
        for a, b in ((4, 7), (14, 28), (28, 56), (56, 112), (112, 224), (224, 448))
    },
}
"""Name -> overrides of the config, which is CPN's own run."""

Measure = Literal["seeds", "background", "foreground", "pseudo-masks", "segmenter", "segmenter and CRF", "seconds"]

CHAIN: tuple[Measure, ...] = ("pseudo-masks", "segmenter", "segmenter and CRF")
"""What takes all stages of ``cpn-fast run``, whose results these are."""


class Row(NamedTuple):
    name: str
    run: str
    paper: float | None
    """Per cent IoU, or seconds; None where the paper's figure is not known here."""
    measure: Measure = "seeds"
    scale: float | None = None
    """The only scale of its CAMs; None: those of the config."""


_METHODS = (
    ("CAM", "cam", (41.15, 48.29, 49.51, 47.44, 47.84)),
    ("SEAM", "seam", (49.35, 51.57, 52.25, 49.79, 55.41)),
    ("SEAM*", "seam-prcm", (None, None, None, None, 55.71)),
    ("CPN", CPN, (48.91, 54.51, 55.44, 54.01, 57.43)),
)
_SIDES: tuple[Measure, Measure] = ("background", "foreground")
TABLES: dict[str, tuple[Row, ...]] = {
    "table1": tuple(
        Row(f"{name}, {'all scales' if scale is None else f'scale {scale:g}'}", run, paper, scale=scale)
        for name, run, figures in _METHODS
        for scale, paper in zip((0.5, 1.0, 1.5, 2.0, None), figures, strict=True)
    ),
    "table2": (
        Row("baseline", "cam", 47.84),
        Row("+ TCP, PCM", "tcp", 51.08),
        Row("+ CPCR", "cpcr", 55.71),
        Row("+ OHEM", "ohem", 56.58),
        Row("+ PRCM", CPN, 57.43),
    ),
    "table3": tuple(
        Row(f"{name}, {measure}", run, paper, measure)
        for name, run, figures in (
            ("CAM", "cam", (None, None)),
            ("SEAM", "seam", (None, None)),
            ("CPN", CPN, (83.44, 56.13)),
        )
        for measure, paper in zip(_SIDES, figures, strict=True)
    ),
    "table4": tuple(
        Row(f"hidden with p = {share}", f"hide-{share}", paper)
        for share, paper in ((0.1, 55.52), (0.2, 56.87), (0.3, 56.29), (0.4, 57.05), (0.5, 57.43))
    ),
    "table5": (
        Row("pseudo-masks", CPN, 67.79, "pseudo-masks"),
        Row("segmenter, val", CPN, 66.8, "segmenter"),
        Row("segmenter and CRF, val", CPN, 67.8, "segmenter and CRF"),
    ),
    "fig6": tuple(
        Row(f"{count} superpixels", f"superpixels-{count}", {200: 57.43, 8000: 55.79}.get(count))
        for count in (5, 50, 100, 200, 500, 1000, 8000)
    ),
    "fig7": (
        *(
            Row(f"grid {a}, {b}", f"grid-{a}-{b}", {4: 55.67, 56: 57.07, 224: 55.80}.get(a))
            for a, b in ((4, 7), (14, 28), (28, 56), (56, 112), (112, 224), (224, 448))
        ),
        Row("superpixels", CPN, 57.43),
        Row("seconds an image, superpixels", CPN, 1.45, "seconds"),
        Row("seconds an image, grid", "grid-56-112", 0.006, "seconds"),
    ),
}
"""The paper's figures: train mIoU of seeds at the oracle threshold, but where a row measures something else."""


class Result(NamedTuple):
    value: float | None
    """In the unit of ``Row.paper``; None without ground truth."""
    curve: evaluate.Curve | None = None
    """Of seeds."""


def run(name: str, path: Path, overrides: list[str]) -> Path:
    """Do or finish what a table needs, print it, and write NAME.json and NAME.png; returns the picture's path."""
    base = _base(name, path, overrides)
    rows = TABLES[name]
    results = [_result(row, base, path, overrides) for row in rows]
    folder = base.out / f"{base.name}-reproduce"
    if ranks.join().first:
        _print(name, base, rows, results)
        with replacing(folder / f"{name}.json") as file:
            file.write(json.dumps([_as_tree(*pair) for pair in zip(rows, results, strict=True)], indent=1).encode())
        with replacing(folder / f"{name}.png") as file:
            _plot(name, rows, results).savefig(file, format="png", dpi=110)
    return folder / f"{name}.png"


def commands(name: str, path: Path, overrides: list[str]) -> list[str]:
    """A shell command for each run that a table needs, finished ones too: they may run anywhere, in any order.

    Where all of them have ended, ``run`` has only seeds to make and to score.
    """
    base = _base(name, path, overrides)
    chains = {row.run for row in TABLES[name] if row.measure in CHAIN}
    lines: dict[str, None] = {}
    for key in dict.fromkeys(row.run for row in TABLES[name] if row.measure != "seconds"):
        config = run_config(key, base, path, overrides)
        own = [] if config is base else [*RUNS[key], f"name={config.name}"]
        options = [word for override in [*overrides, *own] for word in ("--set", override)]
        lines[shlex.join(["cpn-fast", "run" if key in chains else "train", str(path), *options])] = None
    return list(lines)


def _base(name: str, path: Path, overrides: list[str]) -> Config:
    if name not in TABLES:
        raise UserError(f"reproduce {name}: no such table; there are {', '.join(TABLES)}")
    base = load(path, overrides)
    if base.method != "cpn":
        raise UserError(f"{path}: method is {base.method}; reproduce starts from CPN's config")
    return base


def run_config(key: str, base: Config, path: Path, overrides: list[str]) -> Config:
    """The config of one of ``RUNS``, called ``BASE-KEY``; the base itself where that changes nothing."""
    variant = load(path, [*overrides, *RUNS[key]])
    return base if variant == base else variant.model_copy(update={"name": f"{base.name}-{key}"})


def _result(row: Row, base: Config, path: Path, overrides: list[str]) -> Result:
    config = run_config(row.run, base, path, overrides)
    if row.measure == "seconds":
        return Result(seconds_of_patches(config))
    if row.measure in CHAIN:
        value = {found.name: found.miou for found in chain.run(config)}.get(row.measure)
        return Result(None if value is None else 100 * value)
    weights = train.run(config)
    if row.scale is not None:
        config = at_scale(config, row.scale)
    found = scored_seeds(config, weights, config.data.eval_list)
    measured = {"background": found.oracle.background_iou, "foreground": found.oracle.foreground_iou}
    return Result(100 * float(measured.get(row.measure, found.oracle.mean_iou)), found.curve)


def at_scale(config: Config, scale: float) -> Config:
    """The config of seeds of one scale alone, in a folder beside the run's own."""
    options = config.cam.model_copy(update={"scales": (scale,)})
    return config.model_copy(update={"name": f"{config.name}-scale-{scale:g}", "cam": options})


def scored_seeds(config: Config, weights: Path, list_path: Path, held_out: float | None = None) -> evaluate.Evaluation:
    """Make what is missing of a list's seeds and score them, at ``held_out`` too; the scores are not written."""
    seeds = cam.run(config, weights, list_path) / "seeds"
    samples = load_samples(config.data, config.classes, list_path, labels=False, masks=True)
    name = str(list_path)
    return evaluate.evaluate_cams(
        samples, seeds, config.evaluate, config.classes, list_name=name, held_out=held_out, workers=2
    )


def seconds_of_patches(config: Config, images: int = 8) -> float:
    """Seconds to split an augmented training image into a pair on one core, superpixels made on the crop."""
    samples = load_samples(config.data, config.classes, config.data.train_list, labels=True, masks=False)
    batch = next(
        TrainingPipeline(
            samples,
            config.augment,
            batch=min(images, len(samples)),
            mean=(0, 0, 0),
            std=(1, 1, 1),
            seed=config.train.seed,
            device=torch.device("cpu"),
            threads=1,
        )
    )
    pixels = batch.images.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    began = time.perf_counter()
    superpixels = None
    if config.patches.kind == "superpixel":
        superpixels = torch.from_numpy(segment_batch(pixels, config.superpixels, 1))
    limit = config.superpixels.count
    complementary_pair(batch.images, superpixels, config.patches, None, torch.Generator(), patch_limit=limit)
    return (time.perf_counter() - began) / len(batch.images)


def _print(name: str, base: Config, rows: tuple[Row, ...], results: list[Result]) -> None:
    table = Table("", "paper", "ours", title=f"{name} with {base.name}; seeds at the oracle threshold")
    for row, result in zip(rows, results, strict=True):
        digits = 4 if row.measure == "seconds" else 2
        table.add_row(row.name, *("-" if v is None else f"{v:.{digits}f}" for v in (row.paper, result.value)))
    Console().print(table)


def _as_tree(row: Row, result: Result) -> dict[str, Any]:
    tree = {**row._asdict(), "overrides": RUNS[row.run], "ours": result.value}
    if result.curve is not None:
        tree["thresholds"] = result.curve.thresholds.tolist()
        tree["mean_iou"] = result.curve.scores.mean_iou.tolist()
    return tree


def _plot(name: str, rows: tuple[Row, ...], results: list[Result]) -> Figure:
    """Ours beside the paper's, and mIoU against the background threshold for rows that have seeds."""
    shown = [(row, result) for row, result in zip(rows, results, strict=True) if row.measure != "seconds"]
    figure = Figure((12, 1.5 + 0.32 * max(8, len(shown))), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = np.arange(len(shown))
    for label, marker, values in (
        ("paper", "D", [row.paper for row, _ in shown]),
        ("ours", "o", [result.value for _, result in shown]),
    ):
        left.plot([np.nan if v is None else v for v in values], places, marker, label=label)
    left.set_yticks(places, [row.name for row, _ in shown])
    left.invert_yaxis()
    left.grid(alpha=0.3)
    left.set(xlabel="IoU, % (seeds: at the oracle threshold)", title=name)
    left.legend()
    right.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])
    curves = {(row.run, row.scale): (row.name, result.curve) for row, result in shown if result.curve is not None}
    for label, curve in curves.values():
        right.plot(curve.thresholds, 100 * curve.scores.mean_iou, label=label)
    right.set(xlabel="background threshold", ylabel="train mIoU, %")
    right.grid(alpha=0.3)
    if right.lines:
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        figure.delaxes(right)
    return figure
