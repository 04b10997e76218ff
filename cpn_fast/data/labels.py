"""Image-level labels from VOC XML, psa's ``cls_labels.npy``, CSV or JSON: one bool per class.

- A folder of VOC XML files: the ``name`` of every ``object`` counts. The names of an object's parts do not.
- ``.npy``: a pickled dict of id -> numbers (K,), 0 or 1. The reader does not trust the pickle: nothing in it can run.
  It also reads irn's integer ids: 2007000032 is ``2007_000032``.
- ``.csv``: ``id,names`` with names separated by ``;`` as in ``img_7,cat;dog``. The reader also takes
  - names in several columns or several rows,
  - names separated by commas in a quoted cell, or by spaces if no class name has a space,
  - semicolons or tabs instead of the commas between cells, and Excel's line ``sep=;``,
  - tables whose header names the classes, with 0 and 1, ``x`` and nothing, or ``yes`` and ``no`` below.
  Rows of images that were not asked for are skipped; so are a header and a title above it.
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
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
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
            return _encode(path, _read_csv(path, _rows(path, Ids(ids)), classes), [], classes)
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
        names = [row.key for row in _rows(path, match) if row.key]
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
            rows = _rows(path, Ids(images))
            columns = _ticked_columns(path, rows)
            if columns:
                return columns
            tags = _read_csv(path, rows, ())
            _refuse_ticks(path, tags)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable: {_reason(error)}") from None
    names = sorted({name for names in tags.values() for name, _ in names})
    if problems and not names:
        raise LabelError(path, problems, {})
    return names


def _refuse_ticks(path: Path, tags: Names) -> None:
    """Raise UserError if numbers, or words such as yes and no, would be classes."""
    names = {name for names in tags.values() for name, _ in names}
    wrong = sorted(filter(_NUMBER.fullmatch, names))
    if len(names) > 1 and all(name.lower() in _TICKS for name in names) and not all(_TICKS[x.lower()] for x in names):
        wrong = sorted(names)
    if wrong:
        raise UserError(
            f"{path}: {some(wrong)} would be classes, but look like numbers or ticks. Expected names, as in "
            "`photo.jpg,dog;cat`, or a table of only 0 and 1 whose header names the classes, as in `photo,dog,cat`. "
            "Remove other columns, such as corners of boxes. A class that is a number needs a letter, as in n7"
        )


def _ticked_columns(path: Path, rows: Sequence[_Row]) -> list[str]:
    """Return the columns of a table that ticks such as 0 and 1 fill; none if the CSV is no such table.

    Raises UserError if a column is mostly ticks, or if the only column of ticks stands beside text: it may be the
    class, or a remark beside tags.
    """
    header = _header(rows)
    if header is None or all(not name or (_NUMBER.fullmatch(name) and name in _TICKS) for name in header.cells):
        return []  # a row of 0 and 1 is that of an image
    cells: dict[str, list[tuple[int, str]]] = {name: [] for name in header.cells if name}
    for row in rows:
        for name, cell in zip(header.cells, row.cells, strict=False):
            if row.id is not None and name and cell:
                cells[name].append((row.line, cell))
    filled = {name: {cell.lower() for _, cell in column} for name, column in cells.items() if column}
    ticked = _all_ticks(filled, alone=len(cells) == 1)
    words = set().union(*(filled[name] for name in ticked))
    for name in filled if ticked else ():
        wrong = [(line, cell) for line, cell in cells[name] if cell.lower() not in words]
        if 0 < len(wrong) < len(cells[name]) / 2:
            line, cell = wrong[0]
            raise UserError(
                f"{path} line {line}: expected {' or '.join(sorted(words))} in column {name}, as in most of its rows, "
                f"found {cell[:60]!r}"
            )
    if len(ticked) == 1 < len(filled):
        others = some([name for name in filled if name not in ticked])
        raise UserError(
            f"{path}: column {ticked[0]} holds {' and '.join(sorted(words))}, and {others} holds text. Keep the "
            "columns of the classes alone, or the tags alone"
        )
    for name in ticked:
        _refuse_break(path, header.line, name)
    return ticked


def _all_ticks(filled: Mapping[str, set[str]], alone: bool) -> list[str]:
    """Return the columns that hold only ticks. ``alone``: the header names no other column."""
    ticked = [name for name, words in filled.items() if words <= _TICKS.keys()]
    words = set().union(*(filled[name] for name in ticked))
    # A class may be called x: such words are ticks if they are a yes and a no, or one of them fills all the columns.
    one_of_each = len(words) <= 2 and sum(_TICKS[word] for word in words) == 1
    enough = len(words) == 2 or len(ticked) > 1 or (len(filled) == 1 and not alone)
    if words <= _SURE or (one_of_each and enough and not words & {name.lower() for name in ticked}):
        return ticked
    return [name for name in ticked if filled[name] <= _SURE]


class _Row(NamedTuple):
    """A row of a CSV that is not empty."""

    line: int
    """Its first line; the first line of a file is 1."""
    key: str
    """Its first cell."""
    id: str | None
    """The image that ``key`` stands for."""
    cells: list[str]
    """Its other cells. No cell has spaces around it."""


def _rows(path: Path, match: Ids) -> list[_Row]:
    """Read a CSV with the separator with which most rows name an image. Spreadsheets use that of their language.

    Raises UserError if a row has another separator, or if an open quote swallows rows.
    """
    text = reading.read_bytes(path, reading.LABELS).decode("utf-8-sig")
    excel = _EXCEL.match(text)
    if excel:
        text = text[excel.end() :]  # the line's end stays, so that lines keep their numbers
    readings = {name: _separated(path, text, name, match) for name in (excel[1] if excel else ",;\t")}
    best = max(readings, key=lambda name: _named(readings[name]))
    lines = {row.line for row in readings[best] if row.id is not None}
    for name, rows in readings.items():
        for row in rows:
            if row.id is not None and row.line not in lines:
                raise UserError(
                    f"{path} line {row.line}: found {name!r} after {row.key}, expected {best!r} as in other rows. "
                    "Separate the cells of all rows alike"
                )
    return readings[best]


_EXCEL = re.compile(r'"?sep=([,;\t|])"?[,;\t ]*(?=[\r\n])', re.IGNORECASE)
"""The line with which Excel learns the separator."""


def _named(rows: Sequence[_Row]) -> tuple[int, int]:
    """Return the number of rows that name an image, and of their cells."""
    named = [row for row in rows if row.id is not None]
    return len(named), sum(len(row.cells) for row in named)


def _separated(path: Path, text: str, separator: str, match: Ids) -> list[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    rows = []
    line = 1
    try:
        for cells in reader:
            for cell in cells if reader.line_num > line else ():
                swallowed = (part.split(separator)[0].strip(' "') for part in cell.splitlines()[1:])
                if any(match(key) is not None for key in swallowed):
                    _refuse_break(path, line, cell)
            if cells:
                key, *others = (cell.strip() for cell in cells)
                rows.append(_Row(line, key, match(key), others))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f'{path} line {line}: not readable as CSV: {error}. Is a quote (") open?') from None
    return rows


def _refuse_break(path: Path, line: int, cell: str) -> None:
    if len(cell.splitlines()) > 1:
        raise UserError(
            f'{path} line {line}: expected a name, found a line break in {cell[:60]!r}. A quote (") is probably open: '
            "close it or remove it"
        )


def _header(rows: Sequence[_Row]) -> _Row | None:
    """Return the row above the first image that names most columns. Titles and other images may be there too."""
    above = itertools.takewhile(lambda row: row.id is None, rows)
    headers = [row for row in above if any(row.cells) and not row.key.lower().endswith(IMAGE_SUFFIXES)]
    most = max(map(_names_in, headers), default=0)
    last = (row for row in reversed(headers) if most and _names_in(row) == most)
    return next(last, headers[0] if headers else None)


def _names_in(row: _Row) -> int:
    """Return the number of cells that are neither ticks nor numbers."""
    return sum(cell.lower() not in _TICKS and not _NUMBER.fullmatch(cell) for cell in row.cells)


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


def _read_csv(path: Path, rows: Sequence[_Row], classes: Sequence[str]) -> Names:
    entries = [row for row in rows if row.id is not None]
    header = _header(rows)
    columns = header.cells if header else []
    words = _words(columns, entries, classes)
    tags: dict[str, list[tuple[str, str]]] = {}
    keys: dict[str, str] = {}
    for line, key, id_, cells in entries:
        assert id_ is not None
        location = f"line {line}"
        if keys.setdefault(id_, key) != key:
            raise UserError(f"{path} {location}: {key!r} stands for {id_}, and so does {keys[id_]!r}: keep one of them")
        if words:
            names = _ticked(columns, cells, classes, words, f"{path} {location}")
        else:
            for cell in cells:
                _refuse_break(path, line, cell)
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


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?%?", re.IGNORECASE)
_YES = ("1", "1.0", "true", "yes", "x", "y", "t", "✓", "✔", "ja", "j", "wahr", "oui", "vrai", "si", "sí")
_NO = ("0", "0.0", "false", "no", "", "n", "f", "-", "nein", "falsch", "nee", "non", "faux")
_TICKS = dict.fromkeys(_YES, True) | dict.fromkeys(_NO, False)
"""Words of a table, in lower case, and whether the image shows the class."""
_SURE = {*_YES[:4], *_NO[:5]}
"""Words that are ticks even in a single column."""


def _words(header: Sequence[str], rows: Sequence[_Row], classes: Sequence[str]) -> set[str]:
    """Return the words below those names in the header that are classes; none if they do not tick the classes."""
    known = [name in classes for name in header]
    columns = [list(itertools.compress(row.cells, known)) for row in rows]
    first = next(filter(any, columns), [])
    is_tick = [bool(_NUMBER.fullmatch(cell)) or (cell.lower() in _TICKS and cell not in classes) for cell in first]
    return {cell.lower() for cells in columns for cell in cells} if first and all(is_tick) else set()


def _ticked(
    header: Sequence[str], cells: Sequence[str], classes: Sequence[str], words: Collection[str], location: str
) -> list[str]:
    """Return the columns in which a row has a tick. An unknown column with other words does not count as tags."""
    names = []
    for name, cell in zip(header, cells, strict=False):
        ticked = _TICKS.get(cell.lower())
        if ticked is None and name in classes:
            raise UserError(f"{location}: expected 0 or 1 in column {name}, which the header names, found {cell!r}")
        if ticked and (name in classes or (name and cell.lower() in _SURE.union(words))):
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
