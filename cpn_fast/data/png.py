"""PNG files as results: whole or damaged, and what they were made of. Nothing is decoded here."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

from cpn_fast.runtime import reading

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def can_be_kept(path: Path, source: str) -> bool:
    """Whether a PNG of an earlier start is there, whole, and made of ``source``; a damaged one is named on stderr."""
    try:
        content = reading.read_bytes(path, reading.MASK)
    except OSError:
        return False
    if not (whole := is_whole_png(content)):
        print(f"Warning: {path} is damaged and made again", file=sys.stderr)
    return whole and source_of(content) == source


def source_of(content: bytes) -> str | None:
    """What a PNG's text chunk ``source`` says of what it was made of; None without one."""
    name = b"tEXtsource\0"
    at = content.find(name, 0, content.find(b"IDAT") + 1)
    if at < 4:
        return None
    (length,) = struct.unpack_from(">I", content, at - 4)
    return content[at + len(name) : at + 4 + length].decode("latin-1")


def is_whole_png(content: bytes) -> bool:
    """Whether a PNG has all its chunks, the last included, and they their checksums. Nothing is decoded."""
    at, name = len(SIGNATURE), b""
    if not content.startswith(SIGNATURE):
        return False
    while at + 12 <= len(content) and name != b"IEND":  # a chunk: its content's length, a name, the content, a CRC
        (length,) = struct.unpack_from(">I", content, at)
        end = at + 8 + length
        name = content[at + 4 : at + 8]
        if content[end : end + 4] != struct.pack(">I", zlib.crc32(memoryview(content)[at + 4 : end])):
            return False
        at = end + 4
    return name == b"IEND"
