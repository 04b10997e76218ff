"""DALI pipeline for inference: images at several scales, those of one size together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from cpn_fast.config import Rgb
from cpn_fast.dataset import Sample
from cpn_fast.pipelines.decode import decode, device_id, image_size, read_encoded, run


class ScaledBatch(NamedTuple):
    """Images of one original size at every scale."""

    indices: list[int]
    """Which samples these are."""
    size: tuple[int, int]
    """Height and width of the originals, turned upright."""
    scales: list[Tensor]
    """For each scale float32 (B, 3, h, w), or (2 B, 3, h, w) with the mirror images after the images."""


def scaled_images(
    samples: Sequence[Sample],
    *,
    scales: Sequence[float],
    flip: bool,
    mean: Rgb,
    std: Rgb,
    batch: int,
    device: torch.device,
    threads: int,
    fit: Callable[[int], int],
) -> Iterator[ScaledBatch]:
    """Every sample once, in batches of up to ``batch`` images of one size: largest first, then in the list's order.

    At scale s an H x W image is resized to fit(round(s H)) x fit(round(s W)), with Keys' cubic filter, antialiased
    where it shrinks, and normalised as (x - mean) / std with x from 0 to 255. ``threads`` is DALI's. About three
    batches are in memory at a time. Raises UserError for a missing or damaged file.
    """
    sizes: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        sizes.setdefault(image_size(sample.image), []).append(index)
    batches = [
        (size, indices[first : first + batch])
        for size, indices in sorted(sizes.items(), key=lambda item: (item[0][0] * item[0][1], item[0]), reverse=True)
        for first in range(0, len(indices), batch)
    ]

    def source(iteration: int) -> tuple[list[np.ndarray], ...]:
        if iteration >= len(batches):
            raise StopIteration
        size, indices = batches[iteration]
        resized = [np.array([fit(round(scale * side)) for side in size], np.float32) for scale in scales]
        images = [read_encoded(samples[index].image) for index in indices]
        return [image.data for image in images], *([target] * len(images) for target in resized)

    pipeline = Pipeline(batch, threads, device_id(device))
    with pipeline:
        encoded, *targets = fn.external_source(source=source, num_outputs=1 + len(scales), batch=True)
        images = decode(encoded, device)
        pipeline.set_outputs(*(_scaled(images, target, mean, std) for target in targets))
    for number, (size, indices) in enumerate(batches):
        paths = [samples[index].image for _, group in batches[number : number + 3] for index in group]
        tensors = run(pipeline, device, paths)
        yield ScaledBatch(indices, size, [torch.cat([x, x.flip(3)]) if flip else x for x in tensors])


def _scaled(images: Any, size: Any, mean: Rgb, std: Rgb) -> Any:
    resized = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC)
    return fn.crop_mirror_normalize(resized, mean=list(mean), std=list(std))
