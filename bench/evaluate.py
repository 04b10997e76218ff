"""Scoring CAM seeds at the released code's 40 background thresholds: one pass against 40.

Seeds are generated, 500 x 375, of 1 to 3 classes out of 20, halved as CPN saves them; thresholds are .20, .21 ... .59.

- released: for each threshold an argmax over 21 planes, then three counts for each class;
- 40 passes: for each threshold the best present class where it exceeds the threshold, then one histogram;
- ours: ``ThresholdSweep``, at these 40 thresholds and at 100.

All get arrays in memory and one thread. They must agree in every count before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from timing import arguments, call_times, folder, machine, print_table, write_json

from cpn_fast.data.masks import IGNORE
from cpn_fast.data.scores import Scores, ThresholdSweep, confusion
from cpn_fast.data.seeds import Seed

CLASSES, HEIGHT, WIDTH, IMAGES = 20, 375, 500, 6
THRESHOLDS = np.arange(20, 60) / 100

Scored = Sequence[tuple[Seed, np.ndarray]]


def generated(index: int) -> tuple[Seed, np.ndarray]:
    """Return smooth blobs as CAMs, and a ground truth with ignored edges that roughly fits them."""
    rng = np.random.default_rng(index)
    classes = np.sort(rng.choice(CLASSES, 1 + index % 3, replace=False))
    coarse = rng.random((len(classes), 5, 7)).astype(np.float32)
    cam = np.stack([cv2.resize(plane, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) for plane in coarse]).clip(0, 1)
    noise = cv2.resize(rng.random((40, 50)).astype(np.float32), (WIDTH, HEIGHT)) / 5
    truth = Seed(classes, cam + noise).mask(0.6)
    edge = cv2.dilate(truth, np.ones((5, 5))) != truth
    truth[edge] = IGNORE
    return Seed(classes, cam / 2), truth


def released(images: Scored) -> np.ndarray:
    """Return counts [threshold, true positives / predicted / true, class]."""
    counts = np.zeros((len(THRESHOLDS), 3, CLASSES + 1), np.int64)
    for count, threshold in zip(counts, THRESHOLDS, strict=True):
        for seed, truth in images:
            planes = np.zeros((CLASSES + 1, HEIGHT, WIDTH), np.float32)
            planes[seed.classes + 1] = seed.cam
            planes[0] = threshold
            prediction = planes.argmax(0).astype(np.uint8)
            counted = truth < IGNORE
            right = (prediction == truth) & counted
            for value in range(CLASSES + 1):
                true = truth == value
                count[:, value] += (
                    np.sum(true & right),
                    np.sum((prediction == value) & counted),
                    np.sum(true & counted),
                )
    return counts


def many_passes(images: Scored) -> np.ndarray:
    """Return counts [threshold, true class, predicted class]."""
    counts = [sum(confusion(seed.mask(t), truth, CLASSES) for seed, truth in images) for t in THRESHOLDS]
    return np.array(counts)


def one_pass(images: Scored, thresholds: np.ndarray) -> np.ndarray:
    """Return counts [threshold, true class, predicted class]."""
    sweep = ThresholdSweep(thresholds, CLASSES)
    for seed, truth in images:
        sweep.add(seed, truth)
    return sweep.confusion()


def main() -> None:
    options = arguments(__doc__).parse_args()
    device = torch.device("cpu")  # scoring always runs on the CPU
    images = [generated(index) for index in range(IMAGES)]

    counts = one_pass(images, THRESHOLDS)
    scores = Scores(counts)
    np.testing.assert_array_equal(counts, many_passes(images))
    hits = np.diagonal(counts, axis1=1, axis2=2)
    np.testing.assert_array_equal(np.stack([hits, scores.predicted, scores.true], 1), released(images))

    ways: dict[str, Callable[[], object]] = {
        "released, 40 thresholds": lambda: released(images),
        "40 passes, 40 thresholds": lambda: many_passes(images),
        "ours, 40 thresholds": lambda: one_pass(images, THRESHOLDS),
        "ours, 100 thresholds": lambda: one_pass(images, np.arange(100) / 100),
    }
    rows: list[dict[str, Any]] = []
    described, path = machine(device), folder(options.out, device) / "evaluate.json"
    for way, run in ways.items():
        times = call_times(run, device, budget=40)
        median, low, high = (1e3 * seconds / IMAGES for seconds in times[:3])
        row = {"way": way, "ms per image": median, "p20": low, "p80": high, "repeats": times.repeats}
        rows.append(row | {"times faster than released": (rows or [row])[0]["ms per image"] / median})
        write_json(path, described, rows, finished=len(rows) == len(ways))
    print_table(f"Scoring {IMAGES} seeds of {WIDTH} x {HEIGHT}: all counts are equal", rows)
    print(path)


if __name__ == "__main__":
    main()
