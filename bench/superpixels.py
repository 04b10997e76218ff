"""Time per image to make a complementary pair from a 448 x 448 crop: the released way against ours.

The released way segments every augmented crop with scikit-image, as normalised floats (which scikit-image stretches to
0..1 since 0.19), and looks up each pixel's patch in a list of hidden patches. Ours takes superpixels from fast-slic on
the crop (online), from our kernel on the crop (in plain torch on a CPU), or from a PNG of the cache, and then calls
``complementary_pair``. Each uses one thread.

A second table times the kernel alone: a batch of 16 crops on a GPU, with a goal of 5,000 crops/s; on a CPU one crop.
``bench/kernel_report.py`` counts its work; ``bench/superpixel_quality.py`` measures quality.

    python bench/superpixels.py [--images FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from skimage.segmentation import slic
from timing import arguments, folder, kernel_columns, machine, plot_bars, print_table, write_json

from cpn_fast import kernels
from cpn_fast.config import Patches, Superpixels
from cpn_fast.data.dataset import Sample
from cpn_fast.data.images import read_image
from cpn_fast.methods.patches import Pair, complementary_pair
from cpn_fast.pipelines.superpixels import SuperpixelCache, segment
from cpn_fast.pipelines.superpixels import described as described_engine

SIZE = 448
FAST, KERNEL = Superpixels(engine="fast-slic"), Superpixels(engine="kernel")
MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


def normalise(image: np.ndarray) -> np.ndarray:
    return ((image - MEAN) / STD).astype(np.float32)


def released_segments(image: np.ndarray) -> np.ndarray:
    return slic(image, n_segments=300, compactness=10, start_label=1)


def released_pair(image: np.ndarray, segments: np.ndarray) -> Pair:
    patches = segments.max() + 1
    hidden = np.random.default_rng().integers(patches, size=patches // 2)
    shown = np.zeros(segments.shape, np.float32)
    for row in range(segments.shape[0]):
        for column in range(segments.shape[1]):
            if segments[row, column] not in hidden:
                shown[row, column] = 1
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    mask = torch.from_numpy(shown)
    return Pair(pixels * mask, pixels * (1 - mask), mask.mean()[None])


def our_pair(image: torch.Tensor, labels: np.ndarray, generator: torch.Generator) -> Pair:
    superpixels = torch.from_numpy(labels.astype(np.int32))[None].to(image.device)
    pair = complementary_pair(image, superpixels, Patches(), None, generator, patch_limit=Superpixels().count)
    if image.is_cuda:
        torch.cuda.synchronize()
    return pair


def time_pairs(title: str, crops: list[np.ndarray], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each way: superpixels, hidden share, and medians over crops and repeats of times in ms.

    The released way runs on the CPU; our hiding runs on ``device``. The ways take turns on each crop, so that other
    work on the machine slows all of them.
    """
    config, generator = FAST, torch.Generator(device).manual_seed(0)
    floats = [normalise(crop) for crop in crops]
    tensors = [torch.from_numpy(image).permute(2, 0, 1)[None].contiguous().to(device) for image in floats]
    with tempfile.TemporaryDirectory() as temporary:
        samples = [Sample(str(index), Path(temporary) / f"{index}.png", None, None) for index in range(len(crops))]
        for sample, crop in zip(samples, crops, strict=True):
            Image.fromarray(crop).save(sample.image)
        cache = SuperpixelCache(Path(temporary), config)
        cache.build(samples, workers=1)
        entries = [cache.path(sample) for sample in samples]
        ways: dict[str, tuple[Callable[[int], np.ndarray], Callable[[int, np.ndarray], Pair]]] = {
            "released": (
                lambda index: released_segments(floats[index]),
                lambda index, labels: released_pair(floats[index], labels),
            ),
            "ours, online": (
                lambda index: segment(crops[index], FAST),
                lambda index, labels: our_pair(tensors[index], labels, generator),
            ),
            "ours, kernel": (
                lambda index: segment(crops[index], KERNEL),
                lambda index, labels: our_pair(tensors[index], labels, generator),
            ),
            "ours, cached": (
                lambda index: np.asarray(Image.open(entries[index])),
                lambda index, labels: our_pair(tensors[index], labels, generator),
            ),
        }
        runs: dict[str, list[tuple[float, float, int, float]]] = {name: [] for name in ways}
        for repeat in range(repeats + 1):
            for index in range(len(crops)):
                for name, (segmenting, pairing) in ways.items():
                    start = time.perf_counter()
                    labels = segmenting(index)
                    middle = time.perf_counter()
                    pair = pairing(index, labels)
                    end = time.perf_counter()
                    check(pair, tensors[index])
                    if repeat:  # the first round warms up
                        hidden = 1 - pair.share.item()
                        runs[name].append((middle - start, end - middle, len(np.unique(labels)), hidden))
    rows = []
    for name, run in runs.items():
        segmentation, hiding, numbers, shares = np.array(run).T
        total = 1e3 * (segmentation + hiding)
        row = {"images": title, "way": name, "superpixels": numbers.mean(), "hidden": shares.mean()}
        row |= {"segmentation ms": 1e3 * np.median(segmentation), "hiding ms": 1e3 * np.median(hiding)}
        row |= {"total ms": np.median(total), "p20 ms": np.quantile(total, 0.2), "p80 ms": np.quantile(total, 0.8)}
        rows.append(row)
    for row in rows:
        row["times faster"] = rows[0]["total ms"] / row["total ms"]
    return rows


