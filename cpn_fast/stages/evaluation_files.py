"""The results of an evaluation: evaluation.json, per_class.csv, plots, and the table on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from cpn_fast.data.scores import SUMMARY, Curve, Evaluation, Result
from cpn_fast.runtime import terminal
from cpn_fast.runtime.files import remove_partials, replacing, with_checksum


def write_evaluation(folder: Path, evaluation: Evaluation) -> Path:
    """Write evaluation.json (everything), per_class.csv and plots; return the path of evaluation.json."""
    remove_partials(folder)
    tree = with_checksum(_as_tree(evaluation))
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in tree.items())
    path = folder / "evaluation.json"
    _write(path, f"{{\n{lines}\n}}\n".encode())
    _write(folder / "per_class.csv", _per_class_csv(evaluation).encode())
    _write(folder / "per_class.png", _png(_plot_classes(evaluation)))
    if evaluation.curve is not None:
        _write(folder / "curve.png", _png(_plot_curve(evaluation, evaluation.curve)))
    return path


def print_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print the scores of each class in the first result, and the means of every result."""
    console = console or terminal.console()
    first = evaluation.results[0]
    names = ("background", *evaluation.classes)
    classes = Table("class", *(_right(name) for name in ("IoU", "precision", "recall")), title=_name(first))
    for row in zip(names, first.scores.iou, first.scores.precision, first.scores.recall, strict=True):
        classes.add_row(row[0], *(_percent(value) for value in row[1:]))
    means = Table("", *(_right(_name(result)) for result in evaluation.results), title=_title(evaluation))
    for name, words in SUMMARY.items():
        means.add_row(words, *(_percent(getattr(result.scores, name)) for result in evaluation.results))
    console.print(classes, means)


def _as_tree(evaluation: Evaluation) -> dict[str, Any]:
    names = ("background", *evaluation.classes)
    tree: dict[str, Any] = {
        "source": str(evaluation.source),
        "list": evaluation.list_path,
        "images": len(evaluation.ids),
        "note": "IoU, precision, recall and accuracy are shares of 1; null: 0 / 0. The oracle's threshold was chosen "
        "on the ground truth that it is scored on.",
        "classes": names,
        "results": [_result_tree(result, names) for result in evaluation.results],
    }
    if evaluation.curve is not None:
        tree["curve"] = {"threshold": evaluation.curve.thresholds.tolist()}
        tree["curve"] |= {name: _plain(getattr(evaluation.curve.scores, name)) for name in (*SUMMARY, "iou")}
    tree["ids"] = evaluation.ids
    return tree


def _result_tree(result: Result, names: Sequence[str]) -> dict[str, Any]:
    scores = result.scores
    return {
        "kind": result.kind,
        "threshold": result.threshold,
        **{name: _plain(getattr(scores, name)) for name in SUMMARY},
        **{
            name: dict(zip(names, _plain(getattr(scores, name)), strict=True))
            for name in ("iou", "precision", "recall")
        },
        "confusion": scores.confusion.tolist(),
    }


def _plain(values: np.ndarray) -> Any:
    """Return nested lists with None for NaN, which JSON lacks."""
    return np.where(np.isnan(values), np.array(None), values).tolist()


def _per_class_csv(evaluation: Evaluation) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["result", "threshold", "class", "iou", "precision", "recall", "true_pixels", "predicted_pixels"])
    for result in evaluation.results:
        scores = result.scores
        for index, name in enumerate(("background", *evaluation.classes)):
            shares = [_plain(values[index]) for values in (scores.iou, scores.precision, scores.recall)]
            threshold = result.threshold
            table.writerow([result.kind, threshold, name, *shares, scores.true[index], scores.predicted[index]])
    return text.getvalue()


def _plot_curve(evaluation: Evaluation, curve: Curve) -> Figure:
    figure, axes = _figure(7, 6)
    for name, words in SUMMARY.items():
        width = 2.5 if name == "mean_iou" else 1.2
        axes.plot(curve.thresholds, 100 * getattr(curve.scores, name), label=words, lw=width)
    for result in evaluation.results:
        if result.threshold is not None:
            value = 100 * result.scores.mean_iou
            face = "white" if result.kind == "oracle" else "black"
            axes.axvline(result.threshold, color="black", lw=0.6)
            axes.plot(result.threshold, value, "o", color="black", mfc=face, label=f"{_name(result)}: {value:.2f}")
    axes.set(
        xlabel="background threshold",
        ylabel="%",
        xlim=(0, 1),
        ylim=(0, 100),
        title=terminal.plotted(_title(evaluation)),
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _plot_classes(evaluation: Evaluation) -> Figure:
    first = evaluation.results[0]
    names = ("background", *evaluation.classes)
    figure, axes = _figure(7, 1.2 + 0.26 * len(names))
    values = 100 * first.scores.iou
    bars = axes.barh([terminal.plotted(name) for name in names], np.nan_to_num(values), height=0.75)
    axes.bar_label(bars, [_percent(value / 100) for value in values], padding=3)
    mean = _percent(first.scores.mean_iou)
    axes.set(
        xlabel="IoU, %", xlim=(0, 107), title=terminal.plotted(f"{_title(evaluation)}\n{_name(first)}: mean {mean}")
    )
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def _title(evaluation: Evaluation) -> str:
    return f"{evaluation.source.name} on {Path(evaluation.list_path).stem} ({len(evaluation.ids)} images)"


def _name(result: Result) -> str:
    if result.threshold is None:
        return "masks"
    origin = {
        "oracle": "oracle (chosen on this ground truth)",
        "fixed": "fixed beforehand",
        "held-out": "held out (chosen on other images)",
    }[result.kind]
    return f"{result.threshold:g}, {origin}"


def _percent(share: float | np.ndarray) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.2f}"


def _right(name: str) -> Column:
    return Column(name, justify="right")
