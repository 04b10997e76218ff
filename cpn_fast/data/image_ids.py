"""Which image a name in a label source stands for."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from cpn_fast.data.images import IMAGE_SUFFIXES


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
