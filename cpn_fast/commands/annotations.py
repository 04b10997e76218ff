"""Predicted masks in the forms that annotation tools import: JSON of COCO and Label Studio, XML of CVAT.

COCO's form needs pycocotools (``pip install pycocotools``).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np

from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import replacing

DESCRIPTION = "Predictions of cpn-fast"
"""Stands in every file, so that ``predict`` replaces only its own."""


class Writer(Protocol):
    """Collects the masks of images and writes them into one file."""

    file: str
    """Name of the file."""

    def add(self, image: str, mask: np.ndarray, scores: dict[int, float]) -> None:
        """Add an image. ``mask`` is uint8 (H, W), i + 1 for class i; ``scores`` maps its values to 0 to 1."""
        ...

    def write(self, folder: Path) -> Path: ...


class Coco:
    """COCO's instances, one for each class of an image: runs (RLE), or outlines without holes with ``polygons``.

    Category ids are mask values.
    """

    def __init__(self, classes: Sequence[str], *, polygons: bool) -> None:
        if importlib.util.find_spec("pycocotools") is None:
            raise UserError("--annotations coco needs pycocotools, which is not installed: pip install pycocotools")
        self.polygons = polygons
        self.file = "coco-polygons.json" if polygons else "coco.json"
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories = [{"id": value, "name": name} for value, name in enumerate(classes, 1)]

    def add(self, image: str, mask: np.ndarray, scores: dict[int, float]) -> None:
        from pycocotools import mask as rle

        height, width = mask.shape
        self.images.append({"id": len(self.images) + 1, "file_name": image, "height": height, "width": width})
        for value in _values(mask):
            pixels = mask == value
            runs = rle.encode(np.asfortranarray(pixels.astype(np.uint8)))
            runs["counts"] = runs["counts"].decode()
            segmentation: Any = runs
            if self.polygons:
                segmentation = [outline.ravel().round(2).tolist() for outline in outlines(pixels)]
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": len(self.images),
                    "category_id": value,
                    "segmentation": segmentation,
                    "area": int(pixels.sum()),
                    "bbox": rle.toBbox(runs).tolist(),
                    "iscrowd": 0,
                    "score": scores.get(value),
                }
            )

    def write(self, folder: Path) -> Path:
        tree = {
            "info": {"description": DESCRIPTION},
            "images": self.images,
            "annotations": self.annotations,
            "categories": self.categories,
        }
        return _write(folder / self.file, json.dumps(tree, ensure_ascii=False))


class LabelStudio:
    """Label Studio's tasks with predictions: one polygon for each region, in percent of the image's sides.

    They fit a labelling interface of ``<Image name="image" value="$image"/>`` and ``<PolygonLabels name="label"
    toName="image">``. Holes are filled. ``image`` is the path of the predicted image. Label Studio has to serve it.
    """

    file = "label-studio.json"

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.tasks: list[dict[str, Any]] = []

    def add(self, image: str, mask: np.ndarray, scores: dict[int, float]) -> None:
        height, width = mask.shape
        regions: list[dict[str, Any]] = []
        for value in _values(mask):
            for outline in outlines(mask == value):
                points = (outline * (100 / width, 100 / height)).round(3).tolist()
                regions.append(
                    {
                        "id": f"{len(self.tasks)}-{len(regions)}",
                        "type": "polygonlabels",
                        "from_name": "label",
                        "to_name": "image",
                        "original_width": width,
                        "original_height": height,
                        "image_rotation": 0,
                        "score": scores.get(value),
                        "value": {"points": points, "closed": True, "polygonlabels": [self.classes[value - 1]]},
                    }
                )
        self.tasks.append(
            {"data": {"image": image}, "predictions": [{"model_version": DESCRIPTION, "result": regions}]}
        )

    def write(self, folder: Path) -> Path:
        return _write(folder / self.file, json.dumps(self.tasks, ensure_ascii=False))


class Cvat:
    """CVAT's XML, "CVAT for images 1.1": one mask for each class of an image, as runs along the rows of its box."""

    file = "cvat.xml"

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.images: list[str] = []

    def add(self, image: str, mask: np.ndarray, scores: dict[int, float]) -> None:
        height, width = mask.shape
        name = quoteattr(_printable(image))
        lines = [f'  <image id="{len(self.images)}" name={name} width="{width}" height="{height}">']
        for value in _values(mask):
            pixels = mask == value
            rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
            top, left = int(rows[0]), int(columns[0])
            box = pixels[top : rows[-1] + 1, left : columns[-1] + 1]
            lines.append(
                f'    <mask label={quoteattr(_printable(self.classes[value - 1]))} source="auto" occluded="0" '
                f'rle="{", ".join(map(str, _runs(box.ravel())))}" left="{left}" top="{top}" '
                f'width="{box.shape[1]}" height="{box.shape[0]}" z_order="0"/>'
            )
        self.images.append("\n".join([*lines, "  </image>"]))

    def write(self, folder: Path) -> Path:
        head = (
            f'<?xml version="1.0" encoding="utf-8"?>\n<!-- {DESCRIPTION} -->\n<annotations>\n  <version>1.1</version>'
        )
        return _write(folder / self.file, "\n".join([head, *self.images, "</annotations>"]))


FORMS = ("coco", "coco-polygons", "label-studio", "cvat")
"""Values of ``--annotations``."""


def writer(form: str, classes: Sequence[str]) -> Writer:
    """Return the writer of a form. Raises UserError for an unknown form, and for COCO's without pycocotools."""
    if form in ("coco", "coco-polygons"):
        return Coco(classes, polygons=form == "coco-polygons")
    if form == "label-studio":
        return LabelStudio(classes)
    if form == "cvat":
        return Cvat(classes)
    raise UserError(f"--annotations {form}: expected one of {', '.join(FORMS)}")


def is_ours(path: Path) -> bool:
    """Return whether a writer wrote the file."""
    try:
        return DESCRIPTION.encode() in reading.read_bytes(path, reading.INSTANCES)
    except OSError:
        return False


def outlines(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the outer outline of each 8-connected region of bool (H, W), along the pixels' edges.

    An outline is float64 (points, 2), x and y. Points are within half a pixel of the true outline.
    """
    # Contours go through pixel centres. Those of pixels half the size are a quarter of a pixel inside the edge.
    fine = pixels.astype(np.uint8).repeat(2, 0).repeat(2, 1)
    contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    for contour in contours:
        simplified = cv2.approxPolyDP(contour, 0.75, True)
        outline = simplified if len(simplified) > 2 else contour  # a line of pixels would be simplified to two points
        yield outline[:, 0] / 2 + 0.25


def _values(mask: np.ndarray) -> list[int]:
    return [value for value in np.unique(mask).tolist() if value]


def _runs(flat: np.ndarray) -> list[int]:
    """Return the lengths of alternating runs of False and True. The first run is of False and may have length 0."""
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes.tolist(), len(flat)]).tolist()
    return [0, *runs] if flat[0] else runs


def _printable(text: str) -> str:
    """Replace the characters that XML cannot hold."""
    return "".join(c if c in "\t\n" or (ord(c) >= 32 and not 0xD800 <= ord(c) <= 0xDFFF) else "\ufffd" for c in text)


def _write(path: Path, text: str) -> Path:
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))
    return path
