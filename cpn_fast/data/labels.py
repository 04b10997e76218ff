"""Image-level labels from VOC XML, psa's ``cls_labels.npy``, CSV or JSON: one bool per class.

- A folder of VOC XML files: the ``name`` of every ``object`` counts. The names of an object's parts do not.
- ``.npy``: a pickled dict of id -> numbers (K,), 0 or 1. The reader does not trust the pickle: nothing in it can run.
  It also reads irn's integer ids: 2007000032 is ``2007_000032``.
- ``.csv``: ``id,names`` with names separated by ``;`` as in ``img_7,cat;dog``. The reader also takes
  - names in several columns or several rows,
  - names separated by commas in a quoted cell, or by spaces if no class name has a space,
  - a list as Python writes it, ``"['cat', 'dog']"``,
  - semicolons or tabs instead of the commas between cells, and Excel's line ``sep=;``,
  - files of images in another column than the first, as beside the index that pandas writes,
  - other columns beside those that the header calls tags, label, class or category,
  - tables whose header names the classes, with 0 and 1, ``x`` and nothing, or ``yes`` and ``no`` below.
  Rows of images that were not asked for are skipped; so are a header and a title above it.
- ``.json``: ``{"img_7": ["cat", "dog"]}``.

An image without a class is a negative. A file's name or path may stand for its id everywhere: ``photos/img_7.jpg``,
``C:\\photos\\img_7.jpg``.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from cpn_fast.config import VOC_CLASSES
from cpn_fast.data import label_tables
from cpn_fast.data.cls_labels import load_cls_labels
from cpn_fast.data.image_ids import Ids
from cpn_fast.data.label_tables import Names
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, some

SHOWN = 10
"""Problems that an error lists. It only counts the others."""


class LabelError(UserError):
    """All problems of single labels in a source. ``labels`` holds the labels that could be read."""

    def __init__(self, path: Path, problems: Sequence[str], labels: dict[str, np.ndarray]) -> None:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = "\n".join(f"  {line}" for line in [*problems[:SHOWN], *more])
        super().__init__(f"{path}: {len(problems)} problem(s) in the labels\n{lines}")
        self.labels = labels


def read_labels(path: Path, ids: Collection[str], classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Return read-only bool arrays (K,) for those ``ids`` that ``path`` has. Other ids are left out.

    Raises LabelError with every problem of these ids, and UserError for a source that cannot be read at all.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected labels: a folder of VOC XML, .npy, .csv or .json")
    try:
        if path.is_dir():
            return _encode(path, *_read_xml_folder(path, ids), classes)
        if path.suffix.lower() == ".npy":
            return _read_npy(path, ids, classes)
        if path.suffix.lower() == ".csv":
            return _encode(path, label_tables.read_tags(path, ids, classes), [], classes)
        if path.suffix.lower() == ".json":
            return _encode(path, *_read_json(path, ids), classes)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable: {_reason(error)}") from None
    raise UserError(f"{path}: expected a folder of VOC XML, .npy, .csv or .json, found {path.suffix or 'no suffix'}")


def listed_in(path: Path, images: Collection[str]) -> list[str]:
    """Return the images that a label source names, as it writes them, each once. A header is left out.

    ``images`` are the ids of the image files; they tell irn's integers and headers from names of images. Raises
    UserError for a source that cannot be read.
    """
    try:
        if path.is_dir():
            return sorted(file.relative_to(path).with_suffix("").as_posix() for file in path.rglob("*.xml"))
        if path.suffix.lower() == ".json":
            return list(_load_json(path))
        if path.suffix.lower() == ".npy":
            match = Ids(images)
            names = [(match(key) or str(key)) if isinstance(key, int) else str(key) for key in load_cls_labels(path)]
            return list(dict.fromkeys(names))
        return label_tables.listed_in(path, images)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable: {_reason(error)}") from None


def class_names(path: Path, images: Collection[str]) -> list[str]:
    """Return the class names in a label source of some ``images``.

    They have the order of a table's columns, in other sources alphabetic order. A .npy has no names: with 20 classes
    they are VOC's. Raises UserError for other .npy files and for a source that cannot be read.
    """
    problems: list[str] = []
    try:
        if path.suffix.lower() == ".npy":
            return _voc_classes(path)
        if path.is_dir():
            tags, problems = _read_xml_folder(path, images)
        elif path.suffix.lower() == ".json":
            tags, problems = _read_json(path, images)
        else:
            return label_tables.class_names(path, images)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable: {_reason(error)}") from None
    names = sorted({name for names in tags.values() for name, _ in names})
    if problems and not names:
        raise LabelError(path, problems, {})
    return names


def _reason(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, OSError):
        return str(error)
    return f"its text is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}): save it as CSV UTF-8"


def _encode(path: Path, tags: Names, problems: Sequence[str], classes: Sequence[str]) -> dict[str, np.ndarray]:
    column = {name: k for k, name in enumerate(classes)}
    labels = {}
    unknown: dict[str, list[str]] = defaultdict(list)
    for id_, names in tags.items():
        label = np.zeros(len(classes), bool)
        for name, location in names:
            if name in column:
                label[column[name]] = True
            else:
                unknown[name].append(location)
        label.flags.writeable = False
        labels[id_] = label
    explained = [_explain_unknown(*entry, classes) for entry in itertools.islice(unknown.items(), SHOWN)]
    problems = [*problems, *explained, *itertools.islice(unknown, SHOWN, None)]
    if problems:
        raise LabelError(path, problems, labels)
    return labels


def _explain_unknown(name: str, locations: list[str], classes: Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:100], classes, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"classes are {some(classes, 20)}"
    again = f" and {len(locations) - 1} more" if len(locations) > 1 else ""
    return f"{locations[0]}{again}: {name[:60]!r} is not a class; {hint}"


# VOC XML


def _read_xml_folder(folder: Path, ids: Iterable[str]) -> tuple[Names, list[str]]:
    """Return the names of every readable file, and the problems of the other files."""
    tags = {}
    problems = []
    match = Ids(ids)
    for id_ in ids:
        paths = [folder / f"{name}.xml" for name in match.file(id_)]
        path = next((path for path in paths if path.is_file()), paths[0])
        try:
            names = _object_names(reading.read_bytes(path, reading.XML))
            tags[id_] = [(name, f"{path.name} line {line}") for name, line in names]
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(f"{path.name}: not readable: {error}")
        except (expat.ExpatError, LookupError, ValueError) as error:
            problems.append(f"{path.name}: not VOC's XML: {error}")
    return tags, problems


def _object_names(xml: bytes) -> list[tuple[str, int]]:
    """Return the class name and the line of every object."""
    parser = expat.ParserCreate()
    stack: list[str] = []
    names: list[tuple[list[str], int]] = []  # expat may deliver a name in a million pieces: join them once

    nameless = 0

    def start(tag: str, _: dict[str, str]) -> None:
        nonlocal nameless
        stack.append(tag)
        if stack[0] != "annotation":  # without its objects it would be a negative
            raise ValueError(f"it begins with <{tag[:60]}>, expected <annotation>")
        if stack == ["annotation", "object"]:
            nameless = parser.CurrentLineNumber
        if stack == ["annotation", "object", "name"]:
            names.append(([], parser.CurrentLineNumber))
            nameless = 0

    def end(_: str) -> None:
        if stack == ["annotation", "object"] and nameless:
            raise ValueError(f"the object in line {nameless} has no <name>")
        stack.pop()

    def text(piece: str) -> None:
        if stack == ["annotation", "object", "name"]:
            names[-1][0].append(piece)

    def refuse_entity(*_: Any) -> None:
        # Nested entities expand a small file into gigabytes.
        raise ValueError("it declares an entity")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.EntityDeclHandler = refuse_entity
    parser.Parse(xml, True)
    return [("".join(pieces).strip(), line) for pieces, line in names]


# JSON


def _read_json(path: Path, ids: Collection[str]) -> tuple[Names, list[str]]:
    """Return the names of every valid entry, and the problems of the other entries."""
    tree = _load_json(path)
    match = Ids(ids)
    tags = {}
    problems = []
    for key, names in tree.items():
        id_ = match(key)
        if id_ is None:
            continue
        if id_ in tags:
            problems.append(f"{key}: {id_} has tags already, under another name of its file")
        elif isinstance(names, list) and all(isinstance(name, str) for name in names):
            tags[id_] = [(name.strip(), key) for name in names]
        else:
            problems.append(f"{key}: expected a list of class names, found {json.dumps(names):.60}")
    return tags, problems


def _load_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(reading.read_text(path, reading.LABELS), object_pairs_hook=_refuse_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected an object of id -> list of class names, found a {type(tree).__name__}")
    return tree


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"the key {key} occurs twice")
        tree[key] = value
    return tree


# psa's cls_labels.npy


def _read_npy(path: Path, ids: Iterable[str], classes: Sequence[str]) -> dict[str, np.ndarray]:
    labels = {}
    problems = []
    match = Ids(ids)
    for key, value in load_cls_labels(path).items():
        id_ = match(key)
        if id_ is None:
            continue
        if id_ in labels:
            problems.append(f"{key}: {id_} has labels already, under another name")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or value.shape != (len(classes),):
            kind = f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
            problems.append(f"{id_}: expected an array of {len(classes)} numbers, one per class, found {kind}")
        elif not np.isin(value, (0, 1)).all():
            problems.append(f"{id_}: expected only 0 and 1, found {value[~np.isin(value, (0, 1))][0]}")
        else:
            labels[id_] = value.astype(bool)
            labels[id_].flags.writeable = False
    if problems:
        raise LabelError(path, problems, labels)
    return labels


def _voc_classes(path: Path) -> list[str]:
    """Return VOC's classes if the first image has as many numbers."""
    first: Any = next(iter(load_cls_labels(path).values()), None)
    if np.shape(first) != (len(VOC_CLASSES),):
        raise UserError(
            f"{path}: expected VOC's {len(VOC_CLASSES)} classes; a .npy has no names of other classes: write a CSV"
        )
    return list(VOC_CLASSES)
