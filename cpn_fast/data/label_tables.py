"""Read image-level labels from a CSV. ``data.labels`` says which tables it takes.

The three functions raise UserError for a table that may be understood in two ways, and OSError or UnicodeDecodeError
for a file that cannot be read.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cpn_fast.data.image_ids import Ids
from cpn_fast.data.images import IMAGE_SUFFIXES
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, some

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?%?", re.IGNORECASE)
_YES = ("1", "1.0", "true", "yes", "x", "y", "t", "✓", "✔", "☑", "✅", "ja", "j", "wahr", "oui", "vrai", "si", "sí")
_NO = ("0", "0.0", "false", "no", "", "n", "f", "-", "✗", "✘", "☐", "❌", "nein", "falsch", "nee", "non", "faux")
_TICKS = dict.fromkeys(_YES, True) | dict.fromkeys(_NO, False)
"""Words of a table, in lower case, and whether the image shows the class."""
_SURE = {*_YES[:4], *_NO[:5]}
"""Words that are ticks even in a single column."""
_TAGS = re.compile(r"(image[ _-]?)?(tags?|labels?|class(es)?|categor(y|ies))([ _-]?(names?|\d+))?", re.IGNORECASE)
"""What tables of boxes and of splits call the column of tags."""
_EXCEL = re.compile(r'"?sep=([,;\t|])"?[,;\t ]*(?=[\r\n])', re.IGNORECASE)
"""The line with which Excel learns the separator."""

Names = Mapping[str, list[tuple[str, str]]]
"""id -> (class name, where it was read) for each name."""


def read_tags(path: Path, ids: Collection[str], classes: Sequence[str]) -> Names:
    """Return the names of those ``ids`` that a CSV has. Without ``classes`` a name of two words is one name."""
    rows = _rows(path, Ids(ids))
    return _tags(path, rows, _tag_columns(rows), classes)


def listed_in(path: Path, images: Collection[str]) -> list[str]:
    """Return the cells that name images, without a header, each once."""
    match = Ids(images)
    names = [row.key for row in _rows(path, match) if row.key]
    if len(names) > 1 and match(names[0]) is None and match(names[1]) is not None:
        names = names[1:]
    return list(dict.fromkeys(names))


def class_names(path: Path, images: Collection[str]) -> list[str]:
    """Return the columns of a table that ticks the classes of ``images``, else their names in alphabetic order."""
    rows = _rows(path, Ids(images))
    tagged = _tag_columns(rows)
    if not tagged and (columns := _ticked_columns(path, rows)):
        return columns
    tags = _tags(path, rows, tagged, ())
    _refuse_ticks(path, tags)
    return sorted({name for names in tags.values() for name, _ in names})


class _Row(NamedTuple):
    """A row of a CSV that is not empty."""

    line: int
    """Its first line; the first line of a file is 1."""
    key: str
    """The cell that names the image; the first one, as a rule."""
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


def _named(rows: Sequence[_Row]) -> tuple[int, int]:
    """Return the number of rows that name an image, and of their cells."""
    named = [row for row in rows if row.id is not None]
    return len(named), sum(len(row.cells) for row in named)


def _separated(path: Path, text: str, separator: str, match: Ids) -> list[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    table: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for cells in reader:
            for cell in cells if reader.line_num > line else ():
                swallowed = (part.split(separator)[0].strip(' "') for part in cell.splitlines()[1:])
                if any(match(key) is not None for key in swallowed):
                    _refuse_break(path, line, cell)
            if cells:
                table.append((line, [cell.strip() for cell in cells]))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f'{path} line {line}: not readable as CSV: {error}. Is a quote (") open?') from None
    key = _key_column([cells for _, cells in table], match)
    return [_row(line, cells, key, match) for line, cells in table]


def _key_column(table: Sequence[Sequence[str]], match: Ids) -> int:
    """Return the column of the images: the first one, or that of their files beside an index or a tag."""
    for first, *others in table:
        if not _is_file(first):
            for column, cell in enumerate(others, 1):
                if _is_file(cell) and match(cell) not in (None, match(first)):
                    return column
    return 0


def _is_file(cell: str) -> bool:
    return cell.lower().endswith(IMAGE_SUFFIXES)


def _row(line: int, cells: Sequence[str], column: int, match: Ids) -> _Row:
    key = cells[column] if column < len(cells) else ""
    return _Row(line, key, match(key), [*cells[:column], *cells[column + 1 :]])


def _refuse_break(path: Path, line: int, cell: str) -> None:
    if len(cell.splitlines()) > 1:
        raise UserError(
            f'{path} line {line}: expected a name, found a line break in {cell[:60]!r}. A quote (") is probably open: '
            "close it or remove it"
        )


def _header(rows: Sequence[_Row]) -> _Row | None:
    """Return the row above the first image that names most columns. Titles and other images may be there too."""
    headers = _above(rows)
    most = max(map(_names_in, headers), default=0)
    last = (row for row in reversed(headers) if most and _names_in(row) == most)
    return next(last, headers[0] if headers else None)


def _above(rows: Sequence[_Row]) -> list[_Row]:
    """Return the rows above the first image, without those that are surely of other images."""
    above = itertools.takewhile(lambda row: row.id is None, rows)
    return [row for row in above if any(row.cells) and not _is_file(row.key)]


def _names_in(row: _Row) -> int:
    """Return the number of cells that are neither ticks nor numbers."""
    return sum(cell.lower() not in _TICKS and not _NUMBER.fullmatch(cell) for cell in row.cells)


def _tags(path: Path, rows: Sequence[_Row], tagged: Sequence[bool], classes: Sequence[str]) -> Names:
    """Return the names of the rows; ``tagged`` are the table's ``_tag_columns``."""
    entries = [row for row in rows if row.id is not None]
    header = _header(rows)
    columns = header.cells if header else []
    words = set() if tagged else _words(columns, entries, classes)
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
            cells = _below(tagged, cells, f"{path} {location}") if tagged else cells
            for cell in cells:
                _refuse_break(path, line, cell)
            names = [name for cell in cells for name in _names(cell, classes)]
        tags.setdefault(id_, []).extend((name, location) for name in names)
    return tags


