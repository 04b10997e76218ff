"""Open image files. The formats are few, because some decoders of Pillow start programs, and the size is bounded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError

MAX_PIXELS = 2**26
"""A file of a few bytes can claim any size. As RGB, these pixels take 200 MB."""
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
"""Formats that are read. Pillow has more decoders, one of which starts Ghostscript. In a file of several pictures only
the first one counts."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff")
"""Endings of their files in lower case. Upper case is read too."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is below its limit
# On a palette's transparency, which is dropped, and on metadata: they name no file, and the pixels are read.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class UnreadableImage(UserError):
    """An image could not be opened or decoded, for ``reason``."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both arguments, so that the error can be pickled
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: expected a readable image, found: {self.reason}. Restore it or take it off the list"


@contextmanager
def opened(path: Path, content: IO[bytes] | None = None) -> Iterator[ImageFile]:
    """Open the image of a file, or of its ``content``. Errors inside the block become UnreadableImage."""
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
    """Decode a file, or its ``content``, as uint8 RGB (H, W, 3), turned upright by its EXIF tag.

    A 16-bit image keeps the upper 8 bits. Raises UserError for a missing, truncated or otherwise unreadable file.
    """
    with opened(path, None if content is None else io.BytesIO(content)) as image:
        return upright(image)


def upright(image: Image.Image) -> np.ndarray:
    """Return the pixels of an opened image as ``read_image`` does."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
    return np.array(turned.convert("RGB"))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width of an opened image after ``upright``, from its header."""
    width, height = image.size
    if orientation(image) not in (5, 6, 7, 8):
        return height, width
    stored: Any = getattr(image, "tag_v2", None)  # a TIFF's tags: new Pillow has turned its size already, old has not
    return (stored[ExifTags.Base.ImageWidth], stored[ExifTags.Base.ImageLength]) if stored else (width, height)


def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation as ``ImageOps.exif_transpose`` understands it: 2 to 8 if it turns the image, else 1."""
    value: Any = image.getexif().get(ExifTags.Base.Orientation)
    return int(value) if value in range(2, 9) else 1


def _reason(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return f"none of {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels; scale it down"
    return str(error) or type(error).__name__
