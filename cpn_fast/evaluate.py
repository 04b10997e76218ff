"""Stage ``evaluate``: scores of CAM seeds, at every background threshold from one pass, or of mask PNGs.

The score of a seed depends on the background threshold. One chosen on the very masks that it is scored on is
the *oracle*: an upper bound, and called so everywhere. A *fixed* one was set beforehand in the config; a *held-out*
one is the oracle of other images.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from cpn_fast import ranks, terminal
from cpn_fast.config import Config, Evaluate
from cpn_fast.dataset import Sample, load_samples, some
from cpn_fast.errors import UserError
from cpn_fast.files import read_json, remove_partials, replacing, with_checksum
from cpn_fast.masks import IGNORE, is_of_another_image, read_mask
from cpn_fast.owner import owned
from cpn_fast.progress import track
from cpn_fast.seeds import Seed, read_seed

Kind = Literal["held-out", "fixed", "oracle", "masks"]


@dataclass(frozen=True)
class Scores:
    """Scores of K foreground classes and, at index 0, the background; leading axes, if any, are thresholds.

    A class that is neither in the ground truth nor predicted has no IoU (NaN) and does not enter means; the released
    scripts add 1e-10 to the union instead, which counts such a class as 0. Likewise the precision of a class never
    predicted and the recall of one not in the ground truth.
    """

    confusion: np.ndarray
    """int64 (..., K + 1, K + 1): pixels by [true class, predicted class]."""

    @property
    def iou(self) -> np.ndarray:
        """float64 (..., K + 1): TP / (TP + FP + FN)."""
        return _ratio(self._hits, self.true + self.predicted - self._hits)

    @property
    def precision(self) -> np.ndarray:
        """float64 (..., K + 1): TP / (TP + FP)."""
        return _ratio(self._hits, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """float64 (..., K + 1): TP / (TP + FN)."""
        return _ratio(self._hits, self.true)

    @property
    def true(self) -> np.ndarray:
        """int64 (..., K + 1): pixels of each class in the ground truth."""
        return self.confusion.sum(-1)

    @property
    def predicted(self) -> np.ndarray:
        """int64 (..., K + 1): pixels predicted as each class."""
        return self.confusion.sum(-2)

    @property
    def mean_iou(self) -> np.ndarray:
        """mIoU: mean of ``iou``, background included."""
        return _mean(self.iou)

    @property
    def background_iou(self) -> np.ndarray:
        return self.iou[..., 0]

    @property
    def foreground_iou(self) -> np.ndarray:
        """Mean of ``iou`` without the background."""
        return _mean(self.iou[..., 1:])

    @property
    def mean_precision(self) -> np.ndarray:
        return _mean(self.precision)

    @property
    def mean_recall(self) -> np.ndarray:
        return _mean(self.recall)

    @property
    def accuracy(self) -> np.ndarray:
        """Share of pixels predicted right."""
        return _ratio(self._hits.sum(-1), self.confusion.sum((-2, -1)))

    @property
    def _hits(self) -> np.ndarray:
        return np.diagonal(self.confusion, axis1=-2, axis2=-1)


SUMMARY = {
    "mean_iou": "mIoU",
    "background_iou": "background IoU",
    "foreground_iou": "foreground mIoU",
    "mean_precision": "mean precision",
    "mean_recall": "mean recall",
    "accuracy": "pixel accuracy",
}
"""The single figures of ``Scores``, in words."""


@dataclass(frozen=True)
class Result:
    """Scores at one threshold, or of masks."""

    kind: Kind
    threshold: float | None
    scores: Scores


@dataclass(frozen=True)
class Curve:
    """Scores at every threshold of the grid."""

    thresholds: np.ndarray
    """float64 (n,)"""
    scores: Scores
    """Leading axis n."""


@dataclass(frozen=True)
class Evaluation:
    """What was scored, on what, and how well."""

    source: Path
    """Folder of the seeds or masks."""
    list: str
    """The list of images."""
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    """Foreground names."""
    results: tuple[Result, ...]
    """Of seeds: held-out and fixed if given, then oracle. Of masks: one."""
    curve: Curve | None = None
    """Of seeds."""
    path: Path | None = None
    """Its evaluation.json, once written."""

    @property
    def oracle(self) -> Scores:
        """Scores at the best threshold on this very ground truth."""
        return self._scores("oracle")

    @property
    def fixed(self) -> Scores:
        """Scores at a threshold chosen without this ground truth: the held-out one, else the config's."""
        return self._scores("held-out", "fixed")

    def _scores(self, *kinds: Kind) -> Scores:
        for result in self.results:
            if result.kind in kinds:
                return result.scores
        raise LookupError(f"no {' or '.join(kinds)} threshold among {[result.kind for result in self.results]}")


