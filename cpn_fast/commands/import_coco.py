"""``cpn-fast import-coco``: make a data set in VOC's layout from COCO's JSON of instances, without copying images.

From ``instances_train2014.json`` it makes, in the data set's folder:

- ``JPEGImages/train2014``, a link to the folder of the images;
- ``ImageSets/Segmentation/train2014.txt``, the list of the images; images without an object are negatives;
- ``tags.json``, image id -> class names, to which further imports add theirs;
- ``SegmentationClass/train2014``, palette PNGs. Their values are the categories in the order of their ids, from 1
  without gaps (COCO's ids go to 90 for 80 classes).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import as_file, files
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

import numpy as np
import pydantic
import yaml
from pydantic import Field

from cpn_fast.config import is_class_name
from cpn_fast.config_file import load
from cpn_fast.data.dataset import line_of, raise_problems
from cpn_fast.data.images import IMAGE_SUFFIXES, MAX_PIXELS
from cpn_fast.data.masks import IGNORE, write_mask
from cpn_fast.runtime import distributed, reading
from cpn_fast.runtime.errors import UserError, some, unread
from cpn_fast.runtime.files import MADE_BY, claim, read_note, replacing, write_json
from cpn_fast.runtime.progress import track

IMAGES, LISTS, MASKS = Path("JPEGImages"), Path("ImageSets/Segmentation"), Path("SegmentationClass")
TAGS = Path("tags.json")
LONGEST = 5_000_000
"""Longest outline that is drawn, in pixels."""


class Imported(NamedTuple):
    """The result of an import."""

    list_path: Path
    """The list of images, relative to the data set's folder."""
    classes: tuple[str, ...]
    images: int
    """Number of listed images."""
    negatives: int
    """Number of listed images without an object."""


class Runs(pydantic.BaseModel):
    """Lengths of alternating runs of 0 and 1, down the columns, as numbers or as COCO's text."""

    size: tuple[int, int]
    counts: list[Annotated[int, Field(ge=0, lt=2**31)]] | str


class Object(pydantic.BaseModel):
    """An annotation."""

    id: int | str
    image_id: int | str
    category_id: int
    segmentation: list[list[float]] | Runs
    iscrowd: bool = False


class Image(pydantic.BaseModel):
    id: int | str
    file_name: str
    height: Annotated[int, Field(ge=1, lt=2**31)]
    width: Annotated[int, Field(ge=1, lt=2**31)]

    @property
    def stem(self) -> str:
        """The id of the image in our data set."""
        return PurePosixPath(self.file_name).stem


class Category(pydantic.BaseModel):
    id: int
    name: Annotated[str, Field(min_length=1)]


class Instances(pydantic.BaseModel):
    images: list[Image]
    annotations: list[Object]
    categories: list[Category]


def run(instances: Path, images: Path, root: Path) -> Imported:
    """Import the objects of ``instances``, whose image files are in ``images``, into the data set in ``root``.

    Existing masks are kept if the JSON is the same. Where objects overlap, the smaller is on top. A crowd is a tag like
    any object; in the mask it is IGNORE where no single object is. Raises UserError for missing files, for a JSON that
    is damaged or contradicts itself, and for contradictions with earlier imports.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError("import-coco needs pycocotools, which is not installed: pip install pycocotools")
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; expected the folder with the images of {instances.name}")
    tree, digest = _read(instances)
    _check(instances, images, tree)
    categories = sorted(tree.categories, key=lambda category: category.id)
    values = {category.id: value for value, category in enumerate(categories, 1)}
    classes = tuple(category.name for category in categories)
    objects: dict[int | str, list[Object]] = defaultdict(list)
    for annotation in tree.annotations:
        objects[annotation.image_id].append(annotation)
    negatives = sum(not objects[image.id] for image in tree.images)
    if negatives == len(tree.images):
        raise UserError(
            f"{instances}: no object is annotated in its {len(tree.images)} images, so there is nothing to learn"
        )

    name = instances.stem.removeprefix("instances_")
    masks, list_path = root / MASKS / name, LISTS / f"{name}.txt"
    _agree(root, masks, classes)
    new_tags = {
        image.stem: [classes[value - 1] for value in sorted({values[o.category_id] for o in objects[image.id]})]
        for image in tree.images
    }
    tags = _merged(root, list_path, new_tags)
    _link(root / IMAGES / name, images)
    claim(masks, {"instances_sha256": digest, "classes": list(classes)})

    def draw(image: Image) -> None:
        try:
            write_mask(masks / f"{image.stem}.png", mask_of(image, objects[image.id], values))
        except ValueError as error:
            raise UserError(f"{instances}: {error}") from None

    missing = [image for image in tree.images if not (masks / f"{image.stem}.png").exists()]
    pool = ThreadPoolExecutor(distributed.join().cores)
    try:
        for _ in track(pool.map(draw, missing), f"masks of {name}", total=len(missing)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    write_json(root / TAGS, tags, indent=0)
    with replacing(root / list_path) as file:
        for image in tree.images:
            file.write(f"/{IMAGES / name}/{image.file_name} /{MASKS / name}/{image.stem}.png\n".encode())
    return Imported(list_path, classes, len(tree.images), negatives)


def coco_classes() -> tuple[str, ...]:
    """Return COCO's 80 classes, from configs/coco.yaml."""
    with as_file(files("cpn_fast.configs")) as folder:
        return load(folder / "coco.yaml").classes


