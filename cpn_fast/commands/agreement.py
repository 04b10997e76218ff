"""What a run found in photos without ground truth: how well its results agree with the tags, photo by photo.

Outlines cannot be judged without masks. Classes can: the network is not shown the tags when it names them.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpn_fast.config import Config
from cpn_fast.data.dataset import Sample, load_samples
from cpn_fast.data.masks import is_of_another_image, read_mask
from cpn_fast.data.seeds import seed_probabilities
from cpn_fast.models.weights import FINAL, chosen
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import read_note
from cpn_fast.runtime.progress import track
from cpn_fast.stages.cam import LISTED

SURE = 0.5
"""The network finds a class whose probability is at least this."""
LEAST = 0.001
"""The segmenter finds a class that has at least this share of a photo's pixels."""


@dataclass(frozen=True)
class Photo:
    """A photo of a list and how well its result agrees with its tags."""

    sample: Sample
    agreement: float | None
    """From 0 to 1; None where there is nothing to compare."""
    doubt: str
    """What disagrees most, in words."""
    probabilities: np.ndarray | None = None
    """float32 (classes,), of seeds."""


class ClassCount(NamedTuple):
    """Numbers of photos of a class."""

    name: str
    tagged: int
    found: int
    """Among the tagged."""
    missed: int
    besides: int
    """Found and not tagged."""


@dataclass(frozen=True)
class Found:
    """Results of one list, the photos that agree best with their tags first."""

    kind: str
    """``cams`` or ``segment``, the folder in the run's."""
    listed: Path
    folder: Path
    photos: list[Photo]
    classes: list[ClassCount]
    """Empty without tags."""
    outdated: bool
    """Made of other weights than the run has now."""


def all_found(folder: Path, config: Config) -> list[Found]:
    """What ``cam`` and ``segment`` made of each list in a run's folder, for lists that can still be read.

    A list that cannot is named on stderr. Raises UserError for damaged seeds and masks.
    """
    weights = {"cams": chosen(folder, config), "segment": folder / "segment/deeplab" / FINAL}
    now = {kind: reading.sha256(path, reading.WEIGHTS) for kind, path in weights.items() if path.exists()}
    results = []
    for place in sorted([*folder.glob("cams/*"), *folder.glob("segment/*")]):
        list_path = _list(place, config)
        if list_path is None or not any((place / part).is_dir() for part in ("seeds", "masks")):
            continue
        try:
            samples = listed(config, list_path, masks=None)
        except UserError as error:
            print(f"Warning: the report leaves out {place}: {error}", file=sys.stderr)
            continue
        kind = place.parent.name
        photos, counts = (_of_seeds if kind == "cams" else _of_masks)(place, samples, config)
        note = read_note(place / "made_by.json")
        outdated = isinstance(note, dict) and kind in now and note.get("weights_sha256") != now[kind]
        if photos:
            results.append(Found(kind, list_path, place, photos, counts, outdated))
    return results


def _list(place: Path, config: Config) -> Path | None:
    """Of which list a folder's results are; earlier versions did not write it down."""
    note = read_note(place / LISTED)
    if isinstance(note, dict) and isinstance(note.get("list"), str):
        return Path(note["list"])
    lists = (config.data.train_list, config.data.eval_list, config.segment.eval_list)
    return next((path for path in lists if config.list_name(path) == place.name), None)


def listed(config: Config, list_path: Path, *, masks: bool | None) -> list[Sample]:
    """With tags if there are any: the segmenter's images need none. ``masks`` as for ``load_samples``."""
    try:
        return load_samples(config.data, config.classes, list_path, labels=True, masks=masks)
    except UserError:
        return load_samples(config.data, config.classes, list_path, labels=False, masks=masks)


