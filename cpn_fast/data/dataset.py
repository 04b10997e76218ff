"""The data set: lists of image ids, their files, and checks that report every problem at once."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from cpn_fast.config import Data
from cpn_fast.data.images import IMAGE_SUFFIXES, UnreadableImage, opened, upright_size
from cpn_fast.data.labels import LabelError, listed_in, read_labels
from cpn_fast.data.masks import IGNORE, read_mask
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import read_json, write_json
from cpn_fast.runtime.progress import track

TABLES = (".csv", ".json", ".npy")
"""Endings, in lower case, of label sources that may serve as lists. Upper case is read too."""
VERIFIED = "verified.json"
"""The file in a run's folder that remembers the images and masks that passed ``check_files``."""
LONGEST = 4096
"""Most characters of a line. No path has more."""
_ENDINGS = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
_PATHS = re.compile(rf"(\S.*?\.(?:{_ENDINGS}))(?:\s+(\S.*\.png))?", re.IGNORECASE)


@dataclass(frozen=True)
class Sample:
    """An image with its optional mask and labels."""

    id: str
    image: Path
    mask: Path | None
    """Ground-truth palette PNG."""
    label: np.ndarray | None = field(compare=False)
    """bool (classes,), read-only."""


class DatasetError(UserError):
    """All problems of a data set: one line per kind of problem, with a count and the first few names."""


def load_samples(
    data: Data, classes: Sequence[str], list_path: Path, *, labels: bool, masks: bool | None
) -> list[Sample]:
    """Return the images of a list, in its order. A relative ``list_path`` starts at ``data.root``.

    A line is an id, or paths as in ``/JPEGImages/x.jpg /SegmentationClassAug/x.png``. Paths are absolute or start at
    the root, with slashes or backslashes. An image in ``data.images`` has its path there without the ending as its id
    (``dogs/x``). Any other image has its name as its id. A second path replaces the mask in ``data.masks``. A label
    source may serve as the list of its images.

    This function looks up files by name. It does not open them; ``check_files`` does. With ``masks=None`` masks are
    optional.

    Raises DatasetError with every problem: malformed lines, duplicates, missing files, missing labels, or no label at
    all. An image that shows no class is a negative.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    samples = _find(data, classes, list_path, labels, masks, problems)
    raise_problems(f"{data.root / list_path} lists {len(samples)} images", problems)
    return samples


def has_ground_truth(data: Data, classes: Sequence[str], list_path: Path) -> bool:
    """Return whether every image of a list has a mask to score against. Raises DatasetError as ``load_samples``."""
    samples = load_samples(data, classes, list_path, labels=False, masks=None)
    return all(sample.mask is not None for sample in samples)


def load_checked(
    data: Data, classes: Sequence[str], list_path: Path, *, workers: int, verified: Path | None = None
) -> list[Sample]:
    """Load samples with their labels and optional masks, and check all files as ``check_files`` does.

    Raises DatasetError with every problem that ``load_samples`` or ``check_files`` finds.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    samples = _find(data, classes, list_path, labels=True, masks=None, problems=problems)
    existing = [sample for sample in samples if sample.image.exists()]
    _decode(existing, workers, len(classes), verified, problems)
    raise_problems(f"{data.root / list_path} lists {len(samples)} images", problems)
    return samples


def _find(
    data: Data,
    classes: Sequence[str],
    list_path: Path,
    labels: bool,
    masks: bool | None,
    problems: dict[str, list[str]],
) -> list[Sample]:
    if not data.root.is_dir():
        raise DatasetError(
            f"data.root: {data.root} is not a folder{_from_here(data.root)}; expected the folder that holds "
            f"{data.images}. Unpack the data set there, or say where it is with --set data.root=FOLDER"
        )
    path = data.root / list_path
    is_table = path.suffix.lower() in TABLES or (path.is_dir() and next(path.rglob("*.xml"), None) is not None)
    names_in = functools.cache(_names_in)  # it is faster to list a folder once than to look for every file in it
    by_stem = functools.cache(lambda folder: _images_by_stem(names_in(folder)))
    samples: dict[str, Sample] = {}
    if is_table:
        names = listed_in(path, by_stem(data.root / data.images).keys())
        lines: Iterable[tuple[int, str]] = enumerate(names, 1)
    else:
        lines = _lines(path, data.root)
    for number, line in lines:
        entry = _parse(line, data)
        if entry is None:
            kind = "lines that are neither an id nor paths inside data.root"
            problems[kind].append(f"line {number} {line[:200]!r}")
            continue
        id_, image, mask = entry
        if id_ in samples:
            if is_table:  # it may have a row for each tag
                continue
            problems["ids listed more than once"].append(f"line {number} {id_}")
            continue
        if image is None:
            stem = data.root / data.images / id_
            matches = by_stem(stem.parent).get(stem.name, [])
            image = stem.with_name(matches[0] if matches else f"{stem.name}.jpg")
            if len(matches) > 1:
                problems["ids with more than one image"].append(f"{id_} ({', '.join(matches)})")
        if image.name not in names_in(image.parent):
            problems[f"images missing in {image.parent}"].append(image.name)
        has_mask = masks is not False and mask.name in names_in(mask.parent)
        if masks and not has_mask:
            problems[f"masks missing in {mask.parent}"].append(mask.name)
        samples[id_] = Sample(id_, image, mask if has_mask else None, None)
    if not samples:
        problems["list without any id"].append(str(path))
    if labels:
        samples = _with_labels(samples, data.root / data.labels, classes, problems)
    return list(samples.values())


