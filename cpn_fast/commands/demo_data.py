"""Generator of the demo's data set: small animals with ground truth, in VOC's layout.

On these images a plain CAM fails as it does on photos: it finds only a part of an object. An animal has a small head,
whose colour is a strong cue, and a large body, whose texture is a weak cue and whose colour is often that of another
class. So a classifier needs only the head. Each animal has a favourite ground. Untagged things lie around, some of them
in the colours of heads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
from numpy.random import Generator

from cpn_fast.data.masks import IGNORE, write_mask
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.owner import owned

DEMO_CLASSES = ("fish", "beetle", "snail", "turtle", "bird")

SIZES = ((176, 144), (144, 176), (160, 160), (200, 150), (128, 160))
"""Width and height of images, in pixels."""
FINE = 2
"""Pictures are drawn this many times larger and averaged down, which smooths every edge."""
MIN_VISIBLE = 40
"""Pixels of an animal that must be visible, without those behind other animals and those of its void border."""
VERSION = 1
"""Raise this when the pictures change. Data sets of older versions are then replaced."""
MARKER = "demo.json"
"""File of a complete data set that holds the arguments of ``generate``."""
FOLDERS = (("JPEGImages", ".jpg"), ("SegmentationClass", ".png"), ("Annotations", ".xml"))
LISTS = "ImageSets/Segmentation"


def generate(root: Path, *, seed: int = 0, train: int = 400, val: int = 100) -> None:
    """Write ``train`` and ``val`` images, masks, annotations and lists into ``root``. A complete data set is kept.

    The same seed gives the same bytes, and no image depends on the number of images. The folder appears only when it is
    complete. An incomplete data set, or one of other arguments, is replaced. Raises UserError if ``root`` holds other
    files.
    """
    arguments = json.dumps({"version": VERSION, "seed": seed, "train": train, "val": val})
    lists = {name: [f"{name}_{i:04d}" for i in range(count)] for name, count in (("train", train), ("val", val))}
    partial, replaced = (root.with_name(f".{root.name}.{kind}") for kind in ("partial", "replaced"))
    with owned(root.parent, part=root.name, waits=True):
        for leftover in (partial, replaced):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        if _is_complete(root, arguments, lists):
            return
        if root.exists() and not _is_ours(root):
            raise UserError(f"{root}: holds files that are not the demo's data set; name another folder or empty it")
        for folder in (*(folder for folder, _ in FOLDERS), LISTS):
            (partial / folder).mkdir(parents=True)
        for split, (name, ids) in enumerate(lists.items()):
            for i, id_ in enumerate(ids):
                _write(partial, id_, *_scene(np.random.default_rng([seed, split, i])))
            (partial / LISTS / f"{name}.txt").write_text("".join(f"{id_}\n" for id_ in ids))
        (partial / MARKER).write_text(arguments)
        if root.exists():
            root.rename(replaced)  # not deleted in place: a half-deleted folder would look like a foreign one
        partial.rename(root)
        shutil.rmtree(replaced, ignore_errors=True)


def _is_complete(root: Path, arguments: str, lists: dict[str, list[str]]) -> bool:
    marker = root / MARKER
    files = [root / folder / f"{id_}{suffix}" for folder, suffix in FOLDERS for ids in lists.values() for id_ in ids]
    files += [root / LISTS / f"{name}.txt" for name in lists]
    return marker.is_file() and marker.read_text() == arguments and all(file.is_file() for file in files)


def _is_ours(root: Path) -> bool:
    if not root.is_dir():
        return False
    names = {path.name for path in root.iterdir()}
    return not names or (MARKER in names and names <= {MARKER, "ImageSets", *(folder for folder, _ in FOLDERS)})


def _write(root: Path, id_: str, image: np.ndarray, instances: np.ndarray, kinds: list[int]) -> None:
    _, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    (root / f"JPEGImages/{id_}.jpg").write_bytes(jpeg.tobytes())
    values = np.array([0, *(kind + 1 for kind in kinds), *[IGNORE] * (256 - len(kinds) - 1)], np.uint8)
    write_mask(root / f"SegmentationClass/{id_}.png", values[instances])
    tree = ElementTree.Element("annotation")
    ElementTree.SubElement(tree, "filename").text = f"{id_}.jpg"
    size = ElementTree.SubElement(tree, "size")
    for tag, length in zip(("height", "width", "depth"), image.shape, strict=True):
        ElementTree.SubElement(size, tag).text = str(length)
    for i, kind in enumerate(kinds, 1):
        thing = ElementTree.SubElement(tree, "object")
        ElementTree.SubElement(thing, "name").text = DEMO_CLASSES[kind]
        box = ElementTree.SubElement(thing, "bndbox")
        y, x = np.nonzero(instances == i)
        for tag, edge in zip(("xmin", "ymin", "xmax", "ymax"), (x.min(), y.min(), x.max(), y.max()), strict=True):
            ElementTree.SubElement(box, tag).text = str(edge + 1)  # VOC counts from 1
    ElementTree.indent(tree)
    (root / f"Annotations/{id_}.xml").write_bytes(ElementTree.tostring(tree))


# Scenes

Ground = Callable[[Generator, int, int], np.ndarray]
"""Generator, width, height -> float32 (H, W, 3)."""
Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Body coordinates x and y -> brightness, about -1 to 1, all of one shape."""
Paint = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Picture coordinates x and y (H, W) -> colours (H, W, 3)."""
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Animal:
    """Outlines (N, 2) in body coordinates: x runs from the tail at -1 to the neck at 1, y from the back down."""

    ground: Ground
    from_above: bool
    body: np.ndarray
    coat: Colour
    texture: Texture
    limbs: tuple[np.ndarray, ...]
    head: np.ndarray
    head_colour: Colour
    details: tuple[tuple[np.ndarray, Colour], ...]


def _scene(rng: Generator) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return the image uint8 (H, W, 3), the instances uint8 (H, W), and the kinds of animals.

    In the instances 0 is background, i + 1 is kinds[i], and borders are IGNORE.
    """
    while True:
        width, height = SIZES[rng.integers(len(SIZES))]
        kinds = [int(kind) for kind in rng.choice(len(ANIMALS), rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]))]
        ground = ANIMALS[kinds[0]].ground if rng.random() < 0.3 else GROUNDS[rng.integers(len(GROUNDS))]
        picture = _Picture(ground(rng, width * FINE, height * FINE))
        for _ in range(rng.integers(1, 5)):
            THINGS[rng.integers(len(THINGS))](rng, picture)
        for i, (kind, pose) in enumerate(zip(kinds, _poses(rng, kinds, width * FINE, height * FINE), strict=True), 1):
            picture.draw(ANIMALS[kind], pose, _coat(rng, ANIMALS[kind]), i)
        light = _noise(rng, width * FINE, height * FINE, 150) * 0.4 + rng.uniform(0.7, 0.9)
        image = cv2.resize(picture.pixels * light[..., None], (width, height), interpolation=cv2.INTER_AREA)
        image += rng.normal(0, 3, image.shape)
        instances = _with_borders(picture.instances[::FINE, ::FINE])
        if all((instances == i).sum() >= MIN_VISIBLE for i in range(1, len(kinds) + 1)):
            return np.rint(image).clip(0, 255).astype(np.uint8), instances, kinds


