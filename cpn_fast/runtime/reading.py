"""Files are opened here, or ``require_regular`` checks them first: only regular files up to a limit for their kind.

A FIFO waits for a writer, a device has no end, and a file of terabytes fills the memory. This module refuses them, with
an OSError that names the file. The system's errors are OSError too. Each reader turns them into its own message.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import IO

from cpn_fast.runtime.errors import UserError

IMAGE = MASK = 2**30
"""Bytes, as all limits here. 67 million pixels of four channels of 16 bits take 540 MB."""
SEED = 2**31
LIST = LABELS = NOTE = 2**30
"""Ten million images of 100 bytes a line."""
OWNER = 2**16
XML = 2**24
CONFIG = 2**22
INDEX = 2**26
WEIGHTS = 2**35
"""A checkpoint of two billion numbers and their momentum takes 16 GB."""
ARCHIVE = INSTANCES = 2**32
"""COCO's instances of train2017 take 450 MB."""
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def expanded(path: Path) -> Path:
    """Expand ``~`` to the home folder. Raises UserError for ``~NAME`` of a user who is not known."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no home folder of {path.parts[0]} is known; write the whole path") from None


class Refused(OSError):
    """A file exists, but this module refuses to read it, for ``reason``."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EINVAL, reason, str(path))

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type[Refused], tuple[Path, str]]:
        return type(self), (Path(os.fsdecode(self.filename)), str(self.strerror))


def require_regular(path: Path, most: int) -> None:
    """Raise OSError unless ``path`` is a readable regular file of at most ``most`` bytes.

    Call it before a library opens the file by name: the library's own error may name no file, or a wrong reason.
    """
    opened(path, most).close()


def opened(path: Path, most: int) -> IO[bytes]:
    """Open a file for reading. Raises OSError unless it is a regular file of at most ``most`` bytes."""
    _require(path, path.stat(), most)  # before opening, which rewinds tapes and waits for a FIFO's writer
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 (the caller closes it)
    try:
        _require(path, os.fstat(file.fileno()), most)
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: Path, most: int) -> bytes:
    """Read a file up to its size at opening, because a file may grow without end. Raises OSError as ``opened``."""
    with opened(path, most) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def sha256(path: Path, most: int) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits. Raises OSError as ``read_bytes``."""
    return hashlib.sha256(read_bytes(path, most)).hexdigest()


def read_text(path: Path, most: int) -> str:
    """Read a UTF-8 text, without its byte order mark. Raises OSError as ``read_bytes``, and ValueError."""
    return read_bytes(path, most).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _require(path: Path, status: os.stat_result, most: int) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        raise Refused(path, f"{_KINDS.get(kind, 'something else')}, where a regular file is expected")
    if status.st_size > most:
        raise Refused(path, f"{status.st_size:,} bytes; cpn-fast reads at most {most:,} of a file of this kind")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
