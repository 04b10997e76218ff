"""Image-level labels from VOC XML, psa's ``cls_labels.npy``, CSV or JSON: one bool per class.

- A folder of VOC XML files: the ``name`` of every ``object`` counts. The names of an object's parts do not.
- ``.npy``: a pickled dict of id -> numbers (K,), 0 or 1. The reader does not trust the pickle: nothing in it can run.
  It also reads irn's integer ids: 2007000032 is ``2007_000032``.
- ``.csv``: ``id,names`` with names separated by ``;`` as in ``img_7,cat;dog``. The reader also takes
  - names in several columns or several rows,
  - names separated by commas in a quoted cell, or by spaces if no class name has a space,
  - semicolons or tabs instead of the commas between cells,
  - tables of 0 and 1 whose first row names the classes.
  Rows of images that were not asked for are skipped; so is a header.
- ``.json``: ``{"img_7": ["cat", "dog"]}``.

An image without a class is a negative. A file's name or path may stand for its id everywhere: ``photos/img_7.jpg``,
``C:\\photos\\img_7.jpg``.
"""

from __future__ import annotations

import csv
import difflib
import functools
import io
import itertools
import json
import pickle
import pickletools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from cpn_fast.config import VOC_CLASSES
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, some

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff")
"""Endings of image files in lower case. Upper case is read too."""
MAX_PICKLE = 256 * 2**20
"""Bytes; COCO's 82,783 images x 80 classes need 30 MB."""

SHOWN = 10
"""Problems that an error lists. It only counts the others."""

Names = Mapping[str, list[tuple[str, str]]]
"""id -> (class name, where it was read) for each name."""


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
            return _encode(path, _read_csv(path, ids, classes), [], classes)
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
        match = Ids(images)
        if path.suffix.lower() == ".npy":
            names = [(match(key) or str(key)) if isinstance(key, int) else str(key) for key in _load_npy(path)]
            return list(dict.fromkeys(names))
        separated = (_first_cells(path, separator) for separator in (",", ";", "\t"))
        names = max(separated, key=lambda cells: sum(match(cell) is not None for cell in cells))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable: {_reason(error)}") from None
    if len(names) > 1 and match(names[0]) is None and match(names[1]) is not None:
        names = names[1:]
    return list(dict.fromkeys(names))


def class_names(path: Path, images: Collection[str]) -> list[str]:
    """Return the class names in a label source of some ``images``.

    They have the order of a table's columns, in other sources alphabetic order. A .npy has no names: with 20 classes
    they are VOC's. Raises UserError for other .npy files and for a source that cannot be read.
    """
    if path.suffix.lower() == ".npy":
        first: Any = next(iter(_load_npy(path).values()), None)
        first = first.value if isinstance(first, _Array) else first
        if np.shape(first) != (len(VOC_CLASSES),):
            raise UserError(
                f"{path}: expected VOC's {len(VOC_CLASSES)} classes; a .npy has no names of other classes: write a CSV"
            )
        return list(VOC_CLASSES)
    problems: list[str] = []
    try:
        if path.is_dir():
            tags, problems = _read_xml_folder(path, images)
        elif path.suffix.lower() == ".json":
            tags, problems = _read_json(path, images)
        else:
            columns = _ticked_columns(path, Ids(images))
            if columns:
                return columns
            tags = _read_csv(path, images, ())
            _refuse_numbers(path, tags)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable: {_reason(error)}") from None
    names = sorted({name for names in tags.values() for name, _ in names})
    if problems and not names:
        raise LabelError(path, problems, {})
    return names


def _refuse_numbers(path: Path, tags: Names) -> None:
    """Raise UserError if negative numbers, or numbers beside words, would be classes."""
    names = {name for names in tags.values() for name, _ in names}
    numbers = sorted(filter(_NUMBER.fullmatch, names))
    if any(name.startswith("-") or len(numbers) < len(names) for name in numbers):
        raise UserError(
            f"{path}: {some(numbers)} would be classes, but look like numbers of other columns, such as corners of "
            "boxes. Keep only the columns of the photos and of their tags"
        )


def _ticked_columns(path: Path, match: Ids) -> list[str]:
    """Return the columns of a table that only 0 and 1 fill; none if the CSV is no such table.

    Raises UserError if the only such column stands beside text: it may be the class, or a remark beside tags.
    """
    for separator in (",", ";", "\t"):
        header: list[str] = []
        rows = []
        for number, (_, key, *cells) in enumerate(_csv_rows(path, separator)):
            if match(key) is not None:
                rows.append(cells)
            elif number == 0:
                header = cells
        if rows:
            columns = itertools.zip_longest(*rows, fillvalue="")
            filled = {name: cells for name, cells in zip(header, columns, strict=False) if name and any(cells)}
            ticked = [name for name, cells in filled.items() if all(cell.lower() in _TICKS for cell in cells)]
            if len(ticked) == 1 < len(filled):
                others = some([name for name in filled if name not in ticked])
                raise UserError(
                    f"{path}: column {ticked[0]} holds 0 and 1, and {others} holds text. Keep the columns of the "
                    "classes alone, or the tags alone"
                )
            return ticked
    return []