def _tag_columns(rows: Sequence[_Row]) -> list[bool]:
    """Return which columns the header calls tags, labels, class or category; none if they hold ticks or numbers."""
    header = next((row for row in _above(rows) if any(map(_TAGS.fullmatch, row.cells))), None)
    if header is None:
        return []
    named: list[bool] = []
    for name in header.cells:
        named.append(bool(_TAGS.fullmatch(name)) if name else named[-1:] == [True])  # `image,tags,,` has three of tags
    below = (row.cells for row in rows if row.line > header.line)  # of all images: those asked for may be negatives
    cells = {cell.lower() for row in below for cell in itertools.compress(row, named)}
    return named if any(cell not in _TICKS and not _NUMBER.fullmatch(cell) for cell in cells) else []


def _below(tagged: Sequence[bool], cells: Sequence[str], location: str) -> list[str]:
    """Return the cells of the columns of tags. Cells beyond the header belong to its last column."""
    if len(cells) > len(tagged) and not tagged[-1] and any(cells[len(tagged) :]):
        raise UserError(
            f"{location}: expected {len(tagged) + 1} cells, as in the header, found {len(cells) + 1}. Put tags with "
            'commas between them in quotes: "cat,dog"'
        )
    return list(itertools.compress(cells, itertools.chain(tagged, itertools.repeat(tagged[-1]))))


def _names(cell: str, classes: Sequence[str]) -> list[str]:
    """Return the class names in a cell of a CSV."""
    if cell in classes:
        return [cell]
    is_list = cell.startswith("[") and cell.endswith("]")  # as pandas writes it: ['cat', 'dog']
    parts = re.split("[;,]", cell[1:-1] if is_list else cell)
    if len(parts) == 1 and classes and not any(" " in name for name in classes):
        parts = parts[0].split()
    return [name for part in parts if (name := part.strip(" \t'\"" if is_list else None))]


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
