"""DALI pipeline for training: shuffled images, augmented together with a map of labels per pixel.

DALI draws no random numbers here. NumPy makes a plan for every step: the images, and the crop in source pixels and the
colour matrix of each. All random numbers come from counter-based streams with the key (seed, epoch, position in the
epoch). The graph only executes the plan. So training can start at any step, and a step does not depend on the number of
ranks.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torch.nn import functional as F

from cpn_fast.config import Augment, Rgb, Superpixels
from cpn_fast.data.dataset import Sample
from cpn_fast.data.masks import read_mask
from cpn_fast.data.png import is_whole_png
from cpn_fast.pipelines.batch import Batch
from cpn_fast.pipelines.decode import build, decode, device_id, read_encoded, run
from cpn_fast.pipelines.shards import Shards
from cpn_fast.pipelines.superpixels import segment_batch
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError

SHUFFLE, AUGMENT = range(2)  # streams of random numbers
PREFETCH = 2  # batches
WINDOW = 4096  # samples of shards that are shuffled together; all processes together hold as many in memory
GRAYSCALE, PALETTE = 0, 3  # PNG's colour types
GRAY = np.tile([0.299, 0.587, 0.114], (3, 1))  # RGB -> luma in every channel


class TrainingPipeline:
    """An endless iterator over augmented batches.

    Geometry follows the released code. The long side is resized to a random length with Keys' cubic filter, antialiased
    if it shrinks (as in Pillow; on a GPU by DALI, which repeats the edge pixels beyond the border). Then come a flip
    and a crop, or padding at a random offset if a side is too short. ``augment.scale`` instead draws one factor for
    both sides. The map gets the same geometry with nearest-neighbour sampling.

    Colour follows torchvision's ColorJitter: factors of brightness, contrast (around the mean gray of the image) and
    saturation, and a turn of the hue, in random order. There are three differences. The four become one matrix, so that
    values are clipped once at the end and not rounded. Hue turns RGB around the gray axis; this equals the turn in HSV
    at multiples of 120 degrees, but not between them. The mean gray is taken before resizing.

    An epoch is a new order of all samples, cut into steps of ``batch * world`` images; an incomplete last step is
    dropped. Samples of shards are read in the order of their files: the shards come in random order, and then every
    WINDOW neighbours are shuffled. A process reads its part of a window at once and holds it while it reads the next.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        augment: Augment,
        *,
        batch: int,
        mean: Rgb,
        std: Rgb,
        seed: int,
        device: torch.device,
        threads: int,
        map_path: Callable[[Sample], Path] | None = None,
        online: Superpixels | None = None,
        shards: Shards | None = None,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
    ) -> None:
        """Take ``batch`` images per rank and step, normalised as (x - mean) / std with x from 0 to 255.

        Maps come from PNGs, gray of 8 or 16 bits or with a palette of 256 (``map_path``), or are superpixels of each
        crop (``online``), or are None. ``shards`` hold the files of ``samples``, which must be theirs, and their maps
        if they have ``bits``. ``threads`` are DALI's. The first batch belongs to ``start_step``.

        Raises ValueError if the samples do not fill one step, and for arguments that exclude each other. Iteration
        raises UserError for a missing, damaged or stale file.
        """
        if map_path is not None and online is not None:
            raise ValueError("map_path and online exclude each other")
        if map_path is not None and shards is not None:
            raise ValueError("map_path names loose files, but shards hold their maps: they exclude each other")
        labels = [sample.label for sample in samples if sample.label is not None]
        if len(labels) < len(samples):
            raise ValueError(f"{len(samples) - len(labels)} of {len(samples)} samples have no label")
        self.steps_per_epoch = len(samples) // (batch * world)
        if self.steps_per_epoch == 0:
            raise ValueError(f"{len(samples)} samples do not fill a step of {world} x {batch} images")
        self._samples, self._augment, self._seed = samples, augment, seed
        self._map_path, self._online = map_path, online
        self._batch, self._rank, self._world = batch, rank, world
        self._start = self._step = start_step
        self._device, self._threads = device, threads
        self._labels = torch.from_numpy(np.stack(labels).astype(np.float32))
        self._mean, self._std = mean, std
        self._colours = [torch.tensor(value, dtype=torch.float32, device=device).view(3, 1, 1) for value in (mean, std)]
        self._shards = shards
        self._bits = None if shards is None else shards.bits
        if map_path is not None:
            _, _, _, self._bits = _read_map(map_path(samples[0]))
        if shards is not None:
            self._from_shards = self._stream(shards)
            self._held: dict[tuple[int, int], tuple[bytes, ...]] = {}
            self._in_flight: deque[tuple[Path, bytes]] = deque(maxlen=2 * batch * (PREFETCH + 2))
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pipeline = Pipeline(batch, threads, device_id(device), prefetch_queue_depth=PREFETCH)
        with self._pipeline:
            self._pipeline.set_outputs(*self._graph())
        build(self._pipeline)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next batch. On a GPU a side stream makes it, so the host does not wait for the step before."""
        if self._side_stream is None:
            return self._next()
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._side_stream):
            batch = self._next()
        current.wait_stream(self._side_stream)
        for tensor in batch:
            if isinstance(tensor, Tensor):
                tensor.record_stream(current)  # or the next batch may get its memory while a step still reads it
        return batch

    def _next(self) -> Batch:
        images, matrices, *maps = run(self._pipeline, self._device, self._files())
        images = torch.bmm(matrices, images.flatten(2)).view_as(images)
        for channel, (mean, std) in enumerate(zip(self._mean, self._std, strict=True)):
            images[:, channel].clamp_(-mean / std, (255 - mean) / std)
        labels_of_pixels = maps[0].squeeze(3) if maps else None
        if self._online is not None:
            labels_of_pixels = self._segment(images, self._online)
        _, _, indices = self._chosen(self._step)
        self._step += 1
        labels, indices_on_device = (
            (x.pin_memory() if self._device.type == "cuda" else x).to(self._device, non_blocking=True)
            for x in (self._labels[indices], torch.from_numpy(indices))
        )  # a copy from pageable memory would wait for all work of the GPU
        return Batch(images, labels_of_pixels, labels, indices_on_device, (self._rank, self._world))

    def _segment(self, images: Tensor, config: Superpixels) -> Tensor:
        mean, std = self._colours
        names = [self._samples[index].image for index in self._chosen(self._step)[2]]
        return segment_batch(images * std + mean, config, self._threads, names)

    def _chosen(self, step: int) -> tuple[int, range, np.ndarray]:
        """Return a step's epoch, and this rank's positions and samples in it."""
        epoch, step = divmod(step, self.steps_per_epoch)
        first = (step * self._world + self._rank) * self._batch
        positions = range(first, first + self._batch)
        shard = None if self._shards is None else self._shards.size
        return epoch, positions, _order(self._seed, epoch, len(self._samples), shard)[positions]

    def _files(self) -> Iterator[tuple[Path, bytes | None]]:
        """Yield names of the files of batches that DALI may be processing, with contents if they come from shards."""
        if self._shards is not None:
            yield from self._in_flight
            return
        for step in range(self._step, self._step + PREFETCH + 1):
            for index in self._chosen(step)[2]:
                sample = self._samples[index]
                for path in [sample.image, *([] if self._map_path is None else [self._map_path(sample)])]:
                    yield path, None

    def _stream(self, shards: Shards) -> Iterator[tuple[tuple[int, int], tuple[bytes, ...]]]:
        """Yield ((epoch, position), files) of this rank's samples, window after window, in the order of the files."""

        def planned() -> Iterator[tuple[int, int, int]]:
            for step in itertools.count(self._start):
                epoch, positions, indices = self._chosen(step)
                for position, index in zip(positions, indices.tolist(), strict=True):
                    yield epoch, position, index

        for _, window in itertools.groupby(planned(), key=lambda entry: (entry[0], entry[1] // WINDOW)):
            entries = sorted(window, key=lambda entry: entry[2])
            files = shards.read([index for _, _, index in entries])
            for (epoch, position, _), content in zip(entries, files, strict=True):
                yield (epoch, position), content

    def _contents(self, epoch: int, position: int, index: int) -> list[tuple[Path, bytes | None]]:
        """Return the names of a sample's image and optional map, with contents if they come from shards.

        A sample that leaves the window makes room for a sample of the next window.
        """
        sample = self._samples[index]
        if self._shards is None:
            return [(sample.image, None), *([] if self._map_path is None else [(self._map_path(sample), None)])]
        while (epoch, position) not in self._held or len(self._held) < min(WINDOW, len(self._samples)) // self._world:
            key, contents = next(self._from_shards)
            self._held[key] = contents
        files = [(sample.image, content) for content in self._held.pop((epoch, position))]
        self._in_flight.extend(files)
        return list(files)

    def _plan(self, iteration: int) -> tuple[list[Any], ...]:
        """Return the graph's inputs for a batch: for each input a list over samples."""
        epoch, positions, indices = self._chosen(self._start + iteration)
        rows = []
        for position, index in zip(positions, indices, strict=True):
            image_file, *maps = self._contents(epoch, position, index)
            image = read_encoded(*image_file)
            rng = _generator(self._seed, AUGMENT, epoch, position)
            row: list[Any] = [
                image.data,
                *_geometry(self._augment, image.height, image.width, rng),
                *_colour(self._augment, self._mean, self._std, rng),
            ]
            for path, content in maps:
                png, *shape = _read_map(path, content)
                expected = [image.height, image.width, self._bits]
                if shape != expected:
                    raise UserError(
                        f"{path}: the map has height, width and bits {shape}, expected {expected} for {image_file[0]}. "
                        "Make it again (superpixels: delete the PNG and start again)"
                    )
                row.append(png)
            rows.append(row)
        return tuple(list(column) for column in zip(*rows, strict=True))

    def _graph(self) -> list[Any]:
        """Return nodes of crops before their colour matrix (torch multiplies faster), of the matrices, and of maps."""
        encoded, size, start, end, position, matrix, pivot, constant, *png = fn.external_source(
            source=self._plan, num_outputs=8 + (self._bits is not None), batch=True
        )
        shown = {"size": size, "roi_start": start, "roi_end": end}
        window = {
            "crop": (self._augment.crop, self._augment.crop),
            "crop_pos_y": position[0],
            "crop_pos_x": position[1],
            "out_of_bounds_policy": "pad",
        }
        images = decode(encoded, self._device)
        if self._device.type == "cuda":
            average = fn.reshape(fn.reductions.mean(images, axes=[0, 1]), shape=[1, 3]).cpu()
            images, matrix = fn.resize(images, interp_type=types.INTERP_CUBIC, **shown), matrix.gpu()
        else:
            resized: Any = fn.python_function(
                images, size, start, end, function=_in_threads(self._threads), batch_processing=True, num_outputs=2
            )
            images, average = fn.reshape(resized[0], layout="HWC"), resized[1]
        zero = fn.squeeze(fn.coord_transform(average, M=pivot, T=constant), axes=0)
        outputs = [fn.crop_mirror_normalize(images, mean=zero, **window), matrix]
        if self._bits is not None:
            dtype = {8: types.UINT8, 16: types.UINT16}[self._bits]
            maps = fn.decoders.image(png[0], device="cpu", output_type=types.ANY_DATA, dtype=dtype)
            # On the CPU even for a GPU: many points lie on the border of two pixels, where rounding decides, and DALI
            # rounds differently on a GPU: 1.6 % of the labels in small maps differed, 0.2 % at VOC's sizes.
            maps = fn.resize(maps, interp_type=types.INTERP_NN, **shown)
            maps = fn.crop(fn.cast(maps, dtype=types.INT32), fill_values=[-1], **window)
            outputs.append(maps.gpu() if self._device.type == "cuda" else maps)
        return outputs


def _in_threads(threads: int) -> Callable[..., tuple[list[np.ndarray], ...]]:
    """Return ``_shown`` for the lists of a batch, in threads.

    Each has one OpenMP thread. With more teams than cores libgomp's idle threads sleep instead of spinning, and the
    many small operations of a training step wake them at twice the cost (measured: 35 instead of 52 images/s in the
    demo).
    """
    torch.get_num_threads()  # fixes this thread's number; otherwise torch would take it from the next line
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def shown(*columns: list[np.ndarray]) -> tuple[list[np.ndarray], ...]:
        pairs = list(pool.map(_shown, *columns))
        return [part for part, _ in pairs], [average for _, average in pairs]

    return shown


def _shown(image: np.ndarray, size: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the visible part of an image in a crop, uint8 (h, w, 3), and the image's mean colour, float32 (1, 3).

    ``fn.resize`` of the shown part takes 4 ms on one core for a crop of 448; torch's filter for bytes, which is
    Pillow's, takes 1 ms for all of the image.
    """
    first, last = np.minimum(start, end), np.maximum(start, end)
    whole = np.rint(size * image.shape[:2] / (last - first)).astype(int)  # size of the whole image at this scale
    (top, left), (height, width) = np.rint(first * whole / image.shape[:2]).astype(int), size.astype(int)
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # channels-last, and so is the result
    resized = F.interpolate(pixels, tuple(whole.tolist()), mode="bicubic", antialias=True)
    shown = resized.permute(0, 2, 3, 1).numpy()[0, top : top + height, left : left + width]
    shown = cv2.flip(shown, 1) if end[1] < start[1] else np.ascontiguousarray(shown)
    return shown, np.array([cv2.mean(image)[:3]], np.float32)


@functools.lru_cache(maxsize=3)  # at an epoch's end the batches, the plan and the shard reader differ in epoch
def _order(seed: int, epoch: int, count: int, shard: int | None) -> np.ndarray:
    """Return the sample at each position of an epoch; ``shard`` is the number of samples in a shard."""
    rng = _generator(seed, SHUFFLE, epoch, 0)
    if shard is None:
        return rng.permutation(count)
    firsts = rng.permutation(np.arange(0, count, shard))
    order = np.concatenate([np.arange(first, min(first + shard, count)) for first in firsts])
    for first in range(0, count, WINDOW):
        rng.shuffle(order[first : first + WINDOW])
    return order


def _generator(seed: int, stream: int, epoch: int, position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=(0, position, epoch, stream)))


def _geometry(augment: Augment, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return the crop's visible part for the graph: its size, its start and end in the source, and its offset.

    All are (y, x). The size is in pixels of the crop, start and end are in pixels of the source (swapped in x for a
    flip). The offset is DALI's crop position: 0 to 1 over the space that the visible part leaves in the crop.
    """
    if augment.scale is None:
        long_side = float(rng.integers(*augment.long_side, endpoint=True))
    else:
        long_side = rng.uniform(*augment.scale) * max(height, width)
    flip = rng.random() < augment.flip
    rows = []
    for axis, source in enumerate((height, width)):
        resized = max(1, round(source * long_side / max(height, width)))
        room = resized - augment.crop
        offset = rng.integers(abs(room), endpoint=True)
        size = min(resized, augment.crop)
        first, before = (offset, 0) if room > 0 else (0, offset)
        start, end = first * source / resized, (first + size) * source / resized
        if flip and axis == 1:
            start, end = end, start
        rows.append((size, start, end, before / max(1, -room)))
    return tuple(np.array(pair, np.float32) for pair in zip(*rows, strict=True))


def _colour(augment: Augment, mean: Rgb, std: Rgb, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return jitter and normalisation: RGB x in an image of mean m becomes A (x - B m - c); A, B (3, 3), c (3,).

    This form first subtracts the colour that becomes 0, so that zero padding may come before the matrix.
    """
    brightness, contrast, saturation = (
        rng.uniform(1 - spread, 1 + spread) for spread in (augment.brightness, augment.contrast, augment.saturation)
    )
    hue = rng.uniform(-augment.hue, augment.hue)
    pixel, pivot = np.eye(3), np.zeros((3, 3))  # x becomes pixel x + pivot m
    for adjustment in rng.permutation(4):
        if adjustment == 0:
            pixel, pivot = brightness * pixel, brightness * pivot
        elif adjustment == 1:
            pixel, pivot = contrast * pixel, (1 - contrast) * GRAY @ pixel
        else:
            matrix = saturation * np.eye(3) + (1 - saturation) * GRAY if adjustment == 2 else _hue_turn(hue)
            pixel, pivot = matrix @ pixel, matrix @ pivot
    inverse = np.linalg.inv(pixel)
    arrays = pixel / np.array(std)[:, None], -inverse @ pivot, inverse @ mean
    return tuple(array.astype(np.float32) for array in arrays)


def _hue_turn(turn: float) -> np.ndarray:
    """Return a rotation of RGB around the gray axis; ``turn`` is a share of the circle, from red towards green."""
    a, b, c = ((1 + 2 * math.cos(2 * math.pi * (turn - channel / 3))) / 3 for channel in range(3))
    return np.array([[a, c, b], [b, a, c], [c, b, a]])


def _read_map(path: Path, data: bytes | None = None) -> tuple[np.ndarray, int, int, int]:
    """Return a gray PNG's bytes, from a file or ``data``, with height, width and bits per pixel from its header.

    A palette PNG becomes a gray PNG of its indices. A mask in another form that ``read_mask`` knows is encoded anew.
    """
    try:
        data = reading.read_bytes(path, reading.MASK) if data is None else data
        if not is_whole_png(data):
            raise ValueError("empty file" if not data else "no PNG, or its checksums do not fit its content")
    except FileNotFoundError:
        raise UserError(
            f"{path}: this map of an image's labels is gone. The image was replaced, or the map removed, since "
            "training began: give the same command again"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a map of labels, found: {error}. Make it again") from None
    width, height, bits, kind = struct.unpack_from(">IIBB", data, 16)
    if (kind, bits) in ((GRAYSCALE, 8), (GRAYSCALE, 16), (PALETTE, 8)):
        return np.frombuffer(_only_pixels(data), np.uint8), height, width, bits
    _, png = cv2.imencode(".png", read_mask(path))
    return png, height, width, 8


def _only_pixels(png: bytes) -> bytes:
    """Turn palette indices into gray levels, and drop all chunks but the pixels: DALI would turn a map by its EXIF.

    A chunk is the content's length, a name, the content, and their CRC.
    """
    parts, at = [png[:8]], 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        chunk = png[at : at + 12 + length]
        name = chunk[4:8]
        if name == b"IHDR":
            header = chunk[4:17] + bytes([GRAYSCALE]) + chunk[18:-4]
            parts.append(chunk[:4] + header + struct.pack(">I", zlib.crc32(header)))
        elif name in (b"IDAT", b"IEND"):
            parts.append(chunk)
        at += len(chunk)
    return b"".join(parts)