def config_lines(imported: Imported, root: Path) -> str:
    """Return the YAML of a config's keys for an imported data set."""
    data = {
        "root": str(root),
        "train_list": str(imported.list_path),
        "eval_list": str(imported.list_path),
        "labels": str(TAGS),
    }
    return yaml.safe_dump({"classes": list(imported.classes), "data": data}, sort_keys=False, allow_unicode=True)


def mask_of(image: Image, objects: Sequence[Object], values: dict[int, int]) -> np.ndarray:
    """Draw the mask uint8 (H, W) with ``values`` of the categories. Raises ValueError for an impossible outline."""
    mask = np.zeros((image.height, image.width), np.uint8)
    largest = np.iinfo(np.int32).max
    visible_area = np.full(mask.shape, largest, np.int32)  # area of the visible object; a crowd is below all objects
    for object_ in objects:  # one at a time: each object takes a byte for every pixel
        pixels = _pixels(object_, image)
        area = largest if object_.iscrowd else np.count_nonzero(pixels)
        pixels &= visible_area >= area
        mask[pixels] = IGNORE if object_.iscrowd else values[object_.category_id]
        visible_area[pixels] = area
    return mask


def _pixels(object_: Object, image: Image) -> np.ndarray:
    """Return the pixels of an object, bool (H, W).

    pycocotools does not decode the runs, because it reads and writes beyond its memory if they do not fit the image.
    """
    from pycocotools import mask as rasteriser

    where, shape = f"annotation {object_.id} of {image.file_name}", (image.height, image.width)
    size = f"{image.width} x {image.height} pixels"
    outlines = object_.segmentation
    if isinstance(outlines, Runs):
        runs = np.array(_parsed(outlines.counts) if isinstance(outlines.counts, str) else outlines.counts, np.int64)
        if outlines.size != shape or (runs < 0).any() or runs.sum() != math.prod(shape):
            raise ValueError(f"{where}: its runs do not cover the {size} of the image")
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(image.width, image.height).T
    if not outlines:
        raise ValueError(f"{where} has no outline (segmentation), and a box is not enough: outline it or delete it")
    for outline in outlines:
        if len(outline) % 2:
            raise ValueError(f"{where}: an outline has {len(outline)} numbers, expected pairs of x and y")
        if not all(-side <= z <= 2 * side for z, side in zip(outline, shape[::-1] * len(outline), strict=False)):
            raise ValueError(f"{where}: an outline goes far beyond the {size} of the image")
        if (length := _length(outline)) > LONGEST:
            raise ValueError(f"{where}: an outline is {length:,.0f} pixels long, expected at most {LONGEST:,}")
    polygons = [outline for outline in outlines if len(outline) >= 6]  # pycocotools takes two points for a box
    if not polygons:
        return np.zeros(shape, bool)
    return rasteriser.decode(rasteriser.merge(rasteriser.frPyObjects(polygons, *shape))).astype(bool)


def _length(outline: Sequence[float]) -> float:
    """Return the length of all edges in pixels. pycocotools takes about 60 bytes of memory for each pixel of it."""
    points = np.asarray(outline).reshape(-1, 2)
    return float(np.abs(np.diff(points, axis=0, append=points[:1])).max(1, initial=0).sum())


def _parsed(text: str) -> list[int]:
    """Parse COCO's text of runs. Other text gives runs that fit no image.

    A character from "0" on holds 5 bits of a signed number, lowest first, and a 6th bit if more characters follow. From
    the fourth number on, a number is the difference from the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64 or shift > 30:
            return [-1]
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return [-1] if shift else runs


def _read(path: Path) -> tuple[Instances, str]:
    """Return the JSON's content and its SHA-256."""
    try:
        content = reading.read_bytes(path, reading.INSTANCES)
        return Instances.model_validate_json(content.removeprefix(b"\xef\xbb\xbf")), hashlib.sha256(content).hexdigest()
    except FileNotFoundError:
        names = sorted(str(file) for file in path.parent.glob("*.json"))
        raise UserError(
            f"{path}: no such file. There are: {', '.join(names) or 'no JSON files in that folder'}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: not readable: {error}") from None
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: expected COCO's instances, with images, annotations and categories; found: "
            f"{key + ': ' if key else ''}{first['msg']}"
        ) from None


