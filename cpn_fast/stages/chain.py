"""``cpn-fast run``: all stages in order. Each one keeps finished work and continues interrupted work."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from cpn_fast.config import PACKAGE, TIMM_WEIGHTS, Config
from cpn_fast.data.dataset import has_ground_truth, load_samples
from cpn_fast.models.weights import FINAL
from cpn_fast.pipelines.shards import not_as_packed, open_shards
from cpn_fast.runtime import distributed, reading, terminal
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.owner import owned
from cpn_fast.stages import cam, evaluate, refine, segment, train
from cpn_fast.training import hook
from cpn_fast.training.batch_size import require_gpu


class Stage(NamedTuple):
    """A stage's results and their score."""

    name: str
    list_path: Path
    miou: float | None
    """From 0 to 1; None without ground truth."""


def run(config: Config) -> list[Stage]:
    """Train, make seeds, refine them and train a segmenter; score what has ground truth, and print and return a table.

    Seeds are scored on ``data.eval_list``, the segmenter on ``segment.eval_list``. Pseudo-masks are scored on
    ``data.eval_list`` if all its images are in ``data.train_list``.
    """
    rank = distributed.join()
    check(config, rank.world)
    with owned(config.run, rank):  # for all stages: no other start may come between two of them
        return _run(config)


def _run(config: Config) -> list[Stage]:
    lists = config.data
    weights = train.run(config)
    seeds = cam.run(config, weights) / "seeds"
    stages = [Stage("seeds, oracle threshold", lists.eval_list, score(config, lists.eval_list, cams=seeds))]

    if lists.train_list != lists.eval_list:
        cam.run(config, weights, lists.train_list)
    masks = refine.run(config)
    if _ids(config, lists.eval_list) <= _ids(config, lists.train_list):
        stages.append(Stage("pseudo-masks", lists.eval_list, score(config, lists.eval_list, masks=masks)))

    weights = segment.run(config, masks)
    folder, val = segment.segment(config, weights), config.segment.eval_list
    stages.append(Stage("segmenter", val, score(config, val, masks=folder / "masks")))
    if config.segment.crf is not None:
        stages.append(Stage("segmenter and CRF", val, score(config, val, masks=folder / "crf")))

    if distributed.join().first:
        table = Table("result", "list", "mIoU", title=config.name)
        for name, list_path, miou in stages:
            table.add_row(name, list_path.name, "no ground truth" if miou is None else f"{miou:.1%}")
        terminal.console().print(table)
    return stages


def check(config: Config, world: int) -> None:
    """Check what every stage needs, before the first one takes hours. Raises UserError that lists all problems."""
    lists, problems = config.data, []
    images: dict[str, int] = {}
    for key, list_path, labels in (
        ("data.train_list", lists.train_list, True),
        ("data.eval_list", lists.eval_list, True),
        ("segment.eval_list", config.segment.eval_list, False),
    ):
        try:
            samples = load_samples(lists, config.classes, list_path, labels=labels, masks=False)
            images[key] = len(samples)
            if key == "data.train_list" and lists.shards is not None:
                difference = not_as_packed(open_shards(lists.root / lists.shards, config.classes), samples)
                problems += [difference] if difference else []
        except UserError as error:
            problems.append(f"{key}: {error}")
    for section, training in (
        ("train", config),
        ("affinity.train", refine.affinity_config(config)),
        ("segment.train", segment.deeplab_config(config)),
    ):
        try:
            require_gpu(training, section)
            train.check_batch(training.train, world, images.get("data.train_list"), section)
        except UserError as error:
            problems.append(str(error))
    weights, run = config.model.weights, config.run
    trained = all((run / part / FINAL).is_file() for part in (".", "refine/affinity", "segment/deeplab"))
    is_file = weights not in (None, TIMM_WEIGHTS) and not str(weights).startswith(PACKAGE)
    if not trained and is_file:
        assert weights is not None
        try:
            reading.require_regular(weights, reading.WEIGHTS)
        except OSError as error:
            reason = f"{weights}: {error.strerror}"
            problems.append(f"model.weights: {reason}; AffinityNet and the segmenter start from this file too")
    if config.hook is not None and distributed.join().first:
        try:
            hook.load(config.hook)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def score(config: Config, list_path: Path, *, cams: Path | None = None, masks: Path | None = None) -> float | None:
    """Return the mIoU of seeds at their best threshold or of masks; None if an image has no ground truth."""
    if not has_ground_truth(config.data, config.classes, list_path):
        return None
    evaluation = evaluate.run(config, cams=cams, masks=masks, list_path=list_path, threshold_from=None)
    return float(evaluation.results[-1].scores.mean_iou)


def _ids(config: Config, list_path: Path) -> set[str]:
    return {sample.id for sample in load_samples(config.data, config.classes, list_path, labels=False, masks=False)}
