"""Stage ``evaluate``: score CAM seeds at all background thresholds in one pass, or score mask PNGs.

The score of a seed depends on the background threshold. The *oracle* threshold is chosen on the masks that it is scored
on, so its score is an upper bound. A *fixed* threshold is set in the config. A *held-out* threshold is the oracle of
other images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cpn_fast.config import Config, Evaluate
from cpn_fast.data.dataset import Sample, load_samples
from cpn_fast.data.masks import IGNORE, is_of_another_image, read_mask
from cpn_fast.data.scores import Curve, Evaluation, Kind, Result, Scores, ThresholdSweep, confusion
from cpn_fast.data.seeds import read_seed
from cpn_fast.runtime import distributed
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import read_json
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.progress import track
from cpn_fast.stages.evaluation_files import print_evaluation, write_evaluation
from cpn_fast.stages.results import require_classes


def evaluate_cams(
    samples: Sequence[Sample],
    folder: Path,
    config: Evaluate,
    classes: Sequence[str],
    *,
    list_path: str,
    held_out: float | None = None,
    workers: int,
) -> Evaluation:
    """Score ``folder/<id>.npz`` against the samples' masks. held_out: a threshold chosen on other images.

    Raises UserError that lists all missing and damaged files, and files of the wrong size.
    """
    grid = np.arange(config.thresholds) / config.thresholds
    chosen: dict[Kind, float] = {}
    if held_out is not None:
        chosen["held-out"] = held_out
    if config.threshold is not None:
        chosen["fixed"] = config.threshold
    tried = np.union1d(grid, list(chosen.values()))
    sweep = ThresholdSweep(tried, len(classes))

    def score(sample: Sample, path: Path) -> None:
        seed = read_seed(path)
        truth = _truth(sample, seed.cam.shape[1:], len(classes))
        if seed.classes.max(initial=-1) >= len(classes):
            raise _Problem(f"seeds of more than {len(classes)} classes", f"{path.name} ({seed.classes[-1] + 1})")
        sweep.add(seed, truth)

    _each(samples, folder, ".npz", score, workers)
    counts = distributed.join().sum(sweep.confusion())
    curve = Scores(counts[np.searchsorted(tried, grid)])
    best = int(np.argmax(curve.mean_iou))
    results = [Result(kind, value, Scores(counts[np.searchsorted(tried, value)])) for kind, value in chosen.items()]
    results.append(Result("oracle", float(grid[best]), Scores(curve.confusion[best])))
    return Evaluation(
        folder, list_path, tuple(s.id for s in samples), tuple(classes), tuple(results), Curve(grid, curve)
    )


def evaluate_masks(
    samples: Sequence[Sample], folder: Path, classes: Sequence[str], *, list_path: str, workers: int
) -> Evaluation:
    """Score ``folder/<id>.png`` against the samples' masks.

    Raises UserError that lists all missing and damaged files, and files of the wrong size.
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
    scores = Scores(distributed.join().sum(total))
    ids = tuple(sample.id for sample in samples)
    return Evaluation(folder, list_path, ids, tuple(classes), (Result("masks", None, scores),))