class ThresholdSweep:
    """Confusion counts at every background threshold from one look at each pixel.

    Against a constant background score only a pixel's best foreground class can win, and it does at every
    threshold below its score. So pixels are counted by how many thresholds that is, best class and true class;
    sums over the first give each threshold's counts. Equal to one argmax over [threshold, scores of all classes] per
    threshold in float32, where the first of equals, the background, wins.
    """

    def __init__(self, thresholds: np.ndarray, classes: int) -> None:
        """thresholds: (n,) in [0, 1], ascending; classes: number of foreground classes."""
        self._thresholds = np.asarray(thresholds, np.float32)
        self._classes = classes
        # [thresholds below the score, predicted foreground class, true class]
        self._foreground = np.zeros((len(thresholds) + 1, classes, classes + 1), np.int64)
        self._true = np.zeros(classes + 1, np.int64)
        self._lock = threading.Lock()

    def add(self, seed: Seed, truth: np.ndarray) -> None:
        """Count an image. truth: uint8 (H, W), values 0 to classes or IGNORE. Threads may call this at once."""
        present, columns = len(seed.classes), self._classes + 2
        true = np.minimum(truth, self._classes + 1).astype(np.intp)  # ignored pixels go to a last column, not kept
        totals = np.bincount(true.ravel(), minlength=columns)
        if present:
            below = np.searchsorted(self._thresholds, seed.cam.max(0))
            key = (below * present + seed.cam.argmax(0)) * columns + true
            counts = np.bincount(key.ravel(), minlength=(len(self._thresholds) + 1) * present * columns)
        with self._lock:
            self._true += totals[:-1]
            if present:
                self._foreground[:, seed.classes] += counts.reshape(-1, present, columns)[..., :-1]

    def confusion(self) -> np.ndarray:
        """int64 (n, K + 1, K + 1): [threshold, true class, predicted class]."""
        won = self._foreground[::-1].cumsum(0)[-2::-1]  # [threshold, predicted, true]: scores above the threshold
        background = self._true - won.sum(1)
        return np.concatenate([background[:, None], won], 1).swapaxes(1, 2)