def _check(path: Path, folder: Path, tree: Instances) -> None:
    """Raise UserError with every contradiction in the JSON, and with the folder of images."""
    problems: dict[str, list[str]] = defaultdict(list)
    for problem, counts in (
        ("ids of two categories", Counter(category.id for category in tree.categories)),
        ("names of two categories", Counter(category.name for category in tree.categories)),
        ("ids of two images", Counter(image.id for image in tree.images)),
        ("names of two images", Counter(image.stem for image in tree.images)),
    ):
        problems[problem] = [str(key) for key, count in counts.items() if count > 1]
    problems["categories with names that no class may have (background, or spaces around the name)"] = [
        repr(category.name) for category in tree.categories if not is_class_name(category.name)
    ]
    if len(tree.categories) > 254:
        problems["categories, where 8-bit masks hold 254"] = [category.name for category in tree.categories]
    categories, images = {category.id for category in tree.categories}, {image.id for image in tree.images}
    for annotation in tree.annotations:
        if annotation.category_id not in categories:
            unknown = f"annotation {annotation.id} ({annotation.category_id})"
            problems["annotations of a category that is not among categories"].append(unknown)
        if annotation.image_id not in images:
            unknown = f"annotation {annotation.id} ({annotation.image_id})"
            problems["annotations of an image that is not among images"].append(unknown)
    for image in tree.images:
        name = PurePosixPath(image.file_name)
        if name.is_absolute() or ".." in name.parts:
            problems["images outside their folder"].append(image.file_name)
        elif not _is_one_name(name):
            problems["images with names that a list cannot hold (as x.png.jpg)"].append(image.file_name)
        elif name.suffix.lower() not in IMAGE_SUFFIXES:
            problems[f"images that end in none of {', '.join(IMAGE_SUFFIXES)}"].append(image.file_name)
        elif not (folder / name).is_file():
            problems[f"images missing in {folder}"].append(image.file_name)
        if image.width * image.height > MAX_PIXELS:
            problems["images too large to be decoded"].append(image.file_name)
    raise_problems(f"{path} has {len(tree.images)} images", problems)


def _is_one_name(file: PurePosixPath) -> bool:
    """Return whether a line of a list can name an image by its id, the name without its ending."""
    try:
        id_ = str(file.with_suffix(""))
        return line_of(id_, Path(file)) == id_
    except (UserError, ValueError):  # ValueError: the name is empty
        return False


def _agree(root: Path, masks: Path, classes: tuple[str, ...]) -> None:
    """Raise UserError if a folder of masks is not an import's, or if an earlier import had other classes."""
    foreign = masks.exists() and not (masks / MADE_BY).is_file()
    # A killed import leaves a folder with hidden files only.
    if foreign and not (masks.is_dir() and all(path.name.startswith(".") for path in masks.iterdir())):
        raise UserError(f"{masks}: exists, and cpn-fast import-coco did not make it: move it, or rename the JSON")
    for manifest in sorted((root / MASKS).glob(f"*/{MADE_BY}")):
        if manifest.parent == masks:
            continue
        note = read_note(manifest)
        earlier = note.get("classes") if isinstance(note, dict) else None
        if not isinstance(earlier, list):
            raise UserError(f"{manifest}: damaged: delete {manifest.parent} and import this list again")
        if earlier != list(classes):
            raise UserError(
                f"{manifest.parent} was imported with {len(earlier)} classes ({some(earlier, 3)}), this JSON has "
                f"{len(classes)} ({some(classes, 3)}): import lists of other classes into another folder"
            )


def _merged(root: Path, list_path: Path, new_tags: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the data set's tags with the new tags of one list, which replace the list's earlier tags."""
    path = root / TAGS
    try:
        tags: dict[str, list[str]] = json.loads(reading.read_text(path, reading.LABELS))
    except FileNotFoundError:
        return new_tags
    except OSError as error:
        raise unread(path, error) from None
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}; delete it and import again") from None
    other_ids = {mask.stem for mask in (root / MASKS).glob("*/*.png") if mask.parent.name != list_path.stem}
    conflicts = [id_ for id_, names in new_tags.items() if id_ in other_ids and tags.get(id_) != names]
    if conflicts:
        raise UserError(
            f"{root}: {len(conflicts)} images have the name of an image of another list, but other tags "
            f"({', '.join(conflicts[:5])}): import the lists into separate folders"
        )
    return tags | new_tags


def _link(link: Path, images: Path) -> None:
    if link.is_symlink() and link.resolve() == images.resolve():
        return
    if link.is_symlink() or link.exists():
        raise UserError(f"{link}: expected a link to {images}, found {link.resolve()}: move it, or rename the JSON")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(images.resolve())