def _first_cells(path: Path, separator: str) -> list[str]:
    return [key for _, key, *_ in _csv_rows(path, separator) if key]


def _csv_rows(path: Path, separator: str) -> Iterator[tuple[str, ...]]:
    """Yield the place of each row that is not empty, as in ``line 2``, and its cells without spaces around them."""
    text = reading.read_bytes(path, reading.LABELS).decode("utf-8-sig")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        for row in filter(None, rows):
            yield f"line {rows.line_num}", *(cell.strip() for cell in row)
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: not readable as CSV: {error}") from None


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

    def start(tag: str, _: dict[str, str]) -> None:
        stack.append(tag)
        if stack == ["annotation", "object", "name"]:
            names.append(([], parser.CurrentLineNumber))

    def text(piece: str) -> None:
        if stack == ["annotation", "object", "name"]:
            names[-1][0].append(piece)

    def refuse_entity(*_: Any) -> None:
        # Nested entities expand a small file into gigabytes.
        raise ValueError("it declares an entity")

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = text
    parser.EntityDeclHandler = refuse_entity
    parser.Parse(xml, True)
    return [("".join(pieces).strip(), line) for pieces, line in names]


# CSV and JSON


def _read_csv(path: Path, ids: Collection[str], classes: Sequence[str]) -> Names:
    """Read a CSV with the first separator that yields an id. Spreadsheets use the separator of their language."""
    separated = (_read_separated(path, separator, ids, classes) for separator in (",", ";", "\t"))
    return next(filter(None, separated), {})


def _read_separated(path: Path, separator: str, ids: Collection[str], classes: Sequence[str]) -> Names:
    match = Ids(ids)
    entries: list[tuple[str, str, str, list[str]]] = []  # key, id, location, cells
    header: list[str] = []
    for number, (location, key, *cells) in enumerate(_csv_rows(path, separator)):
        if (id_ := match(key)) is not None:
            entries.append((key, id_, location, cells))
        elif number == 0:
            header = cells
    is_table = bool(entries) and _is_table(header, entries[0][3], classes)
    tags: dict[str, list[tuple[str, str]]] = {}
    keys: dict[str, str] = {}
    for key, id_, location, cells in entries:
        if keys.setdefault(id_, key) != key:
            raise UserError(f"{path} {location}: {key!r} stands for {id_}, and so does {keys[id_]!r}: keep one of them")
        if is_table:
            names = _ticked(header, cells, classes, f"{path} {location}")
        else:
            names = [name for cell in cells for name in _names(cell, classes)]
        tags.setdefault(id_, []).extend((name, location) for name in names)
    return tags


def _names(cell: str, classes: Sequence[str]) -> list[str]:
    """Return the class names in a cell of a CSV."""
    if cell in classes:
        return [cell]
    parts = re.split("[;,]", cell)
    if len(parts) == 1 and classes and not any(" " in name for name in classes):
        parts = cell.split()
    return [name for part in parts if (name := part.strip())]


_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_TICKS = {"1": True, "1.0": True, "true": True, "yes": True} | dict.fromkeys(("0", "0.0", "false", "no", ""), False)


def _is_table(header: Sequence[str], row: Sequence[str], classes: Sequence[str]) -> bool:
    """Return whether the header names classes and the row ticks them."""
    cells = [cell for name, cell in zip(header, row, strict=False) if name in classes]
    return bool(cells) and all(cell.lower() in _TICKS for cell in cells)


def _ticked(header: Sequence[str], cells: Sequence[str], classes: Sequence[str], location: str) -> list[str]:
    """Return the columns in which a row has a 1. An unknown column with other values does not count as tags."""
    names = []
    for name, cell in zip(header, cells, strict=False):
        ticked = _TICKS.get(cell.lower())
        if ticked is None and name in classes:
            raise UserError(f"{location}: expected 0 or 1 in column {name}, which the first row names, found {cell!r}")
        if ticked and name:
            names.append(name)
    return names


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
            tags[id_] = [(name, key) for name in names]
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


