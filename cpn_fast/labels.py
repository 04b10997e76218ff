"""Image-level labels from VOC XML, psa's ``cls_labels.npy``, CSV or JSON: one bool per class.

- A folder of VOC XML files: every ``object``'s ``name`` counts, the names of its parts do not.
- ``.npy``: a pickled dict of id -> numbers (K,), 0 or 1. It is read without trusting it: nothing in it can run.
- ``.csv``: ``id,names`` with names separated by ``;`` as in ``img_7,cat;dog``. Also read: names in several columns
  or several rows, names separated by spaces where no class name has one, file names (``img_7.jpg``) for ids, and
  semicolons or tabs in the commas' place.
  Rows of images that are not asked for, such as a header, are skipped.
- ``.json``: ``{"img_7": ["cat", "dog"]}``; here too a file name may stand for its id.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import pickle
import pickletools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.parsers import expat

import numpy as np

from cpn_fast.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
MAX_PICKLE = 256 * 2**20
"""Bytes; COCO's 82,783 images x 80 classes need 30 MB."""

Names = Mapping[str, list[tuple[str, str]]]
"""id -> (class name, where it was read)."""


def read_labels(path: Path, ids: Collection[str], classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Read-only bool arrays (K,) of those ``ids`` that ``path`` has; ids that it lacks are left out.

    Raises UserError with every problem found among these ids.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected labels: a folder of VOC XML, .npy, .csv or .json")
    try:
        if path.is_dir():
            return _encode(path, _read_xml_folder(path, ids), classes)
        if path.suffix == ".npy":
            return _read_npy(path, ids, classes)
        if path.suffix == ".csv":
            return _encode(path, _read_csv(path, ids, classes), classes)
        if path.suffix == ".json":
            return _encode(path, _read_json(path, ids), classes)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable: {error}") from None
    raise UserError(f"{path}: expected a folder of VOC XML, .npy, .csv or .json, found {path.suffix or 'no suffix'}")


def _encode(path: Path, found: Names, classes: Sequence[str]) -> dict[str, np.ndarray]:
    column = {name: k for k, name in enumerate(classes)}
    labels = {}
    unknown: dict[str, list[str]] = defaultdict(list)
    for id_, names in found.items():
        label = np.zeros(len(classes), bool)
        for name, place in names:
            if name in column:
                label[column[name]] = True
            else:
                unknown[name].append(place)
        label.flags.writeable = False
        labels[id_] = label
    _raise_problems(path, (_explain_unknown(name, places, classes) for name, places in unknown.items()))
    return labels


def _explain_unknown(name: str, places: list[str], classes: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
    hint = (
        f"did you mean {near[0]}?" if near else f"classes are {', '.join(classes[:20])}{' ...' * (len(classes) > 20)}"
    )
    again = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"{places[0]}{again}: {name[:60]!r} is not a class; {hint}"


def _raise_problems(path: Path, problems: Iterable[str]) -> None:
    lines = list(problems)
    if lines:
        more = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
        listed = "\n".join(f"  {line}" for line in [*lines[:10], *more])
        raise UserError(f"{path}: {len(lines)} problem(s) in the labels\n{listed}")


# VOC XML


def _read_xml_folder(folder: Path, ids: Iterable[str]) -> Names:
    found = {}
    problems = []
    for id_ in ids:
        path = folder / f"{id_}.xml"
        try:
            found[id_] = [(name, f"{path.name} line {line}") for name, line in _object_names(path.read_bytes())]
        except FileNotFoundError:
            continue
        except (expat.ExpatError, LookupError, ValueError) as error:
            problems.append(f"{path.name}: not VOC's XML: {error}")
    _raise_problems(folder, problems)
    return found


def _object_names(xml: bytes) -> list[tuple[str, int]]:
    """Class name and line of every object."""
    parser = expat.ParserCreate()
    stack: list[str] = []
    names: list[tuple[str, int]] = []

    def start(tag: str, _: dict[str, str]) -> None:
        stack.append(tag)
        if stack == ["annotation", "object", "name"]:
            names.append(("", parser.CurrentLineNumber))

    def text(piece: str) -> None:
        if stack == ["annotation", "object", "name"]:
            names[-1] = (names[-1][0] + piece, names[-1][1])

    def refuse_entity(*_: Any) -> None:
        # Nested entities expand a small file into gigabytes.
        raise ValueError("it declares an entity")

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = text
    parser.EntityDeclHandler = refuse_entity
    parser.Parse(xml, True)
    return [(name.strip(), line) for name, line in names]


# CSV and JSON


def _read_csv(path: Path, ids: Collection[str], classes: Sequence[str]) -> Names:
    """With the first of the separators by which any id is found: spreadsheets write what their language has."""
    separated = (_read_separated(path, separator, set(ids), classes) for separator in (",", ";", "\t"))
    return next(filter(None, separated), {})


def _read_separated(path: Path, separator: str, wanted: set[str], classes: Sequence[str]) -> Names:
    spaced = any(" " in name for name in classes)
    found: dict[str, list[tuple[str, str]]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator, skipinitialspace=True)
        try:
            for key, *cells in filter(None, rows):
                id_ = _as_id(key.strip(), wanted)
                if id_ in wanted:
                    place = f"line {rows.line_num}"
                    names = (name for cell in cells for name in cell.split(";" if spaced or ";" in cell else None))
                    found.setdefault(id_, []).extend((name.strip(), place) for name in names if name.strip())
        except csv.Error as error:
            raise UserError(f"{path} line {rows.line_num}: not readable as CSV: {error}") from None
    return found


def _read_json(path: Path, ids: Collection[str]) -> Names:
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_refuse_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected an object of id -> list of class names, found a {type(tree).__name__}")
    wanted = set(ids)
    found = {}
    problems = []
    for key, names in tree.items():
        id_ = _as_id(key, wanted)
        if id_ not in wanted:
            continue
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[id_] = [(name, key) for name in names]
        else:
            problems.append(f"{key}: expected a list of class names, found {json.dumps(names):.60}")
    _raise_problems(path, problems)
    return found


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"{key} is there twice")
        tree[key] = value
    return tree


def _as_id(key: str, wanted: Collection[str]) -> str:
    name = PurePosixPath(key)
    return name.stem if key not in wanted and name.suffix in IMAGE_SUFFIXES else key


# psa's cls_labels.npy


def _read_npy(path: Path, ids: Iterable[str], classes: Sequence[str]) -> dict[str, np.ndarray]:
    if path.stat().st_size > MAX_PICKLE:
        raise UserError(
            f"{path}: {path.stat().st_size / 2**20:.0f} MB; label files of up to {MAX_PICKLE >> 20} MB are read"
        )
    try:
        table = _unpickle_dict(path.read_bytes())
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise UserError(f"{path}: not a pickled dict of id -> array as psa's cls_labels.npy: {error}") from None
    labels = {}
    problems = []
    for id_ in ids:
        if id_ not in table:
            continue
        value = table[id_].value if isinstance(table[id_], _Array) else table[id_]
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or value.shape != (len(classes),):
            found = f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
            problems.append(f"{id_}: expected an array of {len(classes)} numbers, one per class, found {found}")
        elif not np.isin(value, (0, 1)).all():
            problems.append(f"{id_}: expected only 0 and 1, found {value[~np.isin(value, (0, 1))][0]}")
        else:
            labels[id_] = value.astype(bool)
            labels[id_].flags.writeable = False
    _raise_problems(path, problems)
    return labels


def _unpickle_dict(content: bytes) -> dict[Any, Any]:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = read_header(file)
    if not dtype.hasobject:
        raise ValueError(f"it holds {dtype} numbers")
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):  # finds lengths that go beyond the end
        if opcode.name in _RESERVING and isinstance(argument, int) and argument > len(content):
            raise ValueError(f"{opcode.name} {argument} in a file of {len(content)} bytes")
    file.seek(start)
    array = _Unpickler(file).load()
    table = array.value if isinstance(array, _Array) else array
    if not isinstance(table, dict):
        raise ValueError(f"it holds a {type(table).__name__}")
    return table


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray, so that a pickle reserves no more memory than it has bytes."""

    value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, _, content = state
        self.value = content[0] if kind.dtype.hasobject else np.frombuffer(content, kind.dtype).reshape(shape)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _latin1(text: str, _: str) -> bytes:
    """Pickle protocol 2 writes bytes as a call of _codecs.encode(text, "latin1")."""
    return text.encode("latin1")


_RESERVING = ("PUT", "BINPUT", "LONG_BINPUT", "FRAME")
"""Opcodes for whose argument the unpickler reserves memory before it reads on."""
_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a label file does not need")
        return _STAND_INS[module, name]
