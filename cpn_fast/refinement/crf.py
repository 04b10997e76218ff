"""Dense CRF (Krähenbühl and Koltun, NIPS 2011) with pydensecrf, for an image's scores and for a data set's seeds.

pydensecrf holds Python's lock, so every image runs in another process. Its time grows with the number of labels, so an
image has only the background and its tagged classes. A result is a palette PNG with the most probable class of each
pixel.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpn_fast.config import CrfName
from cpn_fast.data.dataset import Sample
from cpn_fast.data.images import opened, read_image
from cpn_fast.data.masks import write_mask
from cpn_fast.data.png import can_be_kept
from cpn_fast.data.seeds import Seed, read_seed
from cpn_fast.runtime.backlog import Backlog
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.progress import Progress


class Parameters(NamedTuple):
    """Pairwise terms: Potts, with a Gaussian of position, and one of position and colour."""

    iterations: int
    near_sxy: float
    """Deviation of the first Gaussian in pixels."""
    near_weight: float
    sxy: float
    """Deviation of the second one in pixels."""
    srgb: float
    """Deviation of the second one in colour levels of 256."""
    weight: float
    certainty: float | None = None
    """Probability of the best class in the unary term; None: the scores themselves."""


PARAMETERS: dict[CrfName, Parameters] = {
    "seam-labels": Parameters(10, 3, 3, 80, 13, 10),
    "seam-walk": Parameters(1, 3, 3, 80, 13, 10),
    "cpn": Parameters(5, 3, 3, 50, 13, 10),
    "segmentation": Parameters(1, 3, 3, 32, 13, 10),
    "irn-labels": Parameters(10, 3, 3, 50, 5, 10, certainty=0.7),
}
"""The released settings. ``seam-labels`` (also of psa) labels pairs for AffinityNet. ``seam-walk`` follows the random
walk and draws the pictures of SEAM and CPN. ``cpn`` is in CPN's code, but unused. ``segmentation`` follows the
segmenter."""


def with_background(seed: Seed, alpha: float) -> np.ndarray:
    """Return scores of background and present classes, float32 (1 + k, H, W); background is (1 - max cam) ** alpha."""
    background = (1 - seed.cam.max(0, initial=0)) ** np.float32(alpha)
    return np.concatenate([background[None], seed.cam])


def dense_crf(image: np.ndarray, scores: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Return probabilities of labels, float32 (K, H, W), that follow the edges of the image, uint8 RGB (H, W, 3).

    scores: float32 (K, H, W) from 0 to 1, with K at least 1. As in the released code they need not sum to 1.
    """
    (probabilities,) = dense_crfs(image, [scores], parameters)
    return probabilities


def dense_crfs(image: np.ndarray, all_scores: Sequence[np.ndarray], parameters: Parameters) -> list[np.ndarray]:
    """Return ``dense_crf`` of several scores of one shape, bit for bit, in less time.

    The image's filters, a quarter of the work, are built only once.
    """
    from pydensecrf.densecrf import DenseCRF2D  # only this function needs the compiled library

    labels, height, width = all_scores[0].shape
    if image.dtype != np.uint8 or image.shape != (height, width, 3):
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 {(height, width, 3)}")
    if labels == 1:
        return [np.ones((1, height, width), np.float32) for _ in all_scores]
    crf = DenseCRF2D(width, height, labels)
    crf.addPairwiseGaussian(sxy=parameters.near_sxy, compat=parameters.near_weight)
    crf.addPairwiseBilateral(
        sxy=parameters.sxy, srgb=parameters.srgb, rgbim=np.ascontiguousarray(image), compat=parameters.weight
    )
    refined = []
    for scores in all_scores:
        if parameters.certainty is not None:
            best = np.arange(labels)[:, None, None] == scores.argmax(0)
            scores = np.where(best, parameters.certainty, (1 - parameters.certainty) / (labels - 1))
        unary = -np.log(np.clip(scores, 1e-5, 1)).reshape(labels, -1)
        crf.setUnaryEnergy(np.ascontiguousarray(unary, np.float32))
        refined.append(np.array(crf.inference(parameters.iterations), np.float32).reshape(labels, height, width))
    return refined