def check(pair: Pair, image: torch.Tensor) -> None:
    """Check that the pair is complementary and that its share is the visible one."""
    visible, complement, share = (part.to(image.device) for part in pair)
    torch.testing.assert_close(visible + complement, image)
    torch.testing.assert_close((visible != 0).all(1).double().mean((1, 2)), share.double(), atol=1e-5, rtol=0)


def kernel_rate(crops: list[np.ndarray], device: torch.device) -> dict[str, Any]:
    """Return crops per second of ``cpn_fast.kernels.slic``, on a GPU by the device's time."""
    batch = 16 if device.type == "cuda" else 1
    images = torch.from_numpy(np.stack([crops[index % len(crops)] for index in range(batch)])).permute(0, 3, 1, 2)
    images, settings = images.to(device), Superpixels()
    columns = kernel_columns(
        lambda: kernels.slic(images, count=settings.count, compactness=settings.compactness, iterations=10), device
    )
    seconds = (columns.get("device ms") or columns["call ms"]) / 1e3
    return {"kernel": "slic", "batch": batch, "superpixels": settings.count, **columns, "crops/s": batch / seconds}


def generated_scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of curved, textured regions and the map of the regions."""
    rng = np.random.default_rng(seed)
    points, warp = rng.random((25, 2)) * SIZE, cv2.resize(rng.normal(0, 15, (8, 8, 2)), (SIZE, SIZE))
    grid = np.moveaxis(np.mgrid[:SIZE, :SIZE], 0, -1) + warp
    regions = np.linalg.norm(grid[:, :, None] - points, axis=-1).argmin(-1)
    texture = cv2.resize(rng.normal(0, 12, (SIZE // 4, SIZE // 4, 3)), (SIZE, SIZE)) + rng.normal(0, 6, (SIZE, SIZE, 3))
    image = rng.uniform(30, 225, (25, 3))[regions] + texture
    return cv2.GaussianBlur(image.clip(0, 255).astype(np.uint8), (3, 3), 0), regions.astype(np.uint8)


def center_crop(path: Path) -> np.ndarray:
    """Return the centre of an image whose short side was resized to the crop's side."""
    image = read_image(path)
    scale = SIZE / min(image.shape[:2])
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    top, left = (image.shape[0] - SIZE) // 2, (image.shape[1] - SIZE) // 2
    return np.ascontiguousarray(image[top : top + SIZE, left : left + SIZE])


def spread(items: Sequence[Path], count: int) -> list[Path]:
    """Return about ``count`` of the items, evenly spread."""
    return list(items[:: max(1, len(items) // count)][:count])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs to time in addition to the generated images")
    parser.add_argument("--count", type=int, default=6, help="images to time of each kind")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions for each image")
    options = parser.parse_args()
    device, out = options.device, folder(options.out, options.device)
    torch.set_num_threads(1)

    crops = [generated_scene(seed)[0] for seed in range(options.count)]
    times = time_pairs("generated", crops, options.repeats, device)
    if options.images:
        files = spread(sorted(options.images.glob("*.jpg")), options.count)
        times += time_pairs("JPEGs", [center_crop(file) for file in files], options.repeats, device)
    rate = kernel_rate(crops, device)

    print_table("A complementary pair of a 448 x 448 crop", times)
    print_table("The kernel alone", [rate])
    described = machine(device) | {
        "engine": described_engine(FAST),
        "scikit_image": importlib.metadata.version("scikit-image"),
    }
    write_json(out / "superpixels.json", described, times, kernel=[rate])
    bars: dict[str, dict[str, float]] = {}
    for row in times:
        bars.setdefault(row["images"], {})[row["way"]] = row["total ms"]
    plot_bars(out / "superpixels.png", "A complementary pair of a 448 x 448 crop", "ms, one thread", bars)


if __name__ == "__main__":
    main()