def _with_borders(instances: np.ndarray) -> np.ndarray:
    """Set the pixels along the outline of each object to IGNORE, one on each side, as VOC does."""
    edge = cv2.morphologyEx(instances, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    return np.where(edge, np.uint8(IGNORE), instances)


@dataclass(frozen=True)
class _Pose:
    """Position of an animal: maps its body coordinates to the picture."""

    x: float
    y: float
    scale: float
    angle: float = 0
    mirror: int = 1

    @property
    def _axes(self) -> np.ndarray:
        c, s = np.cos(self.angle), np.sin(self.angle)
        return self.scale * np.array([[c * self.mirror, s * self.mirror], [-s, c]])

    def to_picture(self, points: np.ndarray) -> np.ndarray:
        return points @ self._axes + (self.x, self.y)

    def to_body(self, points: np.ndarray) -> np.ndarray:
        return (points - (self.x, self.y)) @ np.linalg.inv(self._axes)


def _poses(rng: Generator, kinds: list[int], width: int, height: int) -> list[_Pose]:
    """Return poses of large, medium and small animals that hardly overlap."""
    poses: list[_Pose] = []
    side = min(width, height)
    for kind in kinds:
        low, high = ((0.3, 0.4), (0.22, 0.3), (0.13, 0.2))[rng.choice(3, p=[0.5, 0.35, 0.15])]
        scale = side * rng.uniform(low, high) * 0.8 ** len(poses)
        turn = np.pi if ANIMALS[kind].from_above else 0.3
        for _ in range(30):
            x, y = (rng.uniform(0.8 * scale, length - 0.8 * scale) for length in (width, height))
            if all(np.hypot(x - other.x, y - other.y) > 0.9 * (scale + other.scale) for other in poses):
                break
        poses.append(_Pose(x, y, scale, rng.uniform(-turn, turn), int(rng.choice([-1, 1]))))
    return poses


SHADOW: Colour = (20, 20, 20)


class _Picture:
    """A picture to draw on: pixels float32 (H, W, 3) in RGB, instances uint8 (H, W)."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.instances: np.ndarray = np.zeros(pixels.shape[:2], np.uint8)

    def fill(
        self,
        outline: np.ndarray,
        colour: Paint | np.ndarray | Colour,
        *,
        instance: int | None = None,
        opacity: float = 1,
    ) -> None:
        """Fill a polygon (N, 2) of picture coordinates."""
        height, width = self.instances.shape
        left, top = np.maximum(np.floor(outline.min(0)).astype(int) - 1, 0)
        right, bottom = np.minimum(np.ceil(outline.max(0)).astype(int) + 2, (width, height))
        if left >= right or top >= bottom:
            return
        cover = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(cover, [np.rint((outline - (left, top)) * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
        rgb = colour(*np.mgrid[top:bottom, left:right][::-1]) if callable(colour) else colour
        alpha = cover[..., None] * np.float32(opacity / 255)
        window = np.s_[top:bottom, left:right]
        self.pixels[window] += alpha * (np.asarray(rgb, np.float32) - self.pixels[window])
        if instance is not None:
            self.instances[window][cover > 127] = instance

    def draw(self, animal: Animal, pose: _Pose, coat: np.ndarray, instance: int) -> None:
        """Draw an animal whose body has the colour ``coat`` (RGB)."""

        def shaded(rgb: np.ndarray, texture: Texture, outline: np.ndarray) -> Paint:
            middle, reach = outline.mean(0), np.ptp(outline, 0) / 2

            def paint(x: np.ndarray, y: np.ndarray) -> np.ndarray:
                points = pose.to_body(np.stack([x, y], -1))
                bulge = 1.12 - 0.4 * (((points - middle) / reach) ** 2).sum(-1)
                return rgb * (bulge * (1 + 0.5 * texture(points[..., 0], points[..., 1])))[..., None]

            return paint

        self.fill(pose.to_picture(animal.body) + 0.12 * pose.scale, SHADOW, opacity=0.3)
        for limb in animal.limbs:
            self.fill(pose.to_picture(limb), coat * 0.6, instance=instance)
        self.fill(pose.to_picture(animal.body), shaded(coat, animal.texture, animal.body), instance=instance)
        head = shaded(np.array(animal.head_colour), lambda x, _: 0 * x, animal.head)
        self.fill(pose.to_picture(animal.head), head, instance=instance)
        for outline, rgb in animal.details:
            self.fill(pose.to_picture(outline), rgb, instance=instance)


# Outlines and textures, in body coordinates


def _oval(x: float, y: float, a: float, b: float, angle: float = 0) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([a * np.cos(t), b * np.sin(t)], 1) @ [[c, s], [-s, c]] + (x, y)


def _rod(x0: float, y0: float, x1: float, y1: float, width: float) -> np.ndarray:
    along = np.array([x1 - x0, y1 - y0])
    across = np.array([-along[1], along[0]]) * width / 2 / np.hypot(*along)
    start, end = np.array([x0, y0]), np.array([x1, y1])
    return np.array([start + across, end + across * 0.6, end - across * 0.6, start - across])


def _scales(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    row = np.floor(x / 0.16)
    u, v = x / 0.16 - row, (y / 0.26 + row / 2) % 1 - 0.5
    return 2.4 * np.abs(u - 1.6 * v**2) % 1 * 2 - 1


def _spots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    row = np.round(y / 0.34)
    u, v = (x / 0.4 + row / 2) % 1 - 0.5, y / 0.34 - row
    return np.where(u**2 * 1.4 + v**2 < 0.09, -1.3, 0.35) - 1.5 * (np.abs(y) < 0.03)


def _spiral(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    r, angle = np.hypot(x + 0.15, y + 0.15), np.arctan2(y + 0.15, x + 0.15)
    return np.sin(2 * np.pi * r / 0.24 - angle)


def _plates(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a honeycomb: dark where two lattice points are about equally near."""
    first = np.full(x.shape, np.inf)
    second = first.copy()
    for shift in (0, 0.5):
        for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)):
            u = x / 0.42 - shift - (np.floor(x / 0.42 - shift) + i)
            v = y / 0.727 - shift - (np.floor(y / 0.727 - shift) + j)
            distance = np.hypot(u, v * 0.727 / 0.42)
            second = np.minimum(second, np.maximum(distance, first))
            first = np.minimum(first, distance)
    return np.where(second - first < 0.16, -1.2, 0.5 - first)


