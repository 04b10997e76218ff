"""``cpn-fast reproduce``: the paper's tables and figures, as runs that differ from one config in a few keys.

``RUNS`` are the runs, ``TABLES`` the results that are shown beside the paper's. Runs are named after the config and
shared between tables. An existing run is continued, or kept if it is finished.

The other methods have configs of their own, such as ``voc_seam.yaml`` beside ``voc.yaml``. Users train these files
without ``reproduce``, so ``reproduce`` runs them too and uses their finished runs. If a file is missing, overrides of
the base make the released method.
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
    """A run of a table, as changes to a config."""

    overrides: tuple[str, ...] = ()
    """Keys that define the run. They replace the user's."""
    method: str = ""
    """The run starts from BASE_METHOD.yaml if that file is beside BASE.yaml, otherwise from the base."""
    released: tuple[str, ...] = ()
    """Keys of the released method, for a run that starts from the base. The user's replace them."""


# The keys that SEAM reads and in which CPN's recipes differ. Scale, lengths and rates depend on the images, so they are
# the base's.
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
"""Runs by name. CPN's is the base's run. Overrides have no spaces, because ``commands`` prints them."""

Measure = Literal["seeds", "background", "foreground", "pseudo-masks", "segmenter", "segmenter and CRF", "seconds"]

CHAIN: tuple[Measure, ...] = ("pseudo-masks", "segmenter", "segmenter and CRF")
"""Results of ``cpn-fast run``: they need all its stages."""


class Row(NamedTuple):
    """A row of a table."""

    name: str
    run: str
    """A key of RUNS."""
    paper: float | None
    """The paper's value in per cent IoU or seconds. None: not known here."""
    measure: Measure = "seeds"
    scale: float | None = None
    """The only scale of the CAMs. None: the config's scales."""
    over: tuple[int, ...] = ()
    """Values on the x axis of a figure: superpixels asked for, or sides of grid cells in pixels."""


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
"""The paper's tables and figures: train mIoU of seeds at the oracle threshold, unless a row has another measure."""

OVER = {"fig6": "superpixels asked for", "fig7": "sides of grid cells, px"}
"""Labels of the x axes of figures."""


class Result(NamedTuple):
    """Our result of a row."""

    value: float | None
    """In the unit of ``Row.paper``. None without ground truth."""
    curve: scores.Curve | None = None
    """Scores at every threshold. None unless the row measures seeds."""


class Plan(NamedTuple):
    """A run as a command line starts it."""

    file: Path
    overrides: list[str]
    config: Config


def run(name: str, path: Path, overrides: list[str]) -> Path:
    """Train or finish the runs of a table, print it, and write NAME.json and NAME.png. Returns the picture's path."""
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
    """Return a shell command for each run of a table, finished runs too. They may run anywhere, in any order.

    After all of them, ``run`` only makes and scores seeds.
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
    """Return the plan of one of ``RUNS``. The run is called ``BASE-KEY``, or as its file if it changes no key."""
    run = RUNS[key]
    file, file_overrides = path, [*run.released, *overrides]
    method_file = path.with_name(f"{path.stem}_{run.method}{path.suffix}")
    if run.method and method_file.is_file():
        file, file_overrides = method_file, overrides
    config = load(file, file_overrides)
    different = [section for section in ("data", "classes") if getattr(config, section) != getattr(base, section)]
    if different:
        raise UserError(
            f"{file}: {' and '.join(different)} differ from {path}'s, but reproduce uses {file.name} as the "
            f"{run.method} config of {path.name}: make them equal, or rename one of the files"
        )
    variant = load(file, [*file_overrides, *run.overrides])
    if variant != config:
        name = f"{base.name}-{key}"
    elif file != path and config.name == base.name:  # as after --set name=...
        name = f"{base.name}_{run.method}"
    else:
        return Plan(file, file_overrides, config)
    overrides = [*file_overrides, *run.overrides, f"name={name}"]
    return Plan(file, overrides, variant.model_copy(update={"name": name}))


class _Measured:
    """Measures rows. A run with several rows is scored once, and opened once, because that reads its checkpoints."""

    def __init__(self) -> None:
        self.weights = functools.cache(train.run)
        self.stages = functools.cache(chain.run)
        self.seeds = functools.cache(scored_seeds)

    def __call__(self, row: Row, config: Config) -> Result:
        if row.measure == "seconds":
            return Result(seconds_of_patches(config))
        if row.measure in CHAIN:
            value = {stage.name: stage.miou for stage in self.stages(config)}.get(row.measure)
            return Result(None if value is None else 100 * value)
        weights = self.weights(config)
        if row.scale is not None:
            config = at_scale(config, row.scale)
        evaluation = self.seeds(config, weights, config.data.eval_list)
        oracle = evaluation.oracle
        measured = {"background": oracle.background_iou, "foreground": oracle.foreground_iou}
        return Result(100 * float(measured.get(row.measure, oracle.mean_iou)), evaluation.curve)


def at_scale(config: Config, scale: float) -> Config:
    """Return the config of seeds of a single scale, in a folder beside the run's."""
    options = config.cam.model_copy(update={"scales": (scale,)})
    return config.model_copy(update={"name": f"{config.name}-scale-{scale:g}", "cam": options})