def held_out_threshold(path: Path, ids: Collection[str]) -> float:
    """Return the oracle threshold in another list's evaluation.json.

    Raises UserError if that evaluation scored any of ``ids``: the threshold would not be held out.
    """
    try:
        tree = read_json(path)
        oracles = [float(result["threshold"]) for result in tree["results"] if result["kind"] == "oracle"]
        seen = set(tree["ids"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such evaluation; `cpn-fast evaluate CONFIG --cams DIR` writes one") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not an evaluation.json of cpn-fast: {error}") from None
    if not oracles:
        raise UserError(f"{path}: it scores masks, so it has no threshold; give an evaluation of seeds")
    shared = [id_ for id_ in ids if id_ in seen]
    if shared:
        raise UserError(
            f"{path}: its threshold was chosen on {len(shared)} of the {len(ids)} images to be scored "
            f"({some(shared, 3)}): give an evaluation of other images"
        )
    return oracles[0]


def run(
    config: Config, *, cams: Path | None, masks: Path | None, list_path: Path | None, threshold_from: Path | None
) -> Evaluation:
    """Score a folder of seeds or of masks on a list (default ``data.eval_list``); print and write the scores.

    threshold_from: the evaluation.json of other images; its oracle threshold is scored here too. Raises UserError for
    results or ground truth that are missing or damaged, and if no ground truth has a pixel of any class.
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
        raise UserError(f"{source}: holds all results of a stage, not only {inner.name}; did you mean {inner}?")
    require_classes(source, config.classes)
    list_path = list_path or config.data.eval_list
    samples = load_samples(config.data, config.classes, list_path, labels=False, masks=True)
    workers = distributed.join().cores
    if cams:
        held_out = held_out_threshold(threshold_from, [sample.id for sample in samples]) if threshold_from else None
        evaluation = evaluate_cams(
            samples, cams, config.evaluate, config.classes, list_path=str(list_path), held_out=held_out, workers=workers
        )
    else:
        evaluation = evaluate_masks(samples, source, config.classes, list_path=str(list_path), workers=workers)
    absent = [
        name for name, pixels in zip(config.classes, evaluation.results[0].scores.true[1:], strict=True) if not pixels
    ]
    if len(absent) == len(config.classes):
        raise UserError(
            f"{config.data.root / config.data.masks}: no ground truth of the {len(samples)} images has a pixel of any "
            f"class ({some(absent)}), so nothing can be scored. Mask values of the classes are 1 to {len(absent)}"
        )
    if absent and distributed.join().first:
        print(f"Warning: no ground truth has a pixel of {some(absent)}; the scores leave them out", file=sys.stderr)
    folder = config.run / "evaluation" / config.list_name(list_path) / _name(source, config.run)
    if distributed.join().first:
        with owned(folder, waits=True):
            write_evaluation(folder, evaluation)
        print_evaluation(evaluation)
        print(f"Scores, curve and plots are in {folder}")
    distributed.join().wait()
    return dataclasses.replace(evaluation, path=folder / "evaluation.json")


def _name(source: Path, run: Path) -> str:
    """Return a folder's name for the scores of ``source``: its parts below ``run``, or its last parts and a digest."""
    resolved, run = source.resolve(), run.resolve()
    inside = resolved.is_relative_to(run)
    parts = resolved.relative_to(run).parts if inside else resolved.parts[-2:]
    name = "-".join(parts)
    long = len(os.fsencode(name)) > 200  # a file name has at most 255 bytes
    if inside and not long:
        return name
    # A folder outside the run may end like one inside.
    return f"{parts[-1][:40] if long else name}-{hashlib.sha256(os.fsencode(resolved)).hexdigest()[:8]}"


class _Problem(Exception):
    """An image cannot be scored: the kind of problem, and the file's name."""


def _each(
    samples: Sequence[Sample], folder: Path, suffix: str, score: Callable[[Sample, Path], None], workers: int
) -> None:
    """Score this process's share in threads (reading and inflating release the GIL); raise all problems at once."""

    def attempt(sample: Sample) -> tuple[str, str] | None:
        path = folder / f"{sample.id}{suffix}"
        if not path.exists():
            return "files missing", path.name
        try:
            score(sample, path)
            if is_of_another_image(path, sample.image):
                return "files made from an image that has changed", path.name
        except _Problem as problem:
            kind, name = problem.args
            return kind, name
        except UserError as error:
            return "files that cannot be read", str(error)
        return None

    rank = distributed.join()
    share = rank.share(samples)
    with ThreadPoolExecutor(workers) as pool:
        try:
            tried = list(track(pool.map(attempt, share), f"scoring {folder.name}", total=len(share)))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interrupt, drop the queued images
    problems: dict[str, list[str]] = defaultdict(list)
    for kind, name in filter(None, itertools.chain.from_iterable(rank.gather(tried))):
        problems[kind].append(name)
    if problems:
        lines = [f"  {len(names)} {kind}: {some(names)}" for kind, names in problems.items()]
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
