"""The cost of provenance and checksums: the comparisons of a stage that has nothing to make, next to its work.

``python bench/provenance.py`` makes images of VOC's size with seeds and masks (``--images`` of them) and compares them
as the stages do. It prints seconds for VOC's 10,582 images, and their share of a stage's time on one core. Files are in
the page cache, as they are if the stage has just read them or reads them next.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cpn_fast.data import provenance
from cpn_fast.data.images import read_image
from cpn_fast.data.masks import write_mask
from cpn_fast.data.png import can_be_kept
from cpn_fast.data.provenance import image_digest
from cpn_fast.data.seeds import Seed, read_seed, seed_digest, seed_source, write_seed
from cpn_fast.refinement.crf import PARAMETERS, dense_crf, with_background

VOC = 10_582
HEIGHT, WIDTH = 375, 500
CLASSES = np.array([3, 8])


def seconds(work: Callable[[int], object], count: int) -> float:
    """Return the seconds of ``work`` for VOC's images, from the time of ``count`` images."""
    begin = time.perf_counter()
    for number in range(count):
        work(number)
    return (time.perf_counter() - begin) / count * VOC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    count = parser.parse_args().images
    with tempfile.TemporaryDirectory() as scratch:
        images, seeds, masks = (
            [Path(scratch, f"{number}.{ending}") for number in range(count)] for ending in ("jpg", "npz", "png")
        )
        rng = np.random.default_rng(0)
        for image, seed, mask in zip(images, seeds, masks, strict=True):
            small = rng.integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), np.uint8)
            Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(image, quality=95)
            cam = rng.random((len(CLASSES), HEIGHT // 25, WIDTH // 25), np.float32).repeat(25, 1).repeat(25, 2)
            write_seed(seed, Seed(CLASSES, cam), "0" * 32)
            write_mask(mask, (cam[0] > 0.5).astype(np.uint8), "0" * 32)
        size = sum(image.stat().st_size for image in images) / count / 1000
        provenance._known.clear()
        costs = {
            "digests of the images": seconds(lambda number: image_digest(images[number]), count),
            "sources of the seeds": seconds(lambda number: seed_source(seeds[number]), count),
            "digests of the seeds": seconds(lambda number: seed_digest(seeds[number]), count),
            "checksums and sources of the masks": seconds(lambda number: can_be_kept(masks[number], "0" * 32), count),
        }
        decoding = seconds(lambda number: read_image(images[number]), count)

        def crf(number: int) -> None:
            scores = with_background(read_seed(seeds[number]), 4.0)
            dense_crf(read_image(images[number]), scores, PARAMETERS["seam-labels"])

        crfs = seconds(crf, min(count, 5))
    print(f"{VOC:,} images of {size:.0f} kB ({WIDTH} x {HEIGHT}), in memory, one core:")
    print(f"decoding them, which every stage does: {decoding:.0f} s; one CRF of each: {crfs:.0f} s")
    for name, cost in costs.items():
        print(f"{name}: {cost:.1f} s, {cost / decoding:.1%} of decoding, {cost / crfs:.2%} of the CRFs")
    print(f"together: {sum(costs.values()):.1f} s, {sum(costs.values()) / crfs:.2%} of the CRFs")


if __name__ == "__main__":
    main()
