from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydensecrf.densecrf import DenseCRF2D
from pydensecrf.utils import unary_from_labels, unary_from_softmax

from cpn_fast.data.dataset import Sample
from cpn_fast.data.masks import read_mask
from cpn_fast.data.seeds import Seed, read_seed, write_seed
from cpn_fast.refinement import crf
from cpn_fast.runtime.errors import UserError

HEIGHT, WIDTH = 30, 44

# (iterations, sxy and weight of the Gaussian, sxy, srgb and weight of the bilateral term), from the released files.
RELEASED = {
    "seam-labels": (10, 3, 3, 80, 13, 10),
    "seam-walk": (1, 3, 3, 80, 13, 10),
    "cpn": (5, 3, 3, 50, 13, 10),
    "segmentation": (1, 3, 3, 32, 13, 10),
    "irn-labels": (10, 3, 3, 50, 5, 10),
}


def picture() -> np.ndarray:
    """Return a red rectangle on blue, with noise. It covers rows 8 to 21 and columns 12 to 31."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[..., 2] = 200
    image[8:22, 12:32] = (200, 0, 0)
    return image + np.random.default_rng(0).integers(0, 20, image.shape, np.uint8)


def blurred(peak: float = 1.0) -> np.ndarray:
    """Return a CAM over the rectangle that ignores its edges."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (peak * np.exp(-((y - 14.5) ** 2 / 60 + (x - 21.5) ** 2 / 120))).astype(np.float32)


@pytest.mark.parametrize("name", sorted(crf.PARAMETERS))
def test_named_parameters_call_the_library_as_the_released_code_does(name) -> None:
    image, scores = picture(), crf.with_background(Seed(np.array([1, 4]), np.stack([blurred(), blurred(0.4)])), 4)
    iterations, sxy, weight, *bilateral = RELEASED[name]
    plain = DenseCRF2D(WIDTH, HEIGHT, 3)
    if name == "irn-labels":
        plain.setUnaryEnergy(unary_from_labels(scores.argmax(0), 3, gt_prob=0.7, zero_unsure=False))
    else:
        plain.setUnaryEnergy(unary_from_softmax(scores))
    plain.addPairwiseGaussian(sxy=sxy, compat=weight)
    plain.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=image, compat=bilateral[2])
    expected = np.array(plain.inference(iterations)).reshape(3, HEIGHT, WIDTH)
    np.testing.assert_allclose(crf.dense_crf(image, scores, crf.PARAMETERS[name]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(crf.PARAMETERS))
def test_several_scores_of_an_image_share_its_filters_bit_for_bit(name) -> None:
    seed = Seed(np.array([1, 4]), np.stack([blurred(), blurred(0.4)]))
    all_scores = [crf.with_background(seed, alpha) for alpha in (4, 24, 4)]
    together = crf.dense_crfs(picture(), all_scores, crf.PARAMETERS[name])
    for scores, found in zip(all_scores, together, strict=True):
        assert np.array_equal(found, crf.dense_crf(picture(), scores, crf.PARAMETERS[name]))
    assert not np.array_equal(together[0], together[1])


def test_scores_snap_to_the_edges_of_the_image() -> None:
    probabilities = crf.dense_crf(
        picture(), crf.with_background(Seed(np.array([0]), blurred()[None]), 4), crf.PARAMETERS["seam-labels"]
    )
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=0, atol=1e-5)
    found = probabilities.argmax(0)
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[8:22, 12:32] = 1
    assert (found != expected).mean() < 0.02
    assert ((blurred() > 0.5) != expected).mean() > 0.05


def test_background_scores() -> None:
    cam = np.array([[[0.0, 0.5, 1.0]], [[0.0, 0.75, 0.25]]], np.float32)
    scores = crf.with_background(Seed(np.array([3, 5]), cam), 2)
    np.testing.assert_allclose(scores, np.concatenate([[[[1, 0.0625, 0]]], cam]))
    assert scores.dtype == np.float32
    alone = crf.with_background(Seed(np.zeros(0, np.int64), np.zeros((0, 2, 3), np.float32)), 4)
    np.testing.assert_array_equal(alone, np.ones((1, 2, 3)))
    np.testing.assert_array_equal(
        crf.dense_crf(np.zeros((2, 3, 3), np.uint8), alone, crf.PARAMETERS["cpn"]), np.ones((1, 2, 3))
    )


@pytest.fixture
def seeds(tmp_path):
    """Write three images and their seeds of classes 2 and 6. Return samples and the seeds' folder."""
    samples = []
    for name in "abc":
        image = tmp_path / f"{name}.png"
        Image.fromarray(picture()).save(image)
        write_seed(tmp_path / "seeds" / f"{name}.npz", Seed(np.array([2, 6]), np.stack([blurred(), blurred(0.4)])))
        samples.append(Sample(name, image, None, None))
    return samples, tmp_path / "seeds"