def _of_seeds(place: Path, samples: list[Sample], config: Config) -> tuple[list[Photo], list[ClassCount]]:
    paths = [(sample, place / "seeds" / f"{sample.id}.npz") for sample in samples]
    made = [sample for sample, _ in of_these_images([(sample, path) for sample, path in paths if path.exists()])]
    with ThreadPoolExecutor() as pool:
        probabilities = list(pool.map(lambda sample: seed_probabilities(place / "seeds" / f"{sample.id}.npz"), made))
    photos, named = [], []
    for sample, found in zip(made, probabilities, strict=True):
        if found is None or sample.label is None or len(found) != len(config.classes):
            photos.append(Photo(sample, None, "", found))
            continue
        agreeing = np.where(sample.label, found, 1 - found)
        worst = int(agreeing.argmin())
        said = "is a tag" if sample.label[worst] else "is no tag"
        doubt = f"{config.classes[worst]} {said}; the network gives it {found[worst]:.0%}"
        photos.append(Photo(sample, float(agreeing[worst]), doubt, found))
        named.append((sample.label, found >= SURE))
    return _ordered(photos), _counts(named, config)


def _of_masks(place: Path, samples: list[Sample], config: Config) -> tuple[list[Photo], list[ClassCount]]:
    made = of_these_images([(sample, path) for sample in samples if (path := mask_path(place, sample)).exists()])
    with ThreadPoolExecutor() as pool:
        areas = list(track(pool.map(lambda pair: _areas(pair[1], config), made), place.name, total=len(made)))
    photos, named = [], []
    for (sample, _), shares in zip(made, areas, strict=True):
        if sample.label is None:
            photos.append(Photo(sample, None, ""))
            continue
        there = shares >= LEAST
        either = sample.label | there
        agreement = float((sample.label & there).sum() / either.sum()) if either.any() else 1.0
        missed = [f"{name} is a tag and not found" for name in _names(sample.label & ~there, config)]
        besides = [f"{name} is found and no tag" for name in _names(there & ~sample.label, config)]
        photos.append(Photo(sample, agreement, ", ".join([*missed, *besides])))
        named.append((sample.label, there))
    return _ordered(photos), _counts(named, config)


def of_these_images(results: list[tuple[Sample, Path]]) -> list[tuple[Sample, Path]]:
    """Those of images with their results that are of the images that are there now; others are named on stderr."""
    old = [path for sample, path in results if is_of_another_image(path, sample.image)]
    if old:
        few = some([path.name for path in old], 3)
        print(
            f"Warning: the report leaves out {len(old)} files of {old[0].parent} ({few}): they are of other images "
            "than are there now. The command that wrote them makes them anew",
            file=sys.stderr,
        )
    left_out = set(old)
    return [(sample, path) for sample, path in results if path not in left_out]


def mask_path(place: Path, sample: Sample) -> Path:
    """The segmenter's mask of a photo, after the CRF if there is one."""
    refined = place / "crf" / f"{sample.id}.png"
    return refined if refined.exists() else place / "masks" / f"{sample.id}.png"


def _areas(path: Path, config: Config) -> np.ndarray:
    """Share of a mask's pixels of each class, float64 (classes,)."""
    mask = read_mask(path)
    return np.bincount(mask.ravel(), minlength=256)[1 : 1 + len(config.classes)] / mask.size


def _names(chosen: np.ndarray, config: Config) -> list[str]:
    return [name for name, there in zip(config.classes, chosen, strict=True) if there]


def _ordered(photos: list[Photo]) -> list[Photo]:
    """Best first; those that cannot be compared last; equals in the list's order."""
    return sorted(photos, key=lambda photo: 1.0 if photo.agreement is None else -photo.agreement)


def _counts(named: list[tuple[np.ndarray, np.ndarray]], config: Config) -> list[ClassCount]:
    if not named:
        return []
    tags, there = (np.stack(own) for own in zip(*named, strict=True))
    sums = [counts.sum(0).tolist() for counts in (tags, tags & there, tags & ~there, ~tags & there)]
    return [ClassCount(*row) for row in zip(config.classes, *sums, strict=True)]
