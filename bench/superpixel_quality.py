"""How well superpixels follow objects: fast-slic's, scikit-image's and our kernel's, for counts of 50, 200 and 1,000.

For each way, means over images of

- superpixels: their number;
- boundary recall: the share of true boundary pixels that are within 2 pixels of a superpixel's boundary;
- under-segmentation error: for each pair of a superpixel and a class, the smaller of its parts inside and outside the
  class, as a share of all pixels (Neubert and Protzel 2012);
- compactness: 4 pi area / perimeter^2 of a superpixel, 1 for a circle, weighted by its area (Schick et al. 2012).

More superpixels score better. So each way also runs with the count that gives it as many superpixels as fast-slic. A
picture shows the three on an image of the demo.

    python bench/superpixel_quality.py [--voc VOC2012] [--scored 60] [--out FOLDER]
"""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib import pyplot
from PIL import Image
from skimage.segmentation import find_boundaries, slic
from superpixels import generated_scene, spread
from timing import arguments, folder, machine, print_table, write_json

from cpn_fast.commands.demo_data import generate
from cpn_fast.config import Superpixels
from cpn_fast.data.images import read_image
from cpn_fast.pipelines.superpixels import described, segment

COUNTS = (50, 200, 1000)
Way = Callable[[np.ndarray, int], np.ndarray]


def fast_slic(image: np.ndarray, count: int) -> np.ndarray:
    return segment(image, Superpixels(engine="fast-slic", count=count))


def scikit_image(image: np.ndarray, count: int) -> np.ndarray:
    return slic(image, n_segments=count, compactness=10, start_label=0)


def kernel(image: np.ndarray, count: int) -> np.ndarray:
    return segment(image, Superpixels(engine="kernel", count=count))


WAYS: dict[str, Way] = {"fast-slic": fast_slic, "scikit-image": scikit_image, "kernel": kernel}


def compare(title: str, scenes: Sequence[tuple[np.ndarray, np.ndarray]], counts: Sequence[int]) -> list[dict[str, Any]]:
    """Score superpixels of uint8 images against their true classes (255 unknown): a row for each way and count."""
    rows = []
    for count in counts:
        maps = {name: [way(image, count) for image, _ in scenes] for name, way in WAYS.items()}
        for name in ("scikit-image", "kernel"):
            maps[f"{name}, as many as fast-slic"] = [
                WAYS[name](image, max(1, round(count * number(wanted) / number(labels))))
                for (image, _), wanted, labels in zip(scenes, maps["fast-slic"], maps[name], strict=True)
            ]
        for name, of_way in maps.items():
            scores = np.array([score(labels, truth) for labels, (_, truth) in zip(of_way, scenes, strict=True)])
            recall, error, compactness = np.nanmean(scores, 0)
            mean_number = np.mean([number(labels) for labels in of_way])
            row = {"images": title, "way": name, "asked for": count, "superpixels": mean_number}
            row |= {"boundary recall": recall, "under-segmentation": error, "compactness": compactness}
            rows.append(row)
            print_table(f"{title}, {len(scenes)} images", rows[-1:])
    return rows


def number(labels: np.ndarray) -> int:
    return len(np.unique(labels))


def score(labels: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Return boundary recall (NaN without a boundary), under-segmentation error and compactness."""
    known, count = truth != 255, int(labels.max()) + 1
    # Unknown pixels surround the objects: the true boundary is halfway between the nearest known pixels.
    _, nearest = cv2.distanceTransformWithLabels((~known).astype(np.uint8), cv2.DIST_L2, 5, labelType=1)
    classes = np.zeros(nearest.max() + 1, truth.dtype)
    classes[nearest[known]] = truth[known]
    edges = find_boundaries(classes[nearest])
    near = cv2.dilate(find_boundaries(labels).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    recall = float(near[edges].mean()) if edges.any() else math.nan
    pairs = np.bincount(labels[known].astype(np.int64) * 256 + truth[known], minlength=256 * count).reshape(count, 256)
    error = np.minimum(pairs, pairs.sum(1, keepdims=True) - pairs).sum() / known.sum()
    framed = np.pad(labels.astype(np.int64), 1, constant_values=-1)
    sides = sum(framed[1:-1, 1:-1] != np.roll(framed, step, axis)[1:-1, 1:-1] for step in (1, -1) for axis in (0, 1))
    area = np.bincount(labels.ravel(), minlength=count)
    perimeter = np.bincount(labels.ravel(), weights=np.ravel(sides), minlength=count)
    roundness = 4 * math.pi * area / np.maximum(perimeter, 1) ** 2
    return recall, float(error), float((area * roundness).sum() / area.sum())


def voc_scene(mask: Path) -> tuple[np.ndarray, np.ndarray]:
    image = read_image(mask.parents[1] / "JPEGImages" / f"{mask.stem}.jpg")
    return image, np.asarray(Image.open(mask))


def draw(path: Path) -> None:
    """Draw the three ways next to each other on an image of the demo, with counts of 50 and 200."""
    with tempfile.TemporaryDirectory() as data:
        generate(Path(data), seed=3, train=1, val=1)
        image = read_image(next(Path(data).rglob("*.jpg")))
    figure, axes = pyplot.subplots(2, len(WAYS), figsize=(12, 8), squeeze=False)
    for row, count in zip(axes, (50, 200), strict=True):
        for axis, (name, way) in zip(row, WAYS.items(), strict=True):
            labels = cv2.resize(way(image, count).astype(np.uint16), None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
            shown = cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
            shown[find_boundaries(labels, mode="inner")] = (255, 255, 0)
            axis.imshow(shown)
            axis.set_title(f"{name}: {number(labels)} of {count}")
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--voc", type=Path, help="a folder with JPEGImages and SegmentationClass, instead of generated images"
    )
    parser.add_argument("--scored", type=int, default=60, help="images to score")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="requested numbers of superpixels")
    options = parser.parse_args()
    out = folder(options.out, options.device)
    rows = []
    if options.voc:
        masks = spread(sorted((options.voc / "SegmentationClass").glob("*.png")), options.scored)
        rows += compare("VOC", [voc_scene(mask) for mask in masks], options.counts)
    else:
        rows += compare("generated", [generated_scene(seed) for seed in range(options.scored)], options.counts)
    print_table("Quality of the superpixels", rows)
    engines = [described(Superpixels(engine="fast-slic")), described(Superpixels(engine="kernel"))]
    version = importlib.metadata.version("scikit-image")
    write_json(
        out / "superpixel_quality.json", machine(options.device) | {"engines": engines, "scikit_image": version}, rows
    )
    draw(out / "superpixel_quality.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
