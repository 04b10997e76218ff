"""``cpn-fast reproduce``: the paper's tables and figures, as runs that differ from one config in a few keys.

``RUNS`` says what is trained, ``TABLES`` what is shown of it beside the paper's figure. Runs are named after the
config, shared between tables, and continued or left alone when they are there.

The other methods are not CPN with some keys changed: each has a config of its own, such as ``voc_seam.yaml`` beside
``voc.yaml``. That file is what a user trains without ``reproduce``, so it is what is run here too, and its finished run
is taken. Where there is none, overrides of the base make up the method as it was released.
"""

from __future__ import annotations

import functools
import statistics
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from cpn_fast.config import Config
from cpn_fast.config_file import load
from cpn_fast.data import scores
from cpn_fast.data.dataset import load_samples
from cpn_fast.methods.patches import complementary_pair
from cpn_fast.pipelines.superpixels import segment_batch
from cpn_fast.pipelines.training import TrainingPipeline
from cpn_fast.runtime import distributed, terminal
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import replacing, write_json
from cpn_fast.runtime.owner import owned
from cpn_fast.stages import cam, chain, evaluate, train

CPN = "cpn"


class Run(NamedTuple):
    overrides: tuple[str, ...] = ()
    """What makes it this run, whatever else is set."""
    method: str = ""
    """It starts from BASE_METHOD.yaml where that is beside BASE.yaml, and otherwise from the base."""
    released: tuple[str, ...] = ()
    """What the base may have otherwise, and the released method had so; for a start from the base."""


# All that SEAM reads and CPN's recipes differ in. Its scale, lengths and rates are the base's: they go with the images.
_RELEASED_SEAM = (
    *("train.batch=8", "train.momentum=0.0005"),
    *("model.pcm=true", "model.pcm_norm=l2", "model.pcm_sum=column", "model.mask_absent=false"),
    *("model.prcm_relu=true", "model.prcm_scale=classes", "model.prcm_keys=reread"),
    *("loss.background_suppression=1", "loss.normalise=min-max", "loss.hard_share=0.2"),
    "cam.map=refined",
)
_COUNTS = (5, 50, 100, 200, 500, 1000, 8000)
_GRIDS = ((4, 7), (14, 28), (28, 56), (56, 112), (112, 224), (224, 448))
RUNS: dict[str, Run] = {
    CPN: Run(),
    "cam": Run(("method=cam", "model.pcm=false", "model.prcm=false", "cam.map=raw"), "cam"),
    "seam": Run(("method=seam", "model.prcm=false"), "seam", _RELEASED_SEAM),
    "seam-prcm": Run(("method=seam", "model.prcm=true"), "seam_prcm", _RELEASED_SEAM),
    "tcp": Run(("model.prcm=false", "loss.cpcr=0")),
    "cpcr": Run(("model.prcm=false", "loss.hard_share=1")),
    "ohem": Run(("model.prcm=false",)),
    **{f"hide-{share}": Run((f"patches.hide={share}",)) for share in (0.1, 0.2, 0.3, 0.4, 0.5)},
    **{f"superpixels-{count}": Run((f"superpixels.count={count}",)) for count in _COUNTS},
    **{
        f"grid-{a}-{b}": Run(("patches.kind=grid", "patches.share=patches", f"patches.grid_sizes=[{a},{b}]"), "grid")
        for a, b in _GRIDS
    },
}
"""By name; CPN's own is the base's. Overrides have no spaces: ``commands`` prints them."""

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
    over: tuple[int, ...] = ()
    """What a figure draws it over: superpixels asked for, or sides of grid cells in pixels."""


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
        Row(f"{count} superpixels", f"superpixels-{count}", {200: 57.43, 8000: 55.79}.get(count), over=(count,))
        for count in _COUNTS
    ),
    "fig7": (
        *(
            Row(f"grid {a}, {b}", f"grid-{a}-{b}", {4: 55.67, 56: 57.07, 224: 55.80}.get(a), over=(a, b))
            for a, b in _GRIDS
        ),
        Row("superpixels", CPN, 57.43),
        Row("seconds an image, superpixels", CPN, 1.45, "seconds"),
        Row("seconds an image, grid", "grid-56-112", 0.006, "seconds"),
    ),
}
"""The paper's figures: train mIoU of seeds at the oracle threshold, but where a row measures something else."""

OVER = {"fig6": "superpixels asked for", "fig7": "sides of grid cells, px"}
"""What a figure draws mIoU over."""


