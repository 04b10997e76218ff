"""Agreement of a run's results with the tags, photo by photo, for lists without ground truth.

Outlines cannot be judged without masks. Classes can, because the network does not see the tags when it names classes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpn_fast.config import Config
from cpn_fast.data.dataset import Sample, load_samples
from cpn_fast.data.masks import is_of_another_image, read_mask
from cpn_fast.data.seeds import seed_probabilities
from cpn_fast.models.weights import FINAL, weights_of
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import MADE_BY, read_note
from cpn_fast.runtime.progress import track
from cpn_fast.stages.results import LISTED

SURE = 0.5
"""The network finds a class if its probability is at least this."""
LEAST = 0.001
"""The segmenter finds a class if it has at least this share of a photo's pixels."""


@dataclass(frozen=True)
class Photo:
    """A photo of a list, and how well its result agrees with its tags."""

    sample: Sample
    agreement: float | None
    """From 0 to 1; None where there is nothing to compare."""
    doubt: str
    """The largest disagreement, in words."""
    probabilities: np.ndarray | None = None
    """float32 (classes,). None for masks of the segmenter, and for seeds of earlier versions."""


class ClassCount(NamedTuple):
    """Numbers of photos of a class."""

    name: str
    tagged: int
    found: int
    """Tagged and found."""
    missed: int
    """Tagged and not found."""
    besides: int
    """Found and not tagged."""


@dataclass(frozen=True)
class Found:
    """Results of one list. The photos that agree best with their tags are first."""

    kind: str
    """``cams`` or ``segment``: the folder of the run that holds the results."""
    listed: Path
    """The list."""
    folder: Path
    photos: list[Photo]
    classes: list[ClassCount]
    """Empty without tags."""
    outdated: bool
    """Whether the run now has other weights than made the results."""


def all_found(folder: Path, config: Config, digests: Mapping[str, str]) -> list[Found]:
    """Return the results of ``cam`` and ``segment`` for each list in a run's folder. ``digests``: ``weights_digests``.

    A warning on stderr names each list that can no longer be read. Raises UserError for damaged seeds and masks.
    """
    results = []
    for result_folder in sorted([*folder.glob("cams/*"), *folder.glob("segment/*")]):
        list_path = _list(result_folder, config)
        if list_path is None or not any((result_folder / part).is_dir() for part in ("seeds", "masks")):
            continue
        try:
            samples = listed(config, list_path, masks=None)
        except UserError as error:
            print(f"Warning: the report leaves out {result_folder}: {error}", file=sys.stderr)
            continue
        kind = result_folder.parent.name
        photos, counts = (_of_seeds if kind == "cams" else _of_masks)(result_folder, samples, config)
        if photos:
            outdated = has_other_weights(result_folder, digests)
            results.append(Found(kind, list_path, result_folder, photos, counts, outdated))
    return results


def weights_digests(folder: Path, config: Config) -> dict[str, str]:
    """Return the SHA-256 of a run's weights that make seeds (``cams``), and of those that make masks (``segment``)."""
    weights = {"cams": weights_of(folder, config), "segment": folder / "segment/deeplab" / FINAL}
    return {kind: reading.sha256(path, reading.WEIGHTS) for kind, path in weights.items() if path.exists()}


def has_other_weights(results: Path, digests: Mapping[str, str]) -> bool:
    """Return whether a folder ``cams/LIST`` or ``segment/LIST`` was made with other weights than ``digests`` has."""
    kind, note = results.parent.name, read_note(results / MADE_BY)
    return isinstance(note, dict) and kind in digests and note.get("weights_sha256") != digests[kind]


def _list(folder: Path, config: Config) -> Path | None:
    """Return the list of a folder's results. Earlier versions did not write it down."""
    note = read_note(folder / LISTED)
    if isinstance(note, dict) and isinstance(note.get("list"), str):
        return Path(note["list"])
    lists = (config.data.train_list, config.data.eval_list, config.segment.eval_list)
    return next((path for path in lists if config.list_name(path) == folder.name), None)


def listed(config: Config, list_path: Path, *, masks: bool | None) -> list[Sample]:
    """Return the samples of a list, with tags if it has any: the segmenter's images need none.

    ``masks`` is as for ``load_samples``.
    """
    try:
        return load_samples(config.data, config.classes, list_path, labels=True, masks=masks)
    except UserError:
        return load_samples(config.data, config.classes, list_path, labels=False, masks=masks)