class Ids:
    """Find the id behind a name in a label source: the id itself, a file's name or path, or irn's integer."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.known = set(ids)

    def __call__(self, name: object) -> str | None:
        """Return the id, or None for an unknown name.

        A path stands for its longest tail that is an id. Without such a tail it stands for the only id that ends with
        this path. ``dogs/1`` is never ``cats/1``. A letter with an accent may be one character or two, as in names of
        files from macOS.
        """
        found = self._find(name)
        if found is None and isinstance(name, str) and not name.isascii():
            composed = self._composed._find(unicodedata.normalize("NFC", name))
            found = None if composed is None else self._originals[composed]
        return found

    def _find(self, name: object) -> str | None:
        if isinstance(name, (int, np.integer)) and not isinstance(name, bool):
            return str(name) if str(name) in self.known else self.numbers.get(str(name))
        if not isinstance(name, str):
            return None
        name = name.strip()
        if name in self.known:
            return name
        parts = name.replace("\\", "/").split("/")
        stem, dot, ending = parts[-1].rpartition(".")
        if dot and f".{ending.lower()}" in IMAGE_SUFFIXES:
            parts[-1] = stem
        ends = ("/".join(parts[start:]) for start in range(max(0, len(parts) - self.depth), len(parts)))
        return next((end for end in ends if end in self.known), self.ends.get("/".join(parts)))

    def file(self, id_: str) -> list[str]:
        """Return possible names of an id's file: the id, and the id without its folders if that is unambiguous."""
        name = id_.rpartition("/")[2]
        return [id_, name] if self.ends.get(name) == id_ else [id_]

    @functools.cached_property
    def _originals(self) -> dict[str, str | None]:
        """Id with composed accents -> id, or None if several ids differ only in this."""
        return _unambiguous((unicodedata.normalize("NFC", id_), id_) for id_ in self.known)

    @functools.cached_property
    def _composed(self) -> Ids:
        return Ids(self._originals)

    @functools.cached_property
    def depth(self) -> int:
        """Largest number of path parts of an id."""
        return max((id_.count("/") + 1 for id_ in self.known), default=1)

    @functools.cached_property
    def ends(self) -> dict[str, str | None]:
        """Path without its first folders -> id, or None if several ids end with this path."""
        split = ((id_.split("/"), id_) for id_ in self.known)
        return _unambiguous(("/".join(parts[start:]), id_) for parts, id_ in split for start in range(1, len(parts)))

    @functools.cached_property
    def numbers(self) -> dict[str, str | None]:
        """Digits of an id -> id, or None if several ids have these digits."""
        return _unambiguous((re.sub(r"\D", "", id_), id_) for id_ in self.known)


def _unambiguous(pairs: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    values: dict[str, str | None] = {}
    for key, value in pairs:
        values[key] = None if key in values else value
    return values


# psa's cls_labels.npy


def _read_npy(path: Path, ids: Iterable[str], classes: Sequence[str]) -> dict[str, np.ndarray]:
    table = _load_npy(path)
    labels = {}
    problems = []
    match = Ids(ids)
    for key, content in table.items():
        id_ = match(key)
        if id_ is None:
            continue
        if id_ in labels:
            problems.append(f"{key}: {id_} has labels already, under another name")
        value = content.value if isinstance(content, _Array) else content
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


def _load_npy(path: Path) -> dict[Any, Any]:
    try:
        return _unpickle_dict(reading.read_bytes(path, MAX_PICKLE))
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise UserError(f"{path}: not a pickled dict of id -> array as psa's cls_labels.npy: {error}") from None


def _unpickle_dict(content: bytes) -> dict[Any, Any]:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = read_header(file)
    if not dtype.hasobject:
        raise ValueError(f"it holds {dtype} numbers")
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):  # raises for lengths beyond the end
        if opcode.name in _RESERVING and isinstance(argument, int) and argument > len(content):
            raise ValueError(f"{opcode.name} {argument} in a file of {len(content)} bytes")
    file.seek(start)
    array = _Unpickler(file).load()
    table = array.value if isinstance(array, _Array) else array
    if not isinstance(table, dict):
        raise ValueError(f"it holds a {type(table).__name__}")
    return table


class _Dtype:
    """Stand-in for numpy.dtype."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stand-in for numpy.ndarray, so that a pickle reserves no more memory than it has bytes."""

    value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, _, content = state
        self.value = content[0] if kind.dtype.hasobject else np.frombuffer(content, kind.dtype).reshape(shape)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _latin1(text: str, _: str) -> bytes:
    """Stand-in for _codecs.encode(text, "latin1"), which pickle protocol 2 calls for bytes."""
    return text.encode("latin1")


_RESERVING = ("PUT", "BINPUT", "LONG_BINPUT", "FRAME")
"""Opcodes whose argument makes the unpickler reserve memory before it reads on."""
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
