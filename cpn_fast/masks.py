"""Masks as palette PNGs, and pictures of masks and CAMs for people: overlays, heat maps, galleries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from cpn_fast import reading
from cpn_fast.errors import UserError
from cpn_fast.files import replacing
from cpn_fast.images import UnreadableImage, is_whole_png, opened, source_of
from cpn_fast.provenance import image_digest, marked_image
from cpn_fast.seeds import read_seed, seed_source

if TYPE_CHECKING:
    from cpn_fast.dataset import Sample

IGNORE = 255
"""Mask value of pixels that belong to no class and are not scored."""


def _voc_palette() -> np.ndarray:
    """Bits 0, 3, 6 of a value are red's highest bits, 1, 4, 7 green's, 2, 5 blue's."""
    value = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((value >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours


PALETTE = _voc_palette()
"""uint8 (256, 3): VOC's RGB colour of each mask value."""

# Grays start at 80: most of VOC's colours are dark and would vanish in shadows.
TINTS = np.rint(0.45 * (80 + np.arange(256)[:, None, None] * (175 / 255)) + 0.55 * PALETTE).astype(np.uint8)
"""uint8 (256, 256, 3): RGB of a gray level under the colour of a mask value."""

GAP, LINE, SQUARE = 8, 24, 12
"""Pixels between things, of a line of text, and of a legend's squares."""
NARROWEST, ENLARGED, LONGEST = 240, 2048, 16_384
"""Sides of an overlay in pixels: the width that its legend needs, the longest of a small image, the longest of any."""
FONT = ImageFont.load_default(13)


def write_mask(path: Path, mask: np.ndarray, source: str = "") -> None:
    """Write uint8 (H, W) as an 8-bit PNG with VOC's palette, atomically and without loss.

    ``source``, what it was made of, becomes a text chunk (``images.source_of``).
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
    """Values of a mask PNG, uint8 (H, W): palette indices, gray levels of 8 or 16 bits, or RGB in VOC's very colours.

    Raises UserError for anything from which class values cannot be told exactly.
    """
    try:
        with opened(path) as picture:
            if picture.format != "PNG":
                raise UserError(f"{path}: a mask must be PNG, found {picture.format}, which may change class values")
            if not is_whole_png(reading.read_bytes(path, reading.MASK)):  # Pillow compares no checksum of pixels
                raise UserError(f"{path}: not readable as a PNG: damaged, its checksums do not fit")
            # Pillow stretches 2- and 4-bit gray levels to 0..255, which would turn class 1 into 85 or 17.
            if picture.mode == "P" or (picture.mode == "L" and picture.tile[0].args == "L"):
                return np.array(picture)
            if picture.tile and picture.tile[0].args == "I;16B":
                return _from_16_bits(path, np.array(picture))
            if picture.mode == "RGB":
                return _from_colours(path, np.array(picture))
            found = picture.mode
    except UnreadableImage as error:
        if not path.exists():
            raise UserError(f"{path}: no such mask") from None
        raise UserError(f"{path}: not readable as a PNG: {error.reason}") from None
    raise UserError(f"{path}: mask of PNG mode {found}: save it with a palette or as 8-bit grayscale class values")


def mask_source(path: Path) -> str | None:
    """What a mask says it was made of; None without that. Raises UserError for a file that cannot be read."""
    try:
        return source_of(reading.read_bytes(path, reading.MASK))
    except OSError as error:
        raise UserError(f"{path}: not readable as a PNG: {error.strerror}") from None


def is_of_another_image(path: Path, image: Path) -> bool:
    """Whether a seed or a mask says that it was made of another image than is there now; others' files say nothing.

    Raises UserError for a mask or an image that cannot be read.
    """
    found = marked_image(seed_source(path) if path.suffix == ".npz" else mask_source(path))
    return found is not None and found != image_digest(image)


def tinted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image, uint8 RGB (H, W, 3), with the regions of mask, uint8 (H, W), in their colours and a line between."""
    regions = _tint(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), mask)
    picture = np.where(mask[..., None] > 0, regions, image)
    highest = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    picture[(highest != mask) & (highest != IGNORE)] = 255  # beside a pixel of a higher class
    return picture


def overlay(image: np.ndarray, mask: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """The tinted image and, below it, a legend of the classes in the mask, for which it gets white margins if need be.

    image: uint8 RGB (H, W, 3); mask: uint8 (H, W), 0 background, i + 1 for ``classes[i]``. A picture narrower than
    240 pixels is enlarged by a whole factor, up to a long side of 2,048; one longer than 16,384 is made smaller, for
    JPEG ends at 65,500. Returns uint8 RGB.
    """
    sides = image.shape[1], image.shape[0]
    factor = max(1, min(-(-NARROWEST // sides[0]), ENLARGED // max(sides)))
    scale = min(factor, LONGEST / max(sides))
    width, height = (max(1, round(side * scale)) for side in sides)
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    large = cv2.resize(image, (width, height), interpolation=smooth)
    picture = tinted(large, cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT))
    margin = max(0, NARROWEST - width)
    picture = np.pad(picture, ((0, 0), (margin // 2, margin - margin // 2), (0, 0)), constant_values=255)
    return np.concatenate([picture, _caption("", _present(mask), classes, picture.shape[1])])


def cam_overlay(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """The image, uint8 RGB (H, W, 3), under a heat map of cam, (H, W) in [0, 1]; where it is 0 the image stays."""
    heat = cv2.applyColorMap(np.rint(cam * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    share = 0.6 * np.minimum(cam * 2, 1)[..., None]
    return np.rint(image * (1 - share) + heat * share).astype(np.uint8)


@dataclass(frozen=True)
class GalleryRow:
    """Pictures of one image."""

    title: str
    values: Sequence[int]
    """Mask values to explain beside the title."""
    pictures: Mapping[str, np.ndarray]
    """Column's heading -> uint8 RGB."""


def gallery(rows: Sequence[GalleryRow], classes: Sequence[str], *, cell: tuple[int, int] = (240, 180)) -> np.ndarray:
    """Contact sheet, uint8 RGB: a row of pictures for each image, under its title and class names.

    Columns stand in the order of their first appearance; a row may lack some. cell: (width, height) in pixels into
    which every picture is fitted.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.pictures))
    lefts = [GAP + place * (cell[0] + GAP) for place in range(len(columns))]
    width = lefts[-1] + cell[0] + GAP
    heading = Image.new("RGB", (width, LINE), "white")
    for left, name in zip(lefts, columns, strict=True):
        ImageDraw.Draw(heading).text((left + cell[0] / 2, LINE / 2), name, fill="black", font=FONT, anchor="mm")
    strips = [np.array(heading)]
    for row in rows:
        fitted = [_fitted(picture, cell) for picture in row.pictures.values()]
        height = max(height for _, height in fitted)
        strip = np.full((height + GAP, width, 3), 255, np.uint8)
        for left, name in zip(lefts, columns, strict=True):
            if name in row.pictures:
                _paste(strip[:height, left : left + cell[0]], row.pictures[name])
        strips += [_caption(row.title, row.values, classes, width), strip]
    return np.concatenate(strips)


def write_gallery(
    path: Path,
    samples: Sequence[Sample],
    runs: Mapping[str, Path],
    masks: Mapping[str, Path],
    classes: Sequence[str],
    *,
    cell: tuple[int, int] = (240, 180),
) -> None:
    """Picture of images and ground truths beside each run's CAMs (maximum over classes) and masks, then other masks.

    path: its ending says the format; samples: with ``mask``; runs: name -> folder of the stage ``cam``, with ``seeds``
    and ``masks``; masks: name -> folder of masks; cell: as for ``gallery``.
    """
    from cpn_fast.pipelines.superpixels import read_image  # it imports the data set, which imports this module

    rows = []
    for sample in samples:
        if sample.mask is None:
            raise ValueError(f"{sample.id}: a gallery needs samples with ground truth")
        image = read_image(sample.image)
        shown = {"ground truth": read_mask(sample.mask)}
        pictures = {"image": image, "ground truth": image}  # in the columns' order; masks are drawn at the end
        for name, folder in runs.items():
            cam = read_seed(folder / "seeds" / f"{sample.id}.npz").cam.max(0, initial=0)
            shown[f"{name}: mask"] = read_mask(folder / "masks" / f"{sample.id}.png")
            pictures |= {f"{name}: heat": cam_overlay(image, cam), f"{name}: mask": image}
        shown |= {name: read_mask(folder / f"{sample.id}.png") for name, folder in masks.items()}
        pictures |= {name: tinted(image, mask) for name, mask in shown.items()}
        rows.append(GalleryRow(sample.id, _present(*shown.values()), pictures))
    with replacing(path) as file:
        Image.fromarray(gallery(rows, classes, cell=cell)).save(file, Image.registered_extensions()[path.suffix])


def _from_16_bits(path: Path, values: np.ndarray) -> np.ndarray:
    if values.max(initial=0) > IGNORE:
        raise UserError(
            f"{path}: a 16-bit mask with the value {values.max()}, expected 0 to 254 for classes and {IGNORE} for "
            "pixels of none: give the classes values in the order of the config's classes, from 1"
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


def _tint(gray: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(TINTS[gray, mask])


def _fitted(picture: np.ndarray, cell: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a picture that fills a cell one way."""
    scale = min(cell[0] / picture.shape[1], cell[1] / picture.shape[0])
    return max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))


def _paste(place: np.ndarray, picture: np.ndarray) -> None:
    """Fit a picture into the middle of a place, in place."""
    width, height = _fitted(picture, (place.shape[1], place.shape[0]))
    left, top = (place.shape[1] - width) // 2, (place.shape[0] - height) // 2
    smooth = cv2.INTER_AREA if width < picture.shape[1] else cv2.INTER_LINEAR
    place[top : top + height, left : left + width] = cv2.resize(picture, (width, height), interpolation=smooth)


def _present(*masks: np.ndarray) -> list[int]:
    return sorted({int(value) for mask in masks for value in np.unique(mask)} - {0, IGNORE})


def _caption(title: str, values: Sequence[int], classes: Sequence[str], width: int) -> np.ndarray:
    """White strip with a title and, for each mask value, a square of its colour and its class's name; lines wrap."""
    left, line = GAP, 0
    if title:
        left += round(FONT.getlength(title)) + 3 * GAP
    places = []
    for value in values:
        name = classes[value - 1] if value <= len(classes) else f"value {value}"
        room = SQUARE + GAP // 2 + round(FONT.getlength(name))
        if left > GAP and left + room > width - GAP:
            left, line = GAP, line + 1
        places.append((left, line * LINE + LINE // 2, value, name))
        left += room + 2 * GAP
    strip = Image.new("RGB", (width, (line + 1) * LINE), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((GAP, LINE // 2), title, fill="black", font=FONT, anchor="lm")
    for left, middle, value, name in places:
        corners = (left, middle - SQUARE // 2, left + SQUARE - 1, middle + SQUARE // 2 - 1)
        draw.rectangle(corners, fill=tuple(_tint(np.array(128), np.array(value)).tolist()))
        draw.text((left + SQUARE + GAP // 2, middle), name, fill="black", font=FONT, anchor="lm")
    return np.array(strip)