class Result(NamedTuple):
    value: float | None
    """In the unit of ``Row.paper``; None without ground truth."""
    curve: scores.Curve | None = None
    """Of seeds."""


class Plan(NamedTuple):
    """A run as a command line starts it."""

    file: Path
    overrides: list[str]
    config: Config


def run(name: str, path: Path, overrides: list[str]) -> Path:
    """Do or finish what a table needs, print it, and write NAME.json and NAME.png; returns the picture's path."""
    base = _base(name, path, overrides)
    rows = TABLES[name]
    plans = {row.run: plan(row.run, base, path, overrides) for row in rows}
    measure = _Measured()
    folder = base.out / f"{base.name}-reproduce"
    with owned(folder, distributed.join(), part=name):
        results = [measure(row, plans[row.run].config) for row in rows]
        if distributed.join().first:
            _print(name, base, rows, results)
            tree = [_as_tree(row, plans[row.run], result) for row, result in zip(rows, results, strict=True)]
            write_json(folder / f"{name}.json", tree, indent=1)
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
        planned = plan(key, base, path, overrides)
        stage = "run" if key in chains else "train"
        lines[terminal.command_line(stage, planned.file, overrides=planned.overrides)] = None
    return list(lines)


def _base(name: str, path: Path, overrides: list[str]) -> Config:
    if name not in TABLES:
        raise UserError(f"reproduce {name}: no such table; there are {', '.join(TABLES)}")
    base = load(path, overrides)
    if base.method != "cpn":
        raise UserError(f"{path}: method is {base.method}; reproduce starts from CPN's config")
    return base


def plan(key: str, base: Config, path: Path, overrides: list[str]) -> Plan:
    """One of ``RUNS``, called ``BASE-KEY``; where its overrides change nothing in its file, that file's own run."""
    run = RUNS[key]
    file, given = path, [*run.released, *overrides]
    beside = path.with_name(f"{path.stem}_{run.method}{path.suffix}")
    if run.method and beside.is_file():
        file, given = beside, overrides
    own = load(file, given)
    different = [section for section in ("data", "classes") if getattr(own, section) != getattr(base, section)]
    if different:
        raise UserError(
            f"{file}: {' and '.join(different)} differ from {path}'s, and reproduce takes the one for the "
            f"{run.method} of the other: make them equal, or rename one of the files"
        )
    variant = load(file, [*given, *run.overrides])
    if variant != own:
        name = f"{base.name}-{key}"
    elif file != path and own.name == base.name:  # as after --set name=...
        name = f"{base.name}_{run.method}"
    else:
        return Plan(file, given, own)
    overrides = [*given, *run.overrides, f"name={name}"]
    return Plan(file, overrides, variant.model_copy(update={"name": name}))


class _Measured:
    """Values of rows. A run that several of them show is opened once, which reads its checkpoints, and scored once."""

    def __init__(self) -> None:
        self.weights = functools.cache(train.run)
        self.stages = functools.cache(chain.run)
        self.seeds = functools.cache(scored_seeds)

    def __call__(self, row: Row, config: Config) -> Result:
        if row.measure == "seconds":
            return Result(seconds_of_patches(config))
        if row.measure in CHAIN:
            value = {found.name: found.miou for found in self.stages(config)}.get(row.measure)
            return Result(None if value is None else 100 * value)
        weights = self.weights(config)
        if row.scale is not None:
            config = at_scale(config, row.scale)
        found = self.seeds(config, weights, config.data.eval_list)
        measured = {"background": found.oracle.background_iou, "foreground": found.oracle.foreground_iou}
        return Result(100 * float(measured.get(row.measure, found.oracle.mean_iou)), found.curve)


def at_scale(config: Config, scale: float) -> Config:
    """The config of seeds of one scale alone, in a folder beside the run's own."""
    options = config.cam.model_copy(update={"scales": (scale,)})
    return config.model_copy(update={"name": f"{config.name}-scale-{scale:g}", "cam": options})


def scored_seeds(config: Config, weights: Path, list_path: Path, held_out: float | None = None) -> scores.Evaluation:
    """Make what is missing of a list's seeds and score them, at ``held_out`` too; the scores are not written."""
    seeds = cam.run(config, weights, list_path) / "seeds"
    samples = load_samples(config.data, config.classes, list_path, labels=False, masks=True)
    name = str(list_path)
    return evaluate.evaluate_cams(
        samples, seeds, config.evaluate, config.classes, list_name=name, held_out=held_out, workers=2
    )


