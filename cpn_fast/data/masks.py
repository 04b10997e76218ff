"""Masks as palette PNGs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cpn_fast.data.images import UnreadableImage, opened
from cpn_fast.data.png import is_whole_png, source_of
from cpn_fast.data.provenance import image_digest, marked_image
from cpn_fast.data.seeds import seed_source
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import replacing

IGNORE = 255
"""Mask value of pixels without a class. They are not scored."""


def _voc_palette() -> np.ndarray:
    """Return VOC's palette: bits 0, 3, 6 of a value are red's highest bits, bits 1, 4, 7 green's, bits 2, 5 blue's."""
    value = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((value >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours


PALETTE = _voc_palette()
"""uint8 (256, 3): VOC's RGB colour of each mask value."""


def write_mask(path: Path, mask: np.ndarray, source: str = "") -> None:
    """Write uint8 (H, W) as an 8-bit PNG with VOC's palette, atomically and without loss.

    ``source`` is the mask's provenance. It becomes a text chunk (``png.source_of``).
    """
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"{path}: a mask is uint8 (H, W), found {mask.dtype}{mask.shape}")
    picture = Image.fromarray(mask)
    picture.putpalette(PALETTE.tobytes())
    note = PngInfo()
    if source:
        note.add_text("source", source)
    with replacing(path) as file:
        picture.save(file, format="PNG", pnginfo=note)


def read_mask(path: Path) -> np.ndarray:
    """Read the class values of a mask PNG, uint8 (H, W).

    They are palette indices, gray levels of 8 or 16 bits, or RGB in VOC's exact colours. Raises UserError for a file
    whose class values are not certain.
    """
    try:
        with opened(path) as picture:
            if picture.format != "PNG":
                raise UserError(f"{path}: a mask must be PNG, found {picture.format}, which may change class values")
            if not is_whole_png(reading.read_bytes(path, reading.MASK)):  # Pillow checks no checksum of pixels
                raise UserError(f"{path}: not readable as a PNG: damaged, checksums do not fit")
            # Pillow stretches 2- and 4-bit gray levels to 0..255: class 1 would become 85 or 17.
            if picture.mode == "P" or (picture.mode == "L" and picture.tile[0].args == "L"):
                return np.array(picture)
            if picture.tile and picture.tile[0].args == "I;16B":
                return _from_16_bits(path, np.array(picture))
            if picture.mode == "RGB":
                return _from_colours(path, np.array(picture))
            mode = picture.mode
    except UnreadableImage as error:
        if not path.exists():
            raise UserError(f"{path}: no such mask") from None
        raise UserError(f"{path}: not readable as a PNG: {error.reason}") from None
    raise UserError(f"{path}: mask of PNG mode {mode}: save it with a palette or as 8-bit grayscale class values")


def mask_source(path: Path) -> str | None:
    """Return the provenance in a mask, or None without it. Raises UserError for a file that cannot be read."""
    try:
        return source_of(reading.read_bytes(path, reading.MASK))
    except OSError as error:
        raise UserError(f"{path}: not readable as a PNG: {error.strerror}") from None


def is_of_another_image(path: Path, image: Path) -> bool:
    """Return whether the provenance of a seed or a mask names another image than the current one.

    False without provenance, as in files of other programs. Raises UserError for a mask or an image that cannot be
    read.
    """
    digest = marked_image(seed_source(path) if path.suffix == ".npz" else mask_source(path))
    return digest is not None and digest != image_digest(image)


def _from_16_bits(path: Path, values: np.ndarray) -> np.ndarray:
    if values.max(initial=0) > IGNORE:
        raise UserError(
            f"{path}: a 16-bit mask with the value {values.max()}, expected 0 to 254 for classes and {IGNORE} for "
            "pixels without a class: number the classes from 1, in the order of the config's classes"
        )
    return values.astype(np.uint8)


def _from_colours(path: Path, picture: np.ndarray) -> np.ndarray:
    codes = picture.astype(np.int64) @ (65536, 256, 1)
    known = PALETTE.astype(np.int64) @ (65536, 256, 1)
    order = np.argsort(known)
    values = order[np.searchsorted(known, codes, sorter=order).clip(max=255)].astype(np.uint8)
    foreign = codes != known[values]
    if foreign.any():
        red, green, blue = picture[foreign][0]
        raise UserError(
            f"{path}: an RGB mask with {foreign.sum()} pixels in colours that VOC's palette lacks, such as "
            f"({red}, {green}, {blue}): save it with a palette or as 8-bit grayscale class values"
        )
    return values
