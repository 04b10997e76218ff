"""Images per CPU second: our DALI pipeline against a Pillow + NumPy DataLoader that does the same.

The rows are decoding alone, a training batch, and a training batch with cached superpixels, at two crop sizes. A rate
is images over CPU seconds of all threads of the process, so that other work on the machine has little effect. Rounds of
the two alternate. Before timing, both must give the same batches with the random parts switched off.

On a GPU the rows are training batches with superpixels, by the wall clock with all cores. Ours uses DALI's threads and
the GPU, where the batches end. The peer is a DataLoader with a process for each core, whose batches stay on the CPU.

    python bench/data_pipeline.py [--images FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import torch
from nvidia import dali
from nvidia.dali import Pipeline, fn
from PIL import Image, ImageEnhance
from timing import arguments, folder, machine, plot_bars, print_table, write_json
from torch.utils.data import DataLoader, Dataset

from cpn_fast.config import Augment, Superpixels
from cpn_fast.data.dataset import Sample
from cpn_fast.pipelines.decode import decode, read_encoded
from cpn_fast.pipelines.superpixels import SuperpixelCache
from cpn_fast.pipelines.training import TrainingPipeline

CPU = torch.device("cpu")
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BATCH = 4
SETTINGS = {448: Augment(), 225: Augment(crop=225, long_side=(225, 385))}
OFF: dict[str, Any] = {"flip": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


class PillowDataset(Dataset[tuple[np.ndarray, ...]]):
    """The released order of operations, with torchvision's jitter on Pillow images."""

    def __init__(self, samples: Sequence[Sample], augment: Augment, cache: SuperpixelCache | None) -> None:
        self.samples, self.augment = samples, augment
        distinct = {sample.id: sample for sample in samples}
        self.maps = {id_: cache.path(sample) for id_, sample in distinct.items()} if cache else {}
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        sample, augment, rng = self.samples[index], self.augment, self.rng
        image = Image.open(sample.image).convert("RGB")
        scale = rng.integers(*augment.long_side, endpoint=True) / max(image.size)
        size = round(image.width * scale), round(image.height * scale)
        image = image.resize(size, Image.Resampling.BICUBIC)
        flip = rng.random() < augment.flip
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = (np.asarray(self.jitter(image), np.float32) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        source, target = zip(*(self.place(side) for side in pixels.shape[:2]), strict=True)
        crop = np.zeros((augment.crop, augment.crop, 3), np.float32)
        crop[target] = pixels[source]
        image_and_map = [np.ascontiguousarray(crop.transpose(2, 0, 1))]
        if self.maps:
            labels = Image.open(self.maps[sample.id]).resize(size, Image.Resampling.NEAREST)
            if flip:
                labels = labels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            padded = np.zeros((augment.crop, augment.crop), np.int32)
            padded[target] = np.asarray(labels)[source]
            image_and_map.append(padded)
        return tuple(image_and_map)

    def place(self, side: int) -> tuple[slice, slice]:
        """Return the slices of the image and of the crop along one side."""
        crop = self.augment.crop
        offset = int(self.rng.integers(abs(side - crop), endpoint=True))
        if side < crop:
            return slice(None), slice(offset, offset + side)
        return slice(offset, offset + crop), slice(None)

    def jitter(self, image: Image.Image) -> Image.Image:
        augment, rng = self.augment, self.rng
        for kind in rng.permutation(4):
            if kind == 3:
                if augment.hue:
                    hue, saturation, value = image.convert("HSV").split()
                    turned = np.asarray(hue) + np.uint8(int(rng.uniform(-augment.hue, augment.hue) * 255) % 256)
                    image = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
                continue
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
            spread = (augment.brightness, augment.contrast, augment.saturation)[kind]
            if spread:
                image = enhance(image).enhance(rng.uniform(1 - spread, 1 + spread))
        return image


def ours(
    samples: Sequence[Sample], augment: Augment, cache: SuperpixelCache | None, device: torch.device, threads: int
) -> TrainingPipeline:
    path = cache.path if cache else None
    return TrainingPipeline(
        samples,
        augment,
        batch=BATCH,
        mean=MEAN,
        std=STD,
        seed=0,
        device=device,
        threads=threads,
        map_path=path,
    )


def pillow(samples: Sequence[Sample], augment: Augment, cache: SuperpixelCache | None) -> Iterator[Any]:
    while True:
        yield from DataLoader(PillowDataset(samples, augment, cache), BATCH, shuffle=True, drop_last=True)


def our_decoding(samples: Sequence[Sample]) -> Iterator[Any]:
    pipeline = Pipeline(BATCH, 1, None)
    with pipeline:
        pipeline.set_outputs(decode(fn.external_source(source=lambda step: encoded(step), batch=True), CPU))

    def encoded(step: int) -> list[np.ndarray]:
        return [read_encoded(samples[(step * BATCH + i) % len(samples)].image).data for i in range(BATCH)]

    while True:
        yield pipeline.run()


def pillow_decoding(samples: Sequence[Sample]) -> Iterator[Any]:
    while True:
        for first in range(0, len(samples) - BATCH + 1, BATCH):
            yield [np.asarray(Image.open(s.image).convert("RGB")) for s in samples[first : first + BATCH]]


def check_same(samples: Sequence[Sample], crop: int, cache: SuperpixelCache) -> None:
    """Compare images of the crop's size without flip and jitter. Only the padding is random, so it is cut off."""
    plain = Augment(crop=crop, long_side=(crop, crop), **OFF)
    peer = PillowDataset(samples, plain, cache)
    for batch, _ in zip(ours(samples, plain, cache, CPU, 1), range(len(samples) // BATCH), strict=False):
        assert batch.pixel_map is not None
        for image, labels, index in zip(batch.images, batch.pixel_map, batch.indices.tolist(), strict=True):
            (a, a_labels), (b, b_labels) = content(image.numpy(), labels.numpy()), content(*peer[index])
            assert a.shape == b.shape, f"{samples[index].id}: {a.shape} against {b.shape}"
            error, agreement = np.abs(a - b).mean(), (a_labels == b_labels).mean()
            assert error < 0.02, f"{samples[index].id}: images differ by {error}"
            assert agreement > 0.99, f"{samples[index].id}: {agreement} of the superpixel map agrees"


def content(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shown = np.asarray(image.any(axis=0))
    inside = np.ix_(shown.any(axis=1), shown.any(axis=0))
    return image[:, inside[0], inside[1]], labels[inside]


def rate(batches: Iterator[Any], count: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(count):
        next(batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count * BATCH / (clock() - start)


def compare(samples: Sequence[Sample], cache: SuperpixelCache, rounds: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair: medians, and the lowest and highest ratio of a round."""
    pairs: dict[str, tuple[Iterator[Any], Iterator[Any]]] = {
        "decode only": (pillow_decoding(samples), our_decoding(samples))
    }
    for crop, augment in SETTINGS.items():
        check_same(samples, crop, cache)
        for name, optional_cache in (("", None), (" + superpixels", cache)):
            pairs[f"train, crop {crop}{name}"] = (
                pillow(samples, augment, optional_cache),
                iter(ours(samples, augment, optional_cache, CPU, 1)),
            )
    for name, pair in pairs.items():
        for batches in pair:
            rate(batches, 3, time.process_time)  # warms up, and fills the prefetch queue
        rates = np.array([[rate(batches, count, time.process_time) for batches in pair] for _ in range(rounds)])
        peer, ours_ = np.median(rates, 0)
        ratios = rates[:, 1] / rates[:, 0]
        yield {
            "what": name,
            "pillow": float(peer),
            "ours": float(ours_),
            "ratio": float(ours_ / peer),
            "lowest": float(ratios.min()),
            "highest": float(ratios.max()),
        }


def on_gpu(
    samples: Sequence[Sample], cache: SuperpixelCache, device: torch.device, count: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each crop: medians of ten successive rounds, and 20th and 80th percentiles."""
    cores = os.cpu_count() or 1
    for crop, augment in SETTINGS.items():
        check_same(samples, crop, cache)
        long_list = PillowDataset([*samples] * 1000, augment, cache)  # so that its processes start only once
        peer = DataLoader(long_list, BATCH, shuffle=True, drop_last=True, num_workers=cores)
        row: dict[str, Any] = {"what": f"train, crop {crop} + superpixels"}
        for name, loader in (("pillow", peer), ("ours", ours(samples, augment, cache, device, cores))):
            batches = iter(loader)
            rate(batches, 4 * cores, time.perf_counter)  # fills the queues
            rates = [rate(batches, count, time.perf_counter) for _ in range(10)]
            low, row[name], high = (float(value) for value in np.quantile(rates, (0.2, 0.5, 0.8)))
            row |= {f"{name} p20": low, f"{name} p80": high}
            del batches
        yield row | {"ratio": row["ours"] / row["pillow"]}


def generate(parent: Path, count: int) -> None:
    """Write JPEGs of VOC's usual size, with detail at several scales."""
    for index in range(count):
        rng = np.random.default_rng(index)
        layers = [cv2.resize(rng.normal(0, 40, (375 // n, 500 // n, 3)), (500, 375)) for n in (1, 8, 60)]
        pixels = (128 + layers[0] / 4 + layers[1] / 2 + layers[2]).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(parent / f"{index}.jpg", quality=90)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs (default: generated ones)")
    parser.add_argument("--count", type=int, default=64, help="how many images to read")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each; medians are reported")
    parser.add_argument("--batches", type=int, default=12, help=f"batches of {BATCH} in a round")
    options = parser.parse_args()
    device, out = options.device, folder(options.out, options.device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        if not options.images:
            generate(Path(temporary), options.count)
        files = sorted((options.images or Path(temporary)).glob("*.jpg"))
        files = files[:: max(1, len(files) // options.count)][: options.count]
        samples = [Sample(file.stem, file, None, np.ones(1, bool)) for file in files]
        cache = SuperpixelCache(Path(temporary), Superpixels())
        cache.build(samples, workers=os.cpu_count() or 1)
        if device.type == "cuda":
            measured, unit = on_gpu(samples, cache, device, 50), "images/s"
        else:
            measured, unit = compare(samples, cache, options.rounds, options.batches), "images/CPU s"
        described = machine(device) | {"dali": dali.__version__, "pillow": PIL.__version__}
        rows: list[dict[str, Any]] = []
        save = functools.partial(write_json, out / "data_pipeline.json", described, rows, unit=unit)
        for row in measured:
            rows.append(row)
            save(finished=False)
        save()

    print_table(unit, rows)
    bars = {row["what"]: {"Pillow + NumPy": row["pillow"], "ours": row["ours"]} for row in rows}
    plot_bars(out / "data_pipeline.png", "Data pipeline", unit, bars)


if __name__ == "__main__":
    main()