def cannot_be_learned(samples: Sequence[Sample], classes: Sequence[str]) -> list[str]:
    """Return sentences on the classes that no image or every image shows, according to the samples' labels."""
    labels = np.stack([sample.label for sample in samples if sample.label is not None])
    counts = labels.sum(0).tolist()
    never = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    always = [name for name, count in zip(classes, counts, strict=True) if count == len(labels)]
    sentences = []
    if never:
        sentences.append(f"no image shows {some(never)}: add images that do, or drop the class")
    if always:
        sentences.append(f"every image shows {some(always)}, so there is no negative: add images without it")
    return sentences


def cannot_be_scored(samples: Sequence[Sample], classes: Sequence[str], *, workers: int) -> list[str]:
    """Return a sentence on the classes that have no pixel in any ground truth. Raises UserError as ``read_mask``."""
    paths = [sample.mask for sample in samples if sample.mask is not None]
    shown = np.zeros(256, bool)
    with ThreadPoolExecutor(workers) as pool:
        for values in pool.map(lambda path: np.unique(read_mask(path)), paths):
            shown[values] = True
    never = [name for value, name in enumerate(classes, 1) if not shown[value]]
    if not paths or not never:
        return []
    which = "any class" if len(never) == len(classes) else some(never)
    return [f"no ground truth of {len(paths)} images has a pixel of {which}: their scores will be empty"]