def _of_seeds(folder: Path, samples: list[Sample], config: Config) -> tuple[list[Photo], list[ClassCount]]:
    """Return the photos and class counts of seeds. A photo's agreement is the one of its worst class."""
    pairs = [(sample, folder / "seeds" / f"{sample.id}.npz") for sample in samples]
    results = of_these_images([(sample, path) for sample, path in pairs if path.exists()])
    with ThreadPoolExecutor() as pool:
        all_probabilities = list(pool.map(lambda result: seed_probabilities(result[1]), results))
    photos, compared = [], []
    for (sample, _), probabilities in zip(results, all_probabilities, strict=True):
        if probabilities is None or sample.label is None or len(probabilities) != len(config.classes):
            photos.append(Photo(sample, None, "", probabilities))
            continue
        agreements = np.where(sample.label, probabilities, 1 - probabilities)
        worst = int(agreements.argmin())
        tagged = "is a tag" if sample.label[worst] else "is not a tag"
        doubt = f"{config.classes[worst]} {tagged}; the network gives it {probabilities[worst]:.0%}"
        photos.append(Photo(sample, float(agreements[worst]), doubt, probabilities))
        compared.append((sample.label, probabilities >= SURE))
    return _ordered(photos), _counts(compared, config)


def _of_masks(folder: Path, samples: list[Sample], config: Config) -> tuple[list[Photo], list[ClassCount]]:
    """Return the photos and class counts of masks. Agreement: intersection over union of the tags and found classes."""
    results = of_these_images([(sample, path) for sample in samples if (path := mask_path(folder, sample)).exists()])
    with ThreadPoolExecutor() as pool:
        areas = pool.map(lambda result: _areas(result[1], config), results)
        all_shares = list(track(areas, folder.name, total=len(results)))
    photos, compared = [], []
    for (sample, _), shares in zip(results, all_shares, strict=True):
        if sample.label is None:
            photos.append(Photo(sample, None, ""))
            continue
        present = shares >= LEAST
        either = sample.label | present
        agreement = float((sample.label & present).sum() / either.sum()) if either.any() else 1.0
        missed = [f"{name} is a tag and not found" for name in _names(sample.label & ~present, config)]
        besides = [f"{name} is found and not a tag" for name in _names(present & ~sample.label, config)]
        photos.append(Photo(sample, agreement, ", ".join([*missed, *besides])))
        compared.append((sample.label, present))
    return _ordered(photos), _counts(compared, config)


def of_these_images(results: list[tuple[Sample, Path]]) -> list[tuple[Sample, Path]]:
    """Return the results whose image has not changed since. A warning on stderr names the others."""
    outdated = [path for sample, path in results if is_of_another_image(path, sample.image)]
    if outdated:
        names = some([path.name for path in outdated], 3)
        print(
            f"Warning: the report leaves out {len(outdated)} files of {outdated[0].parent} ({names}): their images "
            "have changed since. The command that wrote the files makes them anew",
            file=sys.stderr,
        )
    left_out = set(outdated)
    return [(sample, path) for sample, path in results if path not in left_out]


def mask_path(folder: Path, sample: Sample) -> Path:
    """Return the path of the segmenter's mask of a photo, after the CRF if there is one."""
    refined = folder / "crf" / f"{sample.id}.png"
    return refined if refined.exists() else folder / "masks" / f"{sample.id}.png"


def _areas(path: Path, config: Config) -> np.ndarray:
    """Return the share of a mask's pixels of each class, float64 (classes,)."""
    mask = read_mask(path)
    return np.bincount(mask.ravel(), minlength=256)[1 : 1 + len(config.classes)] / mask.size


def _names(present: np.ndarray, config: Config) -> list[str]:
    return [name for name, is_present in zip(config.classes, present, strict=True) if is_present]


def _ordered(photos: list[Photo]) -> list[Photo]:
    """Sort photos: the best first, photos without a comparison last, equals in the list's order."""
    return sorted(photos, key=lambda photo: 1.0 if photo.agreement is None else -photo.agreement)


def _counts(compared: list[tuple[np.ndarray, np.ndarray]], config: Config) -> list[ClassCount]:
    """Count photos by class, from the tags and the found classes of each photo."""
    if not compared:
        return []
    tags, found = (np.stack(arrays) for arrays in zip(*compared, strict=True))
    sums = [counts.sum(0).tolist() for counts in (tags, tags & found, tags & ~found, ~tags & found)]
    return [ClassCount(*row) for row in zip(config.classes, *sums, strict=True)]