def test_masks_are_written_in_processes_and_finished_ones_kept(seeds, tmp_path) -> None:
    samples, folder = seeds
    masks = tmp_path / "masks"
    options: dict[str, Any] = {"sources": {"a": "1", "b": "1", "c": "1"}, "parameters": "seam-labels", "workers": 2}
    alphas = {masks: 4.0, tmp_path / "high": 24.0}
    crf.write_label_maps(samples, folder, alphas, **options)
    paths = [masks / f"{sample.id}.png" for sample in samples]
    found = [read_mask(path) for path in paths]
    assert all(np.array_equal(mask, found[0]) for mask in found)
    assert found[0][14, 20] == 3
    assert set(np.unique(found[0])) <= {0, 3, 7}
    scores = crf.with_background(read_seed(folder / "a.npz"), 24.0)
    alone = crf.dense_crf(picture(), scores, crf.PARAMETERS["seam-labels"]).argmax(0)
    assert np.array_equal(read_mask(tmp_path / "high" / "a.png"), np.array([0, 3, 7])[alone])
    assert not np.array_equal(read_mask(tmp_path / "high" / "a.png"), found[0])
    stamps = [path.stat().st_mtime_ns for path in paths[1:]]
    paths[0].unlink()
    crf.write_label_maps(samples, folder, alphas, **options)
    assert np.array_equal(read_mask(paths[0]), found[0])
    assert [path.stat().st_mtime_ns for path in paths[1:]] == stamps
    options["sources"]["c"] = "2"  # as after its image or seed was replaced
    crf.write_label_maps(samples, folder, alphas, **options)
    assert [path.stat().st_mtime_ns == stamp for path, stamp in zip(paths[1:], stamps, strict=True)] == [True, False]


def test_what_a_process_finds_wrong_reaches_the_user(seeds, tmp_path) -> None:
    samples, folder = seeds
    write_seed(folder / "b.npz", Seed(np.array([2]), np.zeros((1, 10, 10), np.float32)))
    sources = {sample.id: "1" for sample in samples}
    with pytest.raises(UserError, match=r"b\.npz: found a seed of 10x10 pixels, expected 44x30"):
        crf.write_label_maps(samples, folder, {tmp_path / "m": 4.0}, sources=sources, parameters="cpn", workers=1)


def test_a_killed_process_is_explained() -> None:
    with pytest.raises(UserError, match=r"lower crf\.workers"), crf.process_pool(1) as pool:
        pool.submit(os._exit, 1).result()


DOOMED = """
import os, signal
from cpn_fast.refinement import crf

if __name__ == "__main__":
    with crf.process_pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_the_one_that_started_them(tmp_path) -> None:
    """This holds even for SIGKILL, which leaves the parent no time to end them."""
    script = tmp_path / "doomed.py"
    script.write_text(DOOMED)
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL
    process = Path("/proc", done.stdout.strip())
    for _ in range(6000):
        if not process.exists():
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_so_many_crfs_run_at_a_time_as_memory_has_room_for_and_a_larger_one_runs_alone() -> None:
    room, running, seen, lock = crf.Room(1000 * (200 + 60 * 2)), [], [], threading.Lock()

    def job(pixels: int) -> None:
        with lock:
            running.append(pixels)
            seen.append(tuple(running))
        time.sleep(0.01)
        with lock:
            running.remove(pixels)

    with ThreadPoolExecutor(8) as pool:
        jobs = [room.submit(pool, pixels, 2, partial(job, pixels)) for pixels in (*[300] * 12, 5000, *[300] * 5)]
        for done in jobs:
            done.result()
    assert len(seen) == 18
    assert all(together == (5000,) or sum(together) <= 1000 for together in seen)
    assert room._taken == 0


def test_a_crf_that_fails_gives_its_room_back() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    room = crf.Room(1)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                room.submit(pool, 9, 2, broken).result()


def test_the_memory_that_is_available_is_the_machine_s_or_the_container_s(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "/sys/fs/cgroup/memory"
    files = {"/proc/meminfo": "MemAvailable: 8 kB", f"{group}.max": "5000\n", f"{group}.current": "3000\n"}
    files[f"{group}.stat"] = "active_file 100\ninactive_file 200"
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert crf.available_memory() == 5000 - 3000 + 100 + 200
    files[f"{group}.max"] = "max\n"
    assert crf.available_memory() == 8 * 1024