def confusion(prediction: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """int64 (K + 1, K + 1) by [true, predicted] of two uint8 masks of one shape; truth may hold IGNORE."""
    counted = truth != IGNORE
    key = truth[counted].astype(np.intp) * (classes + 1) + prediction[counted]
    return np.bincount(key, minlength=(classes + 1) ** 2).reshape(classes + 1, classes + 1)


def evaluate_cams(
    samples: Sequence[Sample],
    folder: Path,
    config: Evaluate,
    classes: Sequence[str],
    *,
    list_name: str,
    held_out: float | None = None,
    workers: int,
) -> Evaluation:
    """Score ``folder/<id>.npz`` against the samples' masks. held_out: a threshold chosen on other images.

    Raises UserError with every missing, damaged or ill-sized file.
    """
    grid = np.arange(config.thresholds) / config.thresholds
    given: dict[Kind, float] = {}
    if held_out is not None:
        given["held-out"] = held_out
    if config.threshold is not None:
        given["fixed"] = config.threshold
    tried = np.union1d(grid, list(given.values()))
    sweep = ThresholdSweep(tried, len(classes))

    def score(sample: Sample, path: Path) -> None:
        seed = read_seed(path)
        truth = _truth(sample, seed.cam.shape[1:], len(classes))
        if seed.classes.max(initial=-1) >= len(classes):
            raise _Problem(f"seeds of more than {len(classes)} classes", f"{path.name} ({seed.classes[-1] + 1})")
        sweep.add(seed, truth)

    _each(samples, folder, ".npz", score, workers)
    counts = ranks.join().sum(sweep.confusion())
    curve = Scores(counts[np.searchsorted(tried, grid)])
    best = int(np.argmax(curve.mean_iou))
    results = [Result(kind, value, Scores(counts[np.searchsorted(tried, value)])) for kind, value in given.items()]
    results.append(Result("oracle", float(grid[best]), Scores(curve.confusion[best])))
    return Evaluation(
        folder, list_name, tuple(s.id for s in samples), tuple(classes), tuple(results), Curve(grid, curve)
    )


def evaluate_masks(
    samples: Sequence[Sample], folder: Path, classes: Sequence[str], *, list_name: str, workers: int
) -> Evaluation:
    """Score ``folder/<id>.png`` against the samples' masks.

    Raises UserError with every missing, damaged or ill-sized file.
    """
    total = np.zeros((len(classes) + 1, len(classes) + 1), np.int64)
    lock = threading.Lock()

    def score(sample: Sample, path: Path) -> None:
        prediction = read_mask(path)
        truth = _truth(sample, prediction.shape, len(classes))
        if prediction.max() > len(classes):
            raise _Problem(f"masks with values above {len(classes)}", f"{path.name} ({prediction.max()})")
        counts = confusion(prediction, truth, len(classes))
        with lock:
            total[:] += counts

    _each(samples, folder, ".png", score, workers)
    scores = Scores(ranks.join().sum(total))
    ids = tuple(sample.id for sample in samples)
    return Evaluation(folder, list_name, ids, tuple(classes), (Result("masks", None, scores),))


def held_out_threshold(path: Path, ids: Collection[str]) -> float:
    """The oracle threshold in another list's evaluation.json.

    Raises UserError if that evaluation saw any of ``ids``, for then it would be no held-out one here.
    """
    try:
        tree = read_json(path)
        found = [float(result["threshold"]) for result in tree["results"] if result["kind"] == "oracle"]
        seen = set(tree["ids"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such evaluation; `cpn-fast evaluate CONFIG --cams DIR` writes one") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not an evaluation.json of cpn-fast: {error}") from None
    if not found:
        raise UserError(f"{path}: it scores masks and has no threshold; give an evaluation of seeds")
    both = [id_ for id_ in ids if id_ in seen]
    if both:
        raise UserError(
            f"{path}: its threshold was chosen on {len(both)} of the {len(ids)} images to be scored "
            f"({', '.join(both[:3])} ...): give an evaluation of other images"
        )
    return found[0]


def write_evaluation(folder: Path, evaluation: Evaluation) -> Path:
    """Write evaluation.json (everything), per_class.csv and plots; returns the path of evaluation.json."""
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


def run(
    config: Config, *, cams: Path | None, masks: Path | None, list_path: Path | None, threshold_from: Path | None
) -> Evaluation:
    """Score a folder of seeds or of masks on a list (the config's ``data.eval_list`` by default), print and write it.

    threshold_from: the evaluation.json of other images, whose best threshold is used here too.
    """
    source = cams or masks
    if source is None or (cams and masks):
        raise UserError("give either --cams or --masks, a folder of seeds or of mask PNGs")
    if masks and threshold_from:
        raise UserError("--threshold-from goes with --cams: masks have no threshold")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; `cpn-fast cam` prints where it writes seeds and masks")
    inner = source / ("seeds" if cams else "masks")
    if inner.is_dir():
        raise UserError(f"{source}: holds what the stage made, not only {inner.name}; did you mean {inner}?")
    list_path = list_path or config.data.eval_list
    samples = load_samples(config.data, config.classes, list_path, labels=False, masks=True)
    workers = os.cpu_count() or 1
    name = str(list_path)
    if cams:
        held_out = held_out_threshold(threshold_from, [sample.id for sample in samples]) if threshold_from else None
        evaluation = evaluate_cams(
            samples, cams, config.evaluate, config.classes, list_name=name, held_out=held_out, workers=workers
        )
    else:
        evaluation = evaluate_masks(samples, source, config.classes, list_name=name, workers=workers)
    never = [
        name for name, pixels in zip(config.classes, evaluation.results[0].scores.true[1:], strict=True) if not pixels
    ]
    if len(never) == len(config.classes):
        raise UserError(
            f"{config.data.root / config.data.masks}: no ground truth of the {len(samples)} images has a pixel of any "
            f"class ({some(never)}), so nothing can be scored. Mask values of the classes are 1 to {len(never)}"
        )
    if never and ranks.join().first:
        print(f"Warning: no ground truth has a pixel of {some(never)}, and no score counts them", file=sys.stderr)
    place, home = source.resolve(), config.run.resolve()
    inside = place.is_relative_to(home)
    parts = place.relative_to(home).parts if inside else place.parts[-2:]
    name = "-".join(parts)
    if not inside or len(os.fsencode(name)) > 200:  # others may end in the names of the run's own; a name has 255 bytes
        name = name if len(os.fsencode(name)) <= 200 else parts[-1][:40]
        name += f"-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"
    folder = config.run / "evaluation" / config.list_name(list_path) / name
    if ranks.join().first:
        with owned(folder, waits=True):
            write_evaluation(folder, evaluation)
        print_evaluation(evaluation)
        print(f"Scores, curve and plots are in {folder}")
    ranks.join().wait()
    return dataclasses.replace(evaluation, path=folder / "evaluation.json")


class _Problem(Exception):
    """What keeps an image from being scored: a kind, to count under, and a file's name."""


def _each(
    samples: Sequence[Sample], folder: Path, suffix: str, score: Callable[[Sample, Path], None], workers: int
) -> None:
    """Score this process's share in threads (reading and inflating leave the GIL); raise all problems in one go."""

    def attempt(sample: Sample) -> tuple[str, str] | None:
        path = folder / f"{sample.id}{suffix}"
        if not path.exists():
            return "files missing", path.name
        try:
            score(sample, path)
            if is_of_another_image(path, sample.image):
                return "files of another image than is there now", path.name
        except _Problem as problem:
            kind, name = problem.args
            return kind, name
        except UserError as error:
            return "files that cannot be read", str(error)
        return None

    rank = ranks.join()
    own = rank.share(samples)
    with ThreadPoolExecutor(workers) as pool:
        try:
            tried = list(track(pool.map(attempt, own), f"scoring {folder.name}", total=len(own)))
        finally:
            pool.shutdown(cancel_futures=True)  # who stops this need not wait for the rest
    problems: dict[str, list[str]] = defaultdict(list)
    for kind, name in filter(None, itertools.chain.from_iterable(rank.gather(tried))):
        problems[kind].append(name)
    if problems:
        lines = [
            f"  {len(names)} {kind}: {', '.join(names[:5])}{' ...' * (len(names) > 5)}"
            for kind, names in problems.items()
        ]
        raise UserError("\n".join([f"{folder}: not all of {len(samples)} images can be scored", *lines]))


def _truth(sample: Sample, shape: tuple[int, ...], classes: int) -> np.ndarray:
    if sample.mask is None:
        raise ValueError(f"{sample.id}: scoring needs samples with ground truth")
    truth = read_mask(sample.mask)
    if truth.shape != shape:
        sizes = f"{shape[1]}x{shape[0]}, ground truth {truth.shape[1]}x{truth.shape[0]}"
        raise _Problem("of another size than the ground truth", f"{sample.id} ({sizes})")
    foreign = truth[(truth > classes) & (truth != IGNORE)]
    if foreign.size:
        raise _Problem(
            f"ground truths with values other than 0 to {classes} and {IGNORE}", f"{sample.id} ({foreign[0]})"
        )
    return truth


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(-1), known.sum(-1))


# Files


def _as_tree(evaluation: Evaluation) -> dict[str, Any]:
    names = ("background", *evaluation.classes)
    tree: dict[str, Any] = {
        "source": str(evaluation.source),
        "list": evaluation.list,
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
    """Nested lists; JSON has no NaN."""
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


# Words


def _title(evaluation: Evaluation) -> str:
    return f"{evaluation.source.name} on {Path(evaluation.list).stem} ({len(evaluation.ids)} images)"


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