class Room:
    """Memory that CRFs share: a CRF starts when it fits beside the running ones, or when none is running.

    The estimate is 200 bytes per pixel and 60 more per label: 9 GB for an image of 24 megapixels with 3 labels. On
    noise, the worst case, 700 x 700 pixels took 282 bytes per pixel with 2 labels and 494 with 6. A smooth image took
    197 with 2 labels.
    """

    def __init__(self, size: int | None = None) -> None:
        """size: bytes; by default half of the memory that this process can still get."""
        self.size = available_memory() // 2 if size is None else size
        self._taken = 0
        self._changed = threading.Condition()

    def submit(self, pool: Executor, pixels: int, labels: int, job: Callable[[], None]) -> Future[None]:
        """Submit a job to the pool, once there is room for its CRF."""
        need = pixels * (200 + 60 * labels)
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + need <= self.size)
            self._taken += need
        try:
            future = pool.submit(job)
        except BaseException:
            self._give_back(need)
            raise
        future.add_done_callback(lambda _: self._give_back(need))
        return future

    def _give_back(self, need: int) -> None:
        with self._changed:
            self._taken -= need
            self._changed.notify_all()


def available_memory() -> int:
    """Return the bytes that this process can still get from the machine or from its container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            taken = int(Path("/sys/fs/cgroup/memory.current").read_text())
            shares = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            cached = int(shares["active_file"]) + int(shares["inactive_file"])  # file cache, which makes room
            limits.append(max(0, int(limit) - taken + cached))
    except (OSError, ValueError, LookupError):
        pass  # the machine's memory is known
    return min(limits)


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Run a pool of processes for CRFs. If the block fails, waiting jobs are dropped."""
    context = multiprocessing.get_context("forkserver")  # a plain fork could hang on torch's threads
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, initializer=_follow_parent)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a CRF process died. If memory ran out, lower crf.workers. If your own script started it, put the script's "
            'work under `if __name__ == "__main__":`, since the processes import the script'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Prepare a process of the pool: its parent handles Ctrl-C, and it ends when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def write_label_maps(
    samples: Sequence[Sample],
    seeds: Path,
    folders: Mapping[Path, float],
    *,
    sources: Mapping[str, str],
    parameters: CrfName,
    workers: int,
) -> None:
    """Write ``FOLDER/ID.png``, the CRF's mask of ``seeds/ID.npz``. ``folders`` maps each folder to its alpha.

    Masks of ``sources[ID]`` are kept. Raises UserError for a missing or damaged seed or image.
    """
    jobs: list[tuple[Sample, dict[Path, float]]] = []
    for sample in samples:
        masks = {folder / f"{sample.id}.png": alpha for folder, alpha in folders.items()}
        kept = {path for path in masks if can_be_kept(path, sources[sample.id])}
        jobs.append((sample, {path: alpha for path, alpha in masks.items() if path not in kept}))
    jobs = [(sample, masks) for sample, masks in jobs if masks]
    if not jobs:
        return
    alphas = " and ".join(f"{alpha:g}" for alpha in folders.values())
    room = Room()
    stage = f"CRF, alpha {alphas}"
    progress = Progress(stage, len(jobs))
    writing = Backlog(2 * workers, progress.advance)
    with process_pool(min(workers, len(jobs))) as pool, progress, writing:
        for sample, masks in jobs:
            with opened(sample.image) as image:
                pixels = math.prod(image.size)
            labels = 1 + (1 if sample.label is None else int(sample.label.sum()))
            job = partial(_write_label_maps, sample, seeds, masks, sources[sample.id], parameters)
            writing.add(room.submit(pool, pixels, labels, job))


def _write_label_maps(
    sample: Sample, seeds: Path, masks: Mapping[Path, float], source: str, parameters: CrfName
) -> None:
    image, seed_path = sample.image, seeds / f"{sample.id}.npz"
    seed, pixels = read_seed(seed_path), read_image(image)
    if seed.cam.shape[1:] != pixels.shape[:2]:
        raise UserError(
            f"{seed_path}: found a seed of {seed.cam.shape[2]}x{seed.cam.shape[1]} pixels, expected "
            f"{pixels.shape[1]}x{pixels.shape[0]} as in {image}: delete it and run `cpn-fast cam` again"
        )
    all_scores = [with_background(seed, alpha) for alpha in masks.values()]
    for path, scores in zip(masks, dense_crfs(pixels, all_scores, PARAMETERS[parameters]), strict=True):
        write_mask(path, class_values(seed)[scores.argmax(0)], source)


def class_values(seed: Seed) -> np.ndarray:
    """Return the mask value of each score of ``with_background``, uint8 (1 + k,)."""
    return np.concatenate([[0], seed.classes + 1]).astype(np.uint8)