def scored_seeds(config: Config, weights: Path, list_path: Path, held_out: float | None = None) -> scores.Evaluation:
    """Make the missing seeds of a list and score all, also at the threshold ``held_out``. Writes no scores."""
    seeds = cam.run(config, weights, list_path) / "seeds"
    samples = load_samples(config.data, config.classes, list_path, labels=False, masks=True)
    return evaluate.evaluate_cams(
        samples, seeds, config.evaluate, config.classes, list_path=str(list_path), held_out=held_out, workers=2
    )


def seconds_of_patches(config: Config, images: int = 8, times: int = 5) -> float:
    """Return the seconds on one core to split an augmented training image into a pair, with superpixels of the crop.

    It is the median of ``times`` batches of ``images``. One batch before is not counted, because it includes set-up.
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
        started = time.perf_counter()
        superpixels = None
        if config.patches.kind == "superpixel":
            superpixels = segment_batch(batch.images, config.superpixels, 1)
        limit = config.superpixels.count
        complementary_pair(batch.images, superpixels, config.patches, None, torch.Generator(), patch_limit=limit)
        return time.perf_counter() - started

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
    """Plot our results beside the paper's, a figure's curve, and the mIoU of seeds against the background threshold."""
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
    heights = np.arange(len(shown))
    for label, marker, values in _both(shown):
        axes.plot(values, heights, marker, label=label)
    axes.set_yticks(heights, [row.name for row, _ in shown])
    axes.invert_yaxis()
    axes.set(xlabel="IoU, % (seeds: at the oracle threshold)", title=name)
    axes.legend()


def _plot_over(axes: Axes, name: str, shown: Shown) -> None:
    """Plot mIoU over the number of superpixels or the sides of grids. Rows without these are horizontal lines.

    A set of grids is at the geometric mean of its sides.
    """
    swept = [(row, result) for row, result in shown if row.over]
    positions = [statistics.geometric_mean(row.over) for row, _ in swept]
    for label, marker, values in _both(swept):
        (line,) = axes.plot(positions, values, f"{marker}-" if label == "ours" else marker, label=label)
        for row, result in shown:
            level = result.value if label == "ours" else row.paper
            if not row.over and level is not None:
                axes.axhline(level, color=line.get_color(), ls="--", label=f"{row.name}, {label}")
    axes.set_xscale("log")
    axes.set_xticks(positions, [", ".join(map(str, row.over)) for row, _ in swept])
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
    """Return the label, marker and values of the paper's results and of ours. A missing value is NaN."""
    paper, ours = [row.paper for row, _ in shown], [result.value for _, result in shown]
    return tuple(
        (label, marker, [np.nan if value is None else value for value in values])
        for label, marker, values in (("paper", "D", paper), ("ours", "o", ours))
    )