def seconds_of_patches(config: Config, images: int = 8, times: int = 5) -> float:
    """Seconds to split an augmented training image into a pair on one core, superpixels made on the crop.

    The median of ``times`` batches of ``images`` after one that is not counted: the first call sets things up.
    """
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

    def split() -> float:
        began = time.perf_counter()
        superpixels = None
        if config.patches.kind == "superpixel":
            superpixels = segment_batch(batch.images, config.superpixels, 1)
        limit = config.superpixels.count
        complementary_pair(batch.images, superpixels, config.patches, None, torch.Generator(), patch_limit=limit)
        return time.perf_counter() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        split()
        return statistics.median(split() for _ in range(times)) / len(batch.images)
    finally:
        torch.set_num_threads(threads)


def _print(name: str, base: Config, rows: tuple[Row, ...], results: list[Result]) -> None:
    table = Table("", "paper", "ours", title=f"{name} with {base.name}; seeds at the oracle threshold")
    for row, result in zip(rows, results, strict=True):
        digits = 4 if row.measure == "seconds" else 2
        table.add_row(row.name, *("-" if v is None else f"{v:.{digits}f}" for v in (row.paper, result.value)))
    terminal.console().print(table)


def _as_tree(row: Row, planned: Plan, result: Result) -> dict[str, Any]:
    tree = {**row._asdict(), "config": str(planned.file), "overrides": planned.overrides, "ours": result.value}
    if result.curve is not None:
        tree["thresholds"] = result.curve.thresholds.tolist()
        tree["mean_iou"] = result.curve.scores.mean_iou.tolist()
    return tree


Shown = list[tuple[Row, Result]]


def _plot(name: str, rows: tuple[Row, ...], results: list[Result]) -> Figure:
    """Ours beside the paper's; a figure's curve; and mIoU against the background threshold for rows that have seeds."""
    shown = [(row, result) for row, result in zip(rows, results, strict=True) if row.measure != "seconds"]
    panels = [_plot_rows]
    if name in OVER:
        panels.append(_plot_over)
    if any(result.curve is not None for _, result in shown):
        panels.append(_plot_thresholds)
    figure = Figure((6 * len(panels), 1.5 + 0.32 * max(8, len(shown))), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, name, shown)
        axes.grid(alpha=0.3)
    return figure


def _plot_rows(axes: Axes, name: str, shown: Shown) -> None:
    places = np.arange(len(shown))
    for whose, marker, values in _both(shown):
        axes.plot(values, places, marker, label=whose)
    axes.set_yticks(places, [row.name for row, _ in shown])
    axes.invert_yaxis()
    axes.set(xlabel="IoU, % (seeds: at the oracle threshold)", title=name)
    axes.legend()


def _plot_over(axes: Axes, name: str, shown: Shown) -> None:
    """mIoU over the counts or, at the geometric mean of their sides, the sets of grids; other rows are level lines."""
    swept = [(row, result) for row, result in shown if row.over]
    places = [statistics.geometric_mean(row.over) for row, _ in swept]
    for whose, marker, values in _both(swept):
        (line,) = axes.plot(places, values, f"{marker}-" if whose == "ours" else marker, label=whose)
        for row, result in shown:
            level = result.value if whose == "ours" else row.paper
            if not row.over and level is not None:
                axes.axhline(level, color=line.get_color(), ls="--", label=f"{row.name}, {whose}")
    axes.set_xscale("log")
    axes.set_xticks(places, [", ".join(map(str, row.over)) for row, _ in swept])
    axes.minorticks_off()
    axes.set(xlabel=OVER[name], ylabel="train mIoU at the oracle threshold, %")
    axes.legend()


def _plot_thresholds(axes: Axes, name: str, shown: Shown) -> None:
    axes.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])
    curves = {(row.run, row.scale): (row.name, result.curve) for row, result in shown if result.curve is not None}
    for label, curve in curves.values():
        axes.plot(curve.thresholds, 100 * curve.scores.mean_iou, label=label)
    axes.set(xlabel="background threshold", ylabel="train mIoU, %")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _both(shown: Shown) -> tuple[tuple[str, str, list[float]], ...]:
    """Whose, a marker, and values, NaN where there is none."""
    paper, ours = [row.paper for row, _ in shown], [result.value for _, result in shown]
    return tuple(
        (whose, marker, [np.nan if value is None else value for value in values])
        for whose, marker, values in (("paper", "D", paper), ("ours", "o", ours))
    )