def check_files(samples: Sequence[Sample], *, workers: int, classes: int, verified: Path | None = None) -> None:
    """Decode every image and mask of ``samples`` in ``workers`` threads.

    A mask must hold only the values 0 to ``classes`` and IGNORE. It must be as large as its image after EXIF rotation.
    ``verified`` names a file that remembers the samples that passed. A sample is skipped while its files keep their
    size and time.

    Raises DatasetError with every problem.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    _decode(samples, workers, classes, verified, problems)
    raise_problems(f"{len(samples)} images checked", problems)


def _decode(
    samples: Sequence[Sample],
    workers: int,
    classes: int,
    verified: Path | None,
    problems: dict[str, list[str]],
) -> None:
    known = _read_verified(verified)
    todo = [(sample, mark) for sample in samples if (mark := _fingerprint(sample, classes)) not in known]
    passed = set()
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda pair: _check(pair[0], classes), todo)
        try:
            progress = track(results, "checking images", total=len(todo))
            for (_, mark), faults in zip(todo, progress, strict=True):
                if not faults:
                    passed.add(mark)
                for kind, name in faults:
                    problems[kind].append(name)
        finally:
            pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all samples
            if verified and passed:
                write_json(verified, sorted(known | passed), indent=0)


# Lists


def line_of(id_: str, image: Path) -> str:
    """Return a list's line for an image: its id, or its path from the root if the id looks like a path.

    Raises UserError for a name that a line cannot hold.
    """
    is_text = id_ == id_.encode(errors="replace").decode()
    if not is_text or id_.splitlines() != [id_] or id_ != id_.strip() or "\\" in id_:
        raise UserError(
            f"{str(image)!r}: a list holds UTF-8 names without a line break, a backslash, or a space at an end: rename "
            "the image"
        )
    return image.as_posix() if _PATHS.fullmatch(id_) else id_


def _from_here(path: Path) -> str:
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def _lines(path: Path, root: Path) -> Iterable[tuple[int, str]]:
    try:
        text = reading.read_text(path, reading.LIST)
    except FileNotFoundError:
        files = {file for folder in (path.parent, root / "ImageSets/Segmentation") for file in folder.glob("*.txt")}
        lists = sorted(str(file.relative_to(root) if file.is_relative_to(root) else file) for file in files)
        near = difflib.get_close_matches(path.stem, [Path(name).stem for name in lists], n=1)
        hint = "".join(f"Did you mean {name}? " for name in lists if [Path(name).stem] == near)
        raise DatasetError(f"{path}: no such list. {hint}Lists in {root}: {', '.join(lists) or 'none'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: not readable as a list of images, which is UTF-8 text: {error}") from None
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _parse(line: str, data: Data) -> tuple[str, Path | None, Path] | None:
    """Return id, image (None: look it up by the id) and mask, or None if the line has no id and no path in the root."""
    if "\0" in line or len(line) > LONGEST:
        return None
    line = line.replace("\\", "/")
    paths = _PATHS.fullmatch(line)
    if paths is None:
        id_ = PurePosixPath(line)
        plain = str(id_) == line and not id_.is_absolute() and ".." not in id_.parts
        return (line, None, data.root / data.masks / f"{line}.png") if plain else None
    image, mask = (_from_root(part or "", data.root) for part in paths.groups())
    if image is None or mask is None:
        return None
    images = PurePosixPath(data.images.as_posix())
    if len(image.parts) == 1:
        image = images / image
    id_ = (image.relative_to(images) if image.is_relative_to(images) else PurePosixPath(image.name)).with_suffix("")
    return str(id_), data.root / image, data.root / (mask if mask.name else data.masks / f"{id_}.png")


def _from_root(path: str, root: Path) -> PurePosixPath | None:
    """Return a path of a list relative to the root, or None if it leads outside (another drive or folder)."""
    if re.match("[A-Za-z]:", path) or (path.startswith("/") and not _inside(path, root) and os.path.exists(path)):  # noqa: PTH110 (returns False for a name that is too long)
        return None
    for start in (root.absolute(), root.resolve()):
        if PurePosixPath(path).is_relative_to(start.as_posix()):
            path = str(PurePosixPath(path).relative_to(start.as_posix()))
    plain = PurePosixPath(path.lstrip("/"))
    return None if ".." in plain.parts else plain


def _inside(path: str, root: Path) -> bool:
    return any(PurePosixPath(path).is_relative_to(start.as_posix()) for start in (root.absolute(), root.resolve()))


def _images_by_stem(names: frozenset[str]) -> dict[str, list[str]]:
    """Return name without its ending -> the image files of that name."""
    images: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        stem, dot, ending = name.rpartition(".")
        if dot and f".{ending.lower()}" in IMAGE_SUFFIXES:
            images[stem].append(name)
    return images


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))  # noqa: PTH208 (names, not 10,000 Path objects)
    except PermissionError:
        raise DatasetError(f"{folder}: permission denied; it must be readable") from None
    except OSError:
        return frozenset()


def _with_labels(
    samples: dict[str, Sample], path: Path, classes: Sequence[str], problems: dict[str, list[str]]
) -> dict[str, Sample]:
    try:
        labels = read_labels(path, samples.keys(), classes)
    except LabelError as error:
        problems["label source with problems"].append(str(error))
        labels = error.labels
    except UserError as error:
        problems["label source that cannot be used"].append(str(error))
        return samples
    problems[f"ids without labels in {path}"] += [id_ for id_ in samples if id_ not in labels]
    if labels and not any(label.any() for label in labels.values()):
        problems[f"label source in which no image shows any of the {len(classes)} classes"].append(str(path))
    return {id_: Sample(id_, sample.image, sample.mask, labels.get(id_)) for id_, sample in samples.items()}


def raise_problems(subject: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise DatasetError if there are ``problems``: kind of problem -> names."""
    lines = [f"  {len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names]
    if lines:
        raise DatasetError("\n".join([f"{subject}; found", *lines]))


# Contents


def _check(sample: Sample, classes: int) -> list[tuple[str, str]]:
    """Return (kind of problem, name) for every problem of one image and its mask."""
    try:
        with opened(sample.image) as image:
            size = upright_size(image)
            image.draft("RGB", (1, 1))  # reads every byte of a JPEG, but decodes at an eighth of its resolution
            image.load()
    except UnreadableImage as error:
        return [("images that cannot be decoded", f"{sample.image} ({error.reason})")]
    if sample.mask is None:
        return []
    try:
        mask = read_mask(sample.mask)
    except UserError as error:
        return [("masks that cannot be used", str(error))]
    faults = []
    if mask.shape != size:
        sizes = "{}x{}, image {}x{}".format(*mask.shape[::-1], *size[::-1])
        faults.append(("masks of another size than their image", f"{sample.mask} ({sizes})"))
    counts = np.bincount(mask.ravel(), minlength=256)
    wrong = [str(value) for value in range(classes + 1, IGNORE) if counts[value]]
    if wrong:
        kind = f"masks with values other than 0 to {classes} and {IGNORE}"
        faults.append((kind, f"{sample.mask} ({', '.join(wrong[:5])})"))
    return faults


def _fingerprint(sample: Sample, classes: int) -> str:
    parts = [str(classes)]
    for path in filter(None, (sample.image, sample.mask)):
        try:
            stat = path.stat()
            parts += [str(path.absolute()), str(stat.st_size), str(stat.st_mtime_ns)]
        except OSError:
            parts += [str(path.absolute()), "unreadable"]
    return " ".join(parts)


def _read_verified(path: Path | None) -> set[str]:
    try:
        return set(read_json(path)) if path else set()
    except (OSError, ValueError, TypeError):
        return set()  # then every file is checked again


def tags(sample: Sample) -> np.ndarray:
    """Return the labels of a sample, bool (classes,). It must have been loaded with them."""
    assert sample.label is not None
    return sample.label
