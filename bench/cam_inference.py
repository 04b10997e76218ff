"""Multi-scale CAM seeds of JPEGs: the released way against ours, then ours on a 1080p image at scales up to 2.

As released: image by image with Pillow, four scales and their mirror images one after another in fp32, an affinity of
all pixel pairs, every class enlarged and summed on the CPU. Ours is ``cpn-fast cam`` without writing files: images of
one size in one batch with their mirror images, no full affinity, only present classes. Both start at the file and end
at arrays on the unit scale. Before timing, their seeds must agree on an image that neither has to resize (DALI's and
Pillow's cubic filters differ at the border, and random weights magnify the difference). Weights are random; the JPEGs
are generated, 500 x 375, or come from ``--images``.

TFLOP/s count the convolutions of all passes. MFU is their rate over the rate of a large matrix product in the same run
(bf16 on a GPU, fp32 on a CPU). On a GPU the backbone is ResNet38d. On a CPU it is MobileNetV2 at stride 8 (16 for
1080p) in one thread, and seconds are the process's CPU time, so that other work on the machine has little effect.

    python bench/cam_inference.py [--images FOLDER] [--count N] [--device DEVICE] [--out FOLDER]
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from data_pipeline import generate
from PIL import Image
from timing import arguments, folder, machine, peak_extra_bytes, plot_bars, print_table, write_json
from torch.nn import functional as F
from train_step import convolution_flops, keep_alive, multiply_rate, step_times

from cpn_fast.config import Cam, Model
from cpn_fast.data.dataset import Sample
from cpn_fast.data.seeds import unit_scale
from cpn_fast.models import build_backbone, network
from cpn_fast.models.inference import summed_cams
from cpn_fast.pipelines.inference import scaled_images

CLASSES = 20


def built(device: torch.device, stride: int) -> network.Network:
    torch.manual_seed(0)
    backbone = "resnet38d" if device.type == "cuda" else "mobilenet_v2"
    options = Model(backbone=backbone, stride=stride)  # type: ignore[arg-type]
    net = network.Network(build_backbone(options), CLASSES, options).to(device)
    keep_alive(net)
    return net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def labels(index: int) -> torch.Tensor:
    return torch.from_numpy(np.isin(np.arange(CLASSES), np.random.default_rng(index).choice(CLASSES, 1 + index % 3)))


@torch.inference_mode()
def released(net: network.Network, samples: Sequence[Sample], device: torch.device, scales: Sequence[float]) -> Any:
    seeds = []
    names = ("pixel_correlation", "region_pooling", "region_correlation")
    plain = {name: functools.partial(getattr(network, name), backend="eager") for name in names}
    with mock.patch.multiple(network, **plain):  # type: ignore[call-overload]
        for index, sample in enumerate(samples):
            image = Image.open(sample.image).convert("RGB")
            total = np.zeros((CLASSES, image.height, image.width), np.float32)
            for scale in scales:
                fit = net.backbone.fit
                size = fit(round(image.width * scale)), fit(round(image.height * scale))
                pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)
                pixels = ((pixels - np.array(net.mean, np.float32)) / np.array(net.std, np.float32)).transpose(2, 0, 1)
                for view in (pixels, pixels[:, :, ::-1]):
                    x = torch.from_numpy(view.copy())[None].to(device)
                    maps = net(x).refined
                    maps = F.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=True)
                    maps = F.interpolate(maps[:, 1:], total.shape[1:], mode="bilinear", align_corners=False)
                    cams = (maps[0] * labels(index).to(device)[:, None, None]).cpu().numpy()
                    total += cams if view is pixels else cams[:, :, ::-1]
            seeds.append(unit_scale(torch.from_numpy(total))[labels(index)].numpy())
    return seeds


@torch.inference_mode()
def ours(net: network.Network, samples: Sequence[Sample], device: torch.device, options: Cam, *, bf16: bool) -> Any:
    batches = scaled_images(
        samples,
        scales=options.scales,
        mean=net.mean,
        std=net.std,
        batch=options.batch,
        pixels=options.pixels,
        device=device,
        threads=1,
        fit=net.backbone.fit,
    )
    seeds: dict[int, np.ndarray] = {}
    for batch in batches:
        tags = torch.stack([labels(index) for index in batch.indices])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            cams = summed_cams(net, batch, tags, options).cams
        seeds |= {index: unit_scale(cam).cpu().numpy() for index, cam in zip(batch.indices, cams, strict=True)}
    return [seeds[index] for index in range(len(samples))]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs (default: generated ones)")
    parser.add_argument("--count", type=int, help="how many images (default 4, on a GPU 16)")
    options = parser.parse_args()
    device, gpu = options.device, options.device.type == "cuda"
    count = options.count or (16 if gpu else 4)
    torch.set_num_threads(1)
    net = built(device, 8)
    with tempfile.TemporaryDirectory() as temporary:
        if not options.images:
            generate(Path(temporary), count)
        files = sorted((options.images or Path(temporary)).glob("*.jpg"))[:count]
        samples = [Sample(file.stem, file, None, None) for file in files]
        settings = Cam()
        path = Path(temporary) / "fitting.png"
        Image.open(files[0]).convert("RGB").crop((0, 0, 481, 353)).save(path)
        fitting, once = [Sample("fitting", path, None, None)], settings.model_copy(update={"scales": (1.0,)})
        (expected,), (seed,) = released(net, fitting, device, (1.0,)), ours(net, fitting, device, once, bf16=False)
        assert expected.std() > 0.01, "the released seed is flat, so it cannot be compared"
        error = float(np.abs(expected - seed).mean())
        assert error < 1e-3, f"seeds differ by {error} on average"

        def batches_of(images: int, pixels: int = settings.pixels, *, bf16: bool = gpu) -> Callable[[], Any]:
            options = settings.model_copy(update={"batch": images, "pixels": pixels})
            return functools.partial(ours, net, samples, device, options, bf16=bf16)

        few = samples[:4] if gpu else samples  # the released way takes long
        ways: dict[str, Callable[[], Any]] = {
            "as released": functools.partial(released, net, few, device, settings.scales)
        }
        if gpu:
            ways |= {"ours, bf16, batches of 4": batches_of(4), "ours, bf16, batches of 16": batches_of(16, 2**25)}
        else:
            ways |= {"ours, one image a batch": batches_of(1), "ours, batches of 4": batches_of(4)}
        flops = convolution_flops(batches_of(4)) / count
        rate = multiply_rate(device, torch.bfloat16 if gpu else torch.float32)
        described, out = machine(device), folder(options.out, device)
        rows: list[dict[str, Any]] = []
        save = functools.partial(
            write_json,
            out / "cam_inference.json",
            described,
            rows,
            mean_difference=error,
            tflop_per_image=flops / 1e12,
            matmul_tflops=rate / 1e12,
        )
        for way, run in ways.items():
            times, images = step_times(run, device), len(few) if way == "as released" else count
            row = {
                "way": way,
                "images/s": images / times.median,
                "images/s p20": images / times.high,
                "images/s p80": images / times.low,
                "repeats": times.repeats,
                "peak MiB": peak_extra_bytes(run, device) / 2**20,
                "TFLOP/s": flops * images / times.median / 1e12,
                "MFU": flops * images / times.median / rate,
            }
            rows.append(row | {"times faster": row["images/s"] / (rows or [row])[0]["images/s"]})
            save(finished=False)

        full_hd = Path(temporary) / "1080p.jpg"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), np.uint8)).save(full_hd)
        large, small = [Sample("1080p", full_hd, None, None)], net if gpu else built(device, 16)
        run = functools.partial(ours, small, large, device, settings, bf16=gpu)
        clock = time.perf_counter if gpu else time.process_time
        begin = clock()
        memory = peak_extra_bytes(run, device)
        seconds = clock() - begin
        large_row = {
            "what": f"1080p, scales {settings.scales} and mirror images, stride {8 if gpu else 16}",
            "s": seconds,
            "peak MiB": memory / 2**20,
            "affinity MiB": (2160 // (8 if gpu else 16) * (3840 // (8 if gpu else 16))) ** 2 * 4 / 2**20,
        }

    save(full_hd=large_row)
    title = f"CAM seeds of {count} images, {'ResNet38d' if gpu else 'MobileNetV2'}, {described['device']}"
    print_table(title, rows)
    print_table("Bounded memory: one affinity at scale 2 would take the last column", [large_row])
    bars = {row["way"]: {"images/s": row["images/s"]} for row in rows}
    plot_bars(out / "cam_inference.png", "CAM seeds", "images/s", bars)


if __name__ == "__main__":
    main()
