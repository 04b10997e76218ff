"""Opening image files: JPEG and PNG alone (other decoders of Pillow start programs), no larger than memory can hold."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from cpn_fast import reading
from cpn_fast.errors import UserError

MAX_PIXELS = 2**26
"""A file of a few bytes can claim any size; this many take 200 MB as RGB."""
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
"""Pillow has more decoders than an image needs, and one of them starts Ghostscript. Of several pictures in a file the
first one counts."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is below its limit


class UnreadableImage(UserError):
    """An image that could not be opened or decoded, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # its arguments, so that it crosses processes
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: expected a readable image, found: {self.reason}. Restore it or take it off the list"


@contextmanager
def opened(path: Path, content: IO[bytes] | None = None) -> Iterator[ImageFile]:
    """The image of a file, or of its ``content``. What goes wrong with it in the block becomes an UnreadableImage."""
    try:
        with (
            content or reading.opened(path, reading.IMAGE) as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.format == "TIFF" and image.mode in ("I", "F"):
                raise ValueError("32 bits a pixel and channel; save it with 8 or 16")
            yield image
    except UserError:
        raise
    except Exception as error:  # decoders raise many types on damaged files
        raise UnreadableImage(path, _reason(path, error)) from None


def read_image(path: Path, content: bytes | None = None) -> np.ndarray:
    """Decode a file, or ``content`` that ``path`` names, as uint8 RGB (H, W, 3), turned upright by its EXIF tag.

    Of 16 bits the upper 8 are taken. Raises UserError for a missing, truncated or otherwise unreadable file.
    """
    with opened(path, None if content is None else io.BytesIO(content)) as image:
        return upright(image)


def upright(image: Image.Image) -> np.ndarray:
    """Pixels of an opened image as ``read_image`` gives them."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):  # 16 bits of gray, which Pillow would cut off at 255
        turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
    return np.array(turned.convert("RGB"))


def _reason(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return f"none of {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels; scale it down"
    return str(error) or type(error).__name__


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
