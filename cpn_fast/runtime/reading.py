"""The one door through which files are read: regular ones alone, none larger than its kind can be.

A FIFO waits for a writer, a device has no end, a file of terabytes fills the memory: they end here, with an error that
names the file. What the system or the door refuses is an OSError with the file's name, which each reader puts into its
own words.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import IO

IMAGE = MASK = 2**30
"""Bytes; 67 million pixels of four channels of 16 bits take 540 MB."""
SEED = 2**31
LIST = LABELS = NOTE = 2**30
"""Ten million images of 100 bytes a line."""
OWNER = 2**16
XML = 2**24
CONFIG = 2**22
INDEX = 2**26
WEIGHTS = 2**35
"""A checkpoint of two billion numbers and their momentum takes 16 GB."""
INSTANCES = 2**32
"""COCO's of train2017 take 450 MB."""
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Refused(OSError):
    """A file that is there but is not read, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EINVAL, reason, str(path))

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type[Refused], tuple[Path, str]]:
        return type(self), (Path(os.fsdecode(self.filename)), str(self.strerror))


def require_regular(path: Path, most: int) -> None:
    """For libraries that open by name: raises OSError unless ``path`` is a regular file of at most ``most`` bytes that
    may be read: what they say of a refusal names no file, or another reason."""
    opened(path, most).close()


def opened(path: Path, most: int) -> IO[bytes]:
    """The file, open for reading. Raises OSError unless it is a regular one of at most ``most`` bytes."""
    _require(path, path.stat(), most)  # before it is opened, which rewinds tapes and waits for a FIFO's writer
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 (the caller closes it)
    try:
        _require(path, os.fstat(file.fileno()), most)
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: Path, most: int) -> bytes:
    """All that a file had when it was opened: one may grow without end. Raises OSError as ``opened`` does."""
    with opened(path, most) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def sha256(path: Path, most: int) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits. Raises OSError as ``read_bytes`` does."""
    return hashlib.sha256(read_bytes(path, most)).hexdigest()


def read_text(path: Path, most: int) -> str:
    """All of a text in UTF-8, without its byte order mark. Raises OSError as ``read_bytes`` does, and ValueError."""
    return read_bytes(path, most).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _require(path: Path, found: os.stat_result, most: int) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        raise Refused(path, f"{_KINDS.get(kind, 'something else')}, where a regular file is expected")
    if found.st_size > most:
        raise Refused(path, _too_large(found.st_size, most))


def _too_large(size: int, most: int) -> str:
    return f"{size:,} bytes or more, where such a file has at most {most:,}"


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