def _feathers(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(np.sin(2 * np.pi * (x + 0.8 * np.abs(y)) / 0.2) > 0, 0.6, -0.6)


# Grounds: float32 (H, W, 3)


def _noise(rng: Generator, width: int, height: int, cell: int) -> np.ndarray:
    """Return smooth noise float32 (H, W) of about 0 to 1, whose hills are ``cell`` pixels wide."""
    coarse = rng.random((height // cell + 2, width // cell + 2), np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _blend(share: np.ndarray, dark: Colour, bright: Colour) -> np.ndarray:
    low, high = np.array(dark, np.float32), np.array(bright, np.float32)
    return low + share[..., None].astype(np.float32) * (high - low)


def _meadow(rng: Generator, width: int, height: int) -> np.ndarray:
    pixels = _blend(_noise(rng, width, height, 40), (52, 92, 34), (98, 140, 52))
    for x, y, lean, green in rng.random((width * height // 130, 4)):
        foot = (int(x * width), int(y * height))
        tip = (int(foot[0] + (lean - 0.5) * 14), int(foot[1] - 8 - 10 * lean))
        cv2.line(pixels, foot, tip, (50 + 70 * green, 90 + 80 * green, 30 + 40 * green), 1, cv2.LINE_AA)
    return pixels


def _water(rng: Generator, width: int, height: int) -> np.ndarray:
    y = np.arange(height)[:, None]
    waves = np.sin(y * 0.22 + 9 * _noise(rng, width, height, 45)) * _noise(rng, width, height, 20)
    return _blend(0.5 + 0.5 * waves, (28, 84, 128), (110, 170, 200))


def _sand(rng: Generator, width: int, height: int) -> np.ndarray:
    x, y = np.arange(width), np.arange(height)[:, None]
    ripples = np.sin((x * 0.4 + y) * 0.16 + 7 * _noise(rng, width, height, 60))
    return _blend(0.5 + 0.2 * ripples + 0.3 * (_noise(rng, width, height, 2) - 0.5), (168, 140, 98), (226, 202, 152))


def _cobbles(rng: Generator, width: int, height: int) -> np.ndarray:
    seeds = np.ones((height, width), np.uint8)
    y, x = np.mgrid[12:height:30, 12:width:30]
    jitter = rng.integers(-10, 11, (2, *x.shape))
    seeds[(y + jitter[1]).clip(0, height - 1), (x + jitter[0]).clip(0, width - 1)] = 0
    distance, stone = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    seams = cv2.morphologyEx(stone.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    gray = rng.uniform(0.35, 1, x.size + 1)[stone] - distance / 60 + 0.2 * _noise(rng, width, height, 4)
    return _blend(np.where(seams, 0, gray), (62, 60, 60), (160, 156, 150))


def _leaves(rng: Generator, width: int, height: int) -> np.ndarray:
    pixels = _blend(_noise(rng, width, height, 12), (50, 36, 24), (84, 62, 40))
    for x, y, turn, size, hue in rng.random((width * height // 260, 5)):
        colour = np.array((96, 62, 30)) * (0.6 + 0.8 * hue) + (40 * size, 10 * turn, 0)
        axes = (int(7 + 8 * size), int(3 + 4 * size))
        cv2.ellipse(
            pixels, (int(x * width), int(y * height)), axes, 360 * turn, 0, 360, colour.tolist(), -1, cv2.LINE_AA
        )
    return pixels


GROUNDS: tuple[Ground, ...] = (_meadow, _water, _sand, _cobbles, _leaves)


# Coats and untagged things


def _coat(rng: Generator, animal: Animal) -> np.ndarray:
    """Return the RGB of a body: half of the time the colour of its class, otherwise that of any class."""
    model = animal if rng.random() < 0.5 else ANIMALS[rng.integers(len(ANIMALS))]
    return np.array(model.coat) * rng.uniform(0.8, 1.2) + rng.normal(0, 8, 3)


def _somewhere(rng: Generator, picture: _Picture, low: float, high: float) -> _Pose:
    height, width = picture.instances.shape
    scale = min(width, height) * rng.uniform(low, high)
    return _Pose(rng.uniform(0, width), rng.uniform(0, height), scale, rng.uniform(-np.pi, np.pi))


def _bright(rng: Generator) -> Colour:
    """Return a random colour, sometimes that of an animal's head."""
    if rng.random() < 0.15:
        return ANIMALS[rng.integers(len(ANIMALS))].head_colour
    red, green, blue = (int(value) for value in rng.integers(40, 240, 3))
    return red, green, blue


def _pebble(rng: Generator, picture: _Picture) -> None:
    pose = _somewhere(rng, picture, 0.04, 0.12)
    outline = _oval(0, 0, 1, 0.7) * (1 + 0.15 * np.sin(np.arange(48) / 48 * 2 * np.pi * 3 + rng.uniform(0, 6)))[:, None]
    coat = _coat(rng, ANIMALS[rng.integers(len(ANIMALS))])
    picture.fill(pose.to_picture(outline) + 3, SHADOW, opacity=0.3)
    picture.fill(pose.to_picture(outline), coat * 0.8)
    picture.fill(pose.to_picture(outline * 0.7 - 0.12), coat)


def _flower(rng: Generator, picture: _Picture) -> None:
    pose = _somewhere(rng, picture, 0.03, 0.06)
    colour = _bright(rng)
    for angle in np.arange(5) * 2 * np.pi / 5:
        picture.fill(pose.to_picture(_oval(0.6 * np.cos(angle), 0.6 * np.sin(angle), 0.5, 0.3, angle)), colour)
    picture.fill(pose.to_picture(_oval(0, 0, 0.3, 0.3)), (90, 60, 40))


def _stick(rng: Generator, picture: _Picture) -> None:
    pose = _somewhere(rng, picture, 0.1, 0.25)
    picture.fill(pose.to_picture(_rod(-1, 0, 1, 0.1, 0.14)), (92, 66, 42))
    picture.fill(pose.to_picture(_rod(0, 0, 0.5, -0.45, 0.1)), (80, 58, 38))


def _ball(rng: Generator, picture: _Picture) -> None:
    pose = _somewhere(rng, picture, 0.04, 0.09)
    picture.fill(pose.to_picture(_oval(0, 0, 1, 1)), _bright(rng))
    picture.fill(pose.to_picture(_oval(0, 0, 1, 0.35)), _bright(rng))
    picture.fill(pose.to_picture(_oval(-0.4, -0.4, 0.2, 0.15)), (245, 245, 245))


THINGS: tuple[Callable[[Generator, _Picture], None], ...] = (_pebble, _flower, _stick, _ball)


# Animals, in body coordinates


def _eye(x: float, y: float, r: float) -> tuple[tuple[np.ndarray, Colour], ...]:
    return (_oval(x, y, r, r), (245, 245, 240)), (_oval(x + 0.2 * r, y, 0.55 * r, 0.55 * r), (15, 15, 20))


FISH = Animal(
    ground=_water,
    from_above=False,
    body=_oval(-0.1, 0, 0.95, 0.48),
    coat=(92, 116, 140),
    texture=_scales,
    limbs=(
        np.array([(-0.85, 0), (-1.4, -0.45), (-1.25, 0), (-1.4, 0.45)]),
        np.array([(-0.5, -0.35), (-0.3, -0.75), (0.35, -0.4)]),
        np.array([(-0.3, 0.35), (-0.35, 0.68), (0.15, 0.42)]),
    ),
    head=_oval(0.74, 0, 0.44, 0.41),
    head_colour=(245, 120, 25),
    details=(*_eye(0.84, -0.13, 0.12), (_rod(0.92, 0.17, 1.14, 0.12, 0.06), (120, 40, 10))),
)
BEETLE = Animal(
    ground=_leaves,
    from_above=True,
    body=_oval(-0.1, 0, 0.85, 0.62),
    coat=(84, 62, 56),
    texture=_spots,
    limbs=tuple(_rod(x, 0.4 * s, 1.5 * x, 1.0 * s, 0.13) for x in (-0.5, 0, 0.4) for s in (-1, 1)),
    head=_oval(0.88, 0, 0.37, 0.44),
    head_colour=(215, 15, 50),
    details=(
        *((_rod(1.15, 0.15 * s, 1.5, 0.42 * s, 0.08), (30, 15, 20)) for s in (-1, 1)),
        *(eye for s in (-1, 1) for eye in _eye(1.04, 0.24 * s, 0.1)),
    ),
)
SNAIL = Animal(
    ground=_meadow,
    from_above=False,
    body=_oval(-0.15, -0.15, 0.74, 0.7),
    coat=(170, 130, 92),
    texture=_spiral,
    limbs=(np.array([(-1.3, 0.62), (-0.6, 0.3), (0.8, 0.3), (1.05, 0.62)]),),
    head=_oval(0.9, 0.27, 0.34, 0.38),
    head_colour=(255, 225, 30),
    details=(
        *((_rod(0.94, 0.0, 1.02 + 0.16 * s, -0.42, 0.09), (255, 225, 30)) for s in (-1, 1)),
        *(eye for s in (-1, 1) for eye in _eye(1.02 + 0.16 * s, -0.44, 0.1)),
    ),
)
TURTLE = Animal(
    ground=_sand,
    from_above=True,
    body=_oval(-0.1, 0, 0.82, 0.68),
    coat=(104, 116, 60),
    texture=_plates,
    limbs=(
        *(_oval(0.6 * x - 0.1, 0.66 * y, 0.34, 0.2, x * y * 0.8) for x in (-1, 1) for y in (-1, 1)),
        np.array([(-0.8, -0.12), (-1.15, 0), (-0.8, 0.12)]),
    ),
    head=_oval(1.0, 0, 0.37, 0.32),
    head_colour=(10, 215, 165),
    details=tuple(eye for s in (-1, 1) for eye in _eye(1.13, 0.17 * s, 0.08)),
)
BIRD = Animal(
    ground=_cobbles,
    from_above=False,
    body=_oval(-0.15, 0.05, 0.82, 0.5, 0.15),
    coat=(140, 132, 140),
    texture=_feathers,
    limbs=(
        np.array([(-0.8, -0.1), (-1.45, -0.3), (-1.5, 0.05), (-0.75, 0.25)]),
        _rod(-0.1, 0.4, -0.05, 0.95, 0.09),
        _rod(0.12, 0.4, 0.2, 0.95, 0.09),
    ),
    head=_oval(0.72, -0.3, 0.4, 0.38),
    head_colour=(120, 70, 225),
    details=((np.array([(1.05, -0.44), (1.48, -0.24), (1.04, -0.14)]), (60, 55, 60)), *_eye(0.83, -0.4, 0.11)),
)
ANIMALS = (FISH, BEETLE, SNAIL, TURTLE, BIRD)
"""In the order of DEMO_CLASSES."""
