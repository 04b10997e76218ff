"""Pictures of masks and CAMs for people: overlays, heat maps, galleries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cpn_fast.data.dataset import Sample
from cpn_fast.data.images import read_image
from cpn_fast.data.masks import IGNORE, PALETTE, read_mask
from cpn_fast.data.seeds import read_seed
from cpn_fast.runtime.files import replacing

# Grays start at 80: most of VOC's colours are dark and would not show in shadows.
TINTS = np.rint(0.45 * (80 + np.arange(256)[:, None, None] * (175 / 255)) + 0.55 * PALETTE).astype(np.uint8)
"""uint8 (256, 256, 3): RGB of each gray level under the colour of each mask value."""

GAP, LINE, SQUARE = 8, 24, 12
"""Pixels: gap between elements, height of a text line, side of a legend's squares."""
NARROWEST, ENLARGED, LONGEST = 240, 2048, 16_384
"""Pixels of an overlay: smallest width, for the legend; longest side after enlargement; longest side of all."""
FONT = ImageFont.load_default(13)


def tinted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the image, uint8 RGB (H, W, 3), with each region of mask, uint8 (H, W), in its colour and outlined."""
    regions = _tint(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), mask)
    picture = np.where(mask[..., None] > 0, regions, image)
    highest = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    picture[(highest != mask) & (highest != IGNORE)] = 255  # beside a pixel of a higher class
    return picture


def overlay(image: np.ndarray, mask: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Return the tinted image, uint8 RGB, with a legend of the mask's classes below.

    image: uint8 RGB (H, W, 3); mask: uint8 (H, W), 0 background, i + 1 for ``classes[i]``. A picture narrower than
    240 pixels is enlarged by an integer factor, up to a long side of 2,048, then gets white margins for the legend.
    A picture longer than 16,384 pixels is made smaller: JPEG allows 65,500.
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
    """Return the image, uint8 RGB (H, W, 3), under a heat map of cam, (H, W) in [0, 1]. Pixels of cam 0 stay."""
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
    """Column heading -> uint8 RGB."""


def gallery(rows: Sequence[GalleryRow], classes: Sequence[str], *, cell: tuple[int, int] = (240, 180)) -> np.ndarray:
    """Return a contact sheet, uint8 RGB: a row of pictures for each image, under its title and class names.

    Columns have the order of their first appearance. A row may lack columns. cell: (width, height) in pixels; every
    picture is fitted into it.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.pictures))
    lefts = [GAP + column * (cell[0] + GAP) for column in range(len(columns))]
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
    """Write a gallery: image, ground truth, CAMs (maximum over classes) and masks of each run, then other masks.

    path: its ending gives the format; samples: with ``mask``; runs: name -> folder of the stage ``cam``, with ``seeds``
    and ``masks``; masks: name -> folder of masks; cell: as for ``gallery``.
    """
    rows = []
    for sample in samples:
        if sample.mask is None:
            raise ValueError(f"{sample.id}: a gallery needs samples with ground truth")
        image = read_image(sample.image)
        shown = {"ground truth": read_mask(sample.mask)}
        pictures = {"image": image, "ground truth": image}  # fixes the order of columns; the loop's end draws masks
        for name, folder in runs.items():
            cam = read_seed(folder / "seeds" / f"{sample.id}.npz").cam.max(0, initial=0)
            shown[f"{name}: mask"] = read_mask(folder / "masks" / f"{sample.id}.png")
            pictures |= {f"{name}: heat": cam_overlay(image, cam), f"{name}: mask": image}
        shown |= {name: read_mask(folder / f"{sample.id}.png") for name, folder in masks.items()}
        pictures |= {name: tinted(image, mask) for name, mask in shown.items()}
        rows.append(GalleryRow(sample.id, _present(*shown.values()), pictures))
    with replacing(path) as file:
        Image.fromarray(gallery(rows, classes, cell=cell)).save(file, Image.registered_extensions()[path.suffix])


def _tint(gray: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(TINTS[gray, mask])


def _fitted(picture: np.ndarray, cell: tuple[int, int]) -> tuple[int, int]:
    """Return width and height of a picture that is scaled to fit into a cell."""
    scale = min(cell[0] / picture.shape[1], cell[1] / picture.shape[0])
    return max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))


def _paste(canvas: np.ndarray, picture: np.ndarray) -> None:
    """Scale a picture to fit and write it into the middle of ``canvas``."""
    width, height = _fitted(picture, (canvas.shape[1], canvas.shape[0]))
    left, top = (canvas.shape[1] - width) // 2, (canvas.shape[0] - height) // 2
    smooth = cv2.INTER_AREA if width < picture.shape[1] else cv2.INTER_LINEAR
    canvas[top : top + height, left : left + width] = cv2.resize(picture, (width, height), interpolation=smooth)


def _present(*masks: np.ndarray) -> list[int]:
    return sorted({int(value) for mask in masks for value in np.unique(mask)} - {0, IGNORE})


def _caption(title: str, values: Sequence[int], classes: Sequence[str], width: int) -> np.ndarray:
    """Return a white strip with a title and a legend: a coloured square and a class name per value. Lines wrap."""
    left, line = GAP, 0
    if title:
        left += round(FONT.getlength(title)) + 3 * GAP
    entries = []
    for value in values:
        name = classes[value - 1] if value <= len(classes) else f"value {value}"
        needed = SQUARE + GAP // 2 + round(FONT.getlength(name))
        if left > GAP and left + needed > width - GAP:
            left, line = GAP, line + 1
        entries.append((left, line * LINE + LINE // 2, value, name))
        left += needed + 2 * GAP
    strip = Image.new("RGB", (width, (line + 1) * LINE), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((GAP, LINE // 2), title, fill="black", font=FONT, anchor="lm")
    for left, middle, value, name in entries:
        corners = (left, middle - SQUARE // 2, left + SQUARE - 1, middle + SQUARE // 2 - 1)
        draw.rectangle(corners, fill=tuple(_tint(np.array(128), np.array(value)).tolist()))
        draw.text((left + SQUARE + GAP // 2, middle), name, fill="black", font=FONT, anchor="lm")
    return np.array(strip)
