"""Scores of seeds and masks: confusion counts, for seeds at every background threshold in one pass over the pixels."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cpn_fast.data.masks import IGNORE
from cpn_fast.data.seeds import Seed

Kind = Literal["held-out", "fixed", "oracle", "masks"]


@dataclass(frozen=True)
class Scores:
    """Scores of K foreground classes and, at index 0, the background. Leading axes, if any, are thresholds.

    A class that is neither in the ground truth nor predicted has no IoU: it is NaN and does not enter means. The
    released scripts add 1e-10 to the union instead, which counts this class as 0. A class that is never predicted has
    no precision (NaN), and a class that is not in the ground truth has no recall (NaN).
    """

    confusion: np.ndarray
    """int64 (..., K + 1, K + 1): pixels by [true class, predicted class]."""

    @property
    def iou(self) -> np.ndarray:
        """float64 (..., K + 1): TP / (TP + FP + FN)."""
        return _ratio(self._hits, self.true + self.predicted - self._hits)

    @property
    def precision(self) -> np.ndarray:
        """float64 (..., K + 1): TP / (TP + FP)."""
        return _ratio(self._hits, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """float64 (..., K + 1): TP / (TP + FN)."""
        return _ratio(self._hits, self.true)

    @property
    def true(self) -> np.ndarray:
        """int64 (..., K + 1): pixels of each class in the ground truth."""
        return self.confusion.sum(-1)

    @property
    def predicted(self) -> np.ndarray:
        """int64 (..., K + 1): pixels predicted as each class."""
        return self.confusion.sum(-2)

    @property
    def mean_iou(self) -> np.ndarray:
        """mIoU: mean of ``iou``, background included."""
        return _mean(self.iou)

    @property
    def background_iou(self) -> np.ndarray:
        return self.iou[..., 0]

    @property
    def foreground_iou(self) -> np.ndarray:
        """Mean of ``iou`` without the background."""
        return _mean(self.iou[..., 1:])

    @property
    def mean_precision(self) -> np.ndarray:
        return _mean(self.precision)

    @property
    def mean_recall(self) -> np.ndarray:
        return _mean(self.recall)

    @property
    def accuracy(self) -> np.ndarray:
        """Share of correctly predicted pixels."""
        return _ratio(self._hits.sum(-1), self.confusion.sum((-2, -1)))

    @property
    def _hits(self) -> np.ndarray:
        return np.diagonal(self.confusion, axis1=-2, axis2=-1)


SUMMARY = {
    "mean_iou": "mIoU",
    "background_iou": "background IoU",
    "foreground_iou": "foreground mIoU",
    "mean_precision": "mean precision",
    "mean_recall": "mean recall",
    "accuracy": "pixel accuracy",
}
"""Attribute of ``Scores`` with a single figure -> its name in tables."""


@dataclass(frozen=True)
class Result:
    """Scores at one threshold, or scores of masks."""

    kind: Kind
    threshold: float | None
    scores: Scores


@dataclass(frozen=True)
class Curve:
    """Scores at every threshold of the grid."""

    thresholds: np.ndarray
    """float64 (n,)"""
    scores: Scores
    """Leading axis n."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a folder of seeds or masks, with its list and classes."""

    source: Path
    """Folder of the seeds or masks."""
    list_path: str
    """The list of images."""
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    """Foreground names."""
    results: tuple[Result, ...]
    """Seeds: held-out and fixed if given, then oracle. Masks: one result."""
    curve: Curve | None = None
    """Only for seeds."""
    path: Path | None = None
    """The evaluation.json, once written."""

    @property
    def oracle(self) -> Scores:
        """Scores at the best threshold on this ground truth."""
        return self._scores("oracle")

    @property
    def fixed(self) -> Scores:
        """Scores at a threshold chosen without this ground truth: the held-out one, or else the config's."""
        return self._scores("held-out", "fixed")

    def _scores(self, *kinds: Kind) -> Scores:
        for result in self.results:
            if result.kind in kinds:
                return result.scores
        raise LookupError(f"no {' or '.join(kinds)} threshold among {[result.kind for result in self.results]}")


class ThresholdSweep:
    """Confusion counts at every background threshold in one pass over the pixels.

    Against a constant background score only a pixel's best foreground class can win, and it wins at every threshold
    below its score. So pixels are counted by the number of these thresholds, best class and true class. Sums over the
    number give each threshold's counts. The result equals one argmax over [threshold, scores of all classes] per
    threshold in float32, where the background wins a tie because it comes first.
    """

    def __init__(self, thresholds: np.ndarray, classes: int) -> None:
        """thresholds: (n,) in [0, 1], ascending; classes: number of foreground classes."""
        self._thresholds = np.asarray(thresholds, np.float32)
        self._classes = classes
        # [thresholds below the score, predicted foreground class, true class]
        self._foreground = np.zeros((len(thresholds) + 1, classes, classes + 1), np.int64)
        self._true = np.zeros(classes + 1, np.int64)
        self._lock = threading.Lock()

    def add(self, seed: Seed, truth: np.ndarray) -> None:
        """Count an image. truth: uint8 (H, W), values 0 to classes or IGNORE. Threads may call it concurrently."""
        present, columns = len(seed.classes), self._classes + 2
        # Ignored pixels go to a last column, which is dropped.
        true = np.minimum(truth, self._classes + 1).astype(np.intp)
        totals = np.bincount(true.ravel(), minlength=columns)
        if present:
            below = np.searchsorted(self._thresholds, seed.cam.max(0))
            key = (below * present + seed.cam.argmax(0)) * columns + true
            counts = np.bincount(key.ravel(), minlength=(len(self._thresholds) + 1) * present * columns)
        with self._lock:
            self._true += totals[:-1]
            if present:
                self._foreground[:, seed.classes] += counts.reshape(-1, present, columns)[..., :-1]

    def confusion(self) -> np.ndarray:
        """int64 (n, K + 1, K + 1): [threshold, true class, predicted class]."""
        won = self._foreground[::-1].cumsum(0)[-2::-1]  # [threshold, predicted, true]: scores above the threshold
        background = self._true - won.sum(1)
        return np.concatenate([background[:, None], won], 1).swapaxes(1, 2)


def confusion(prediction: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Return int64 (K + 1, K + 1), [true, predicted], of two uint8 masks of one shape. truth may hold IGNORE."""
    counted = truth != IGNORE
    key = truth[counted].astype(np.intp) * (classes + 1) + prediction[counted]
    return np.bincount(key, minlength=(classes + 1) ** 2).reshape(classes + 1, classes + 1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis without NaN."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(-1), known.sum(-1))
