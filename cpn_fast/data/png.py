"""PNG files as results: whether they are whole, and their provenance. Nothing is decoded here."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

from cpn_fast.runtime import reading

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def can_be_kept(path: Path, source: str) -> bool:
    """Return whether a PNG exists, is whole and was made from ``source``. A damaged file is named on stderr."""
    try:
        content = reading.read_bytes(path, reading.MASK)
    except OSError:
        return False
    if not (whole := is_whole_png(content)):
        print(f"Warning: {path} is damaged and made again", file=sys.stderr)
    return whole and source_of(content) == source


def source_of(content: bytes) -> str | None:
    """Return the provenance in a PNG: its text chunk ``source``, or None without one."""
    name = b"tEXtsource\0"
    at = content.find(name, 0, content.find(b"IDAT") + 1)
    if at < 4:
        return None
    (length,) = struct.unpack_from(">I", content, at - 4)
    return content[at + len(name) : at + 4 + length].decode("latin-1")


def is_whole_png(content: bytes) -> bool:
    """Return whether a PNG has all its chunks, up to the last, with correct checksums. Nothing is decoded."""
    at, name = len(SIGNATURE), b""
    if not content.startswith(SIGNATURE):
        return False
    while at + 12 <= len(content) and name != b"IEND":  # a chunk: length of content, name, content, CRC
        (length,) = struct.unpack_from(">I", content, at)
        end = at + 8 + length
        name = content[at + 4 : at + 8]
        if content[end : end + 4] != struct.pack(">I", zlib.crc32(memoryview(content)[at + 4 : end])):
            return False
        at = end + 4
    return name == b"IEND"
