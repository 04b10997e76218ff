"""DALI pipeline for inference: images at several scales, in batches of one original size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from cpn_fast.config import Rgb
from cpn_fast.data.dataset import Sample
from cpn_fast.pipelines.decode import build, decode, device_id, image_size, read_encoded, run


class ScaledBatch(NamedTuple):
    """Images of one original size at every scale."""

    indices: list[int]
    """Indices of the samples."""
    size: tuple[int, int]
    """Height and width of the originals after EXIF rotation."""
    scales: list[Tensor]
    """float32 (B, 3, h, w) for each scale."""


def scaled_images(
    samples: Sequence[Sample],
    *,
    scales: Sequence[float],
    mean: Rgb,
    std: Rgb,
    batch: int,
    pixels: int,
    device: torch.device,
    threads: int,
    fit: Callable[[int], int],
) -> Iterator[ScaledBatch]:
    """Yield every sample once, in batches of up to ``batch`` images of one size: the largest size first.

    Images of one size keep the list's order. At scale s an H x W image is resized to fit(round(s H)) x fit(round(s W))
    with Keys' cubic filter, antialiased if it shrinks, and normalised as (x - mean) / std with x from 0 to 255.
    ``pixels`` bounds the memory: a batch gets fewer images if its largest scale would hold more pixels, and a scale is
    lowered if one image would hold more. ``threads`` are DALI's. About three batches are in memory at a time. Raises
    UserError for a missing or damaged file.
    """
    sizes: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        sizes.setdefault(image_size(sample.image), []).append(index)
    batches = []
    for size, indices in sorted(sizes.items(), key=lambda item: (math.prod(item[0]), item[0]), reverse=True):
        scaled = [_scaled_size(size, scale, pixels, fit) for scale in scales]
        count = max(1, min(batch, pixels // max(map(math.prod, scaled))))
        for first in range(0, len(indices), count):
            batches.append(_Planned(indices[first : first + count], size, scaled))

    def source(iteration: int) -> tuple[list[np.ndarray], ...]:
        if iteration >= len(batches):
            raise StopIteration
        indices, _, scaled = batches[iteration]
        images = [read_encoded(samples[index].image) for index in indices]
        return [image.data for image in images], *([np.array(size, np.float32)] * len(images) for size in scaled)

    pipeline = Pipeline(batch, threads, device_id(device))
    with pipeline:
        encoded, *targets = fn.external_source(source=source, num_outputs=1 + len(scales), batch=True)
        images = decode(encoded, device)
        pipeline.set_outputs(*(_scaled(images, target, mean, std) for target in targets))
    build(pipeline)
    for number, planned in enumerate(batches):
        paths = [samples[index].image for near in batches[number : number + 3] for index in near.indices]
        yield ScaledBatch(planned.indices, planned.size, run(pipeline, device, ((path, None) for path in paths)))


class _Planned(NamedTuple):
    indices: list[int]
    size: tuple[int, int]
    scaled: list[tuple[int, int]]


def _scaled_size(size: tuple[int, int], scale: float, pixels: int, fit: Callable[[int], int]) -> tuple[int, int]:
    scale = min(scale, math.sqrt(pixels / math.prod(size)))
    height, width = (fit(max(1, round(scale * side))) for side in size)
    return height, width


def _scaled(images: Any, size: Any, mean: Rgb, std: Rgb) -> Any:
    resized = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC)
    return fn.crop_mirror_normalize(resized, mean=list(mean), std=list(std))
