"""Minutes of VOC's whole chain on this machine, from photos to the segmenter's val masks: images x measured seconds.

Every stage runs on a few images as in ``cpn-fast run``, with its files, with random weights of ResNet38d (on a CPU
MobileNetV2 as in configs/voc_mini.yaml). Stages that go through a list run on two lists after a warm-up: the difference
gives the rate, and the remaining time is the start. Trainings run a few steps: the rate is the median of metrics.jsonl
without its first lines, and the start is the remaining time. CPN's rate comes from train_step.json if that has the same
device. The work is that of configs/voc.yaml. Scoring is not counted; it takes seconds.

The goal is 60 minutes on one H100 with 16 cores. Photos are generated, or come from ``--images``.

    python bench/schedule.py [--images FOLDER] [--few N] [--steps N] [--out FOLDER]
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from data_pipeline import generate
from timing import ROOT, arguments, folder, machine, print_table, wait, write_json
from train_step import PRESENT, keep_alive

from cpn_fast.config import Config
from cpn_fast.config_file import load
from cpn_fast.data.dataset import load_samples
from cpn_fast.methods.affinity import Affinity
from cpn_fast.models.affinity_net import build_affinity_net
from cpn_fast.models.backbone import Headed
from cpn_fast.models.deeplab import build_deeplab
from cpn_fast.models.network import build_network
from cpn_fast.models.weights import to_released_keys
from cpn_fast.pipelines.superpixels import SuperpixelCache
from cpn_fast.refinement.crf import write_label_maps
from cpn_fast.runtime import distributed
from cpn_fast.runtime.files import read_metrics
from cpn_fast.stages import cam, refine, segment, train

GOAL = 60.0
"""Minutes on one H100 with 16 cores."""
TRAIN_AUG, TRAIN, VAL = 10_582, 1_464, 1_449
"""Images of VOC's lists."""
LONGER = 10
"""Superpixels are made of this many times the images, because an image takes milliseconds."""
POSSIBLE = 3
"""Classes besides background that the segmenter's random weights can predict. It sets the CRF's time."""


class Rate(NamedTuple):
    per_second: float
    """Images."""
    low: float | None
    high: float | None
    """20th and 80th percentile; None if two lists were compared."""
    start: float
    """Seconds before the first image."""


def work(voc: Config) -> dict[str, int]:
    """Return the number of images of each stage."""
    assert isinstance(voc.affinity.train.batch, int)
    assert isinstance(voc.segment.train.batch, int)
    return {
        "superpixels": TRAIN_AUG,
        "CPN, training": TRAIN_AUG * (voc.train.epochs or 0),
        "seeds": TRAIN_AUG + TRAIN,  # of both lists
        "CRF of the seeds": TRAIN_AUG,  # with both alphas
        "AffinityNet, training": TRAIN_AUG * (voc.affinity.train.epochs or 0),
        "random walk": TRAIN_AUG,
        "segmenter, training": (voc.segment.train.steps or 0) * voc.segment.train.batch,
        "segmenter, inference": VAL,
    }


def configuration(root: Path, name: str, images: int, steps: int, *, gpu: bool, cores: int) -> Config:
    """Return VOC's config, or on a CPU that of its small part, for ``name.txt`` of the generated data."""
    short = ["epochs=null", f"steps={steps}", f"log_every={max(1, steps // 12)}", f"data_threads={cores}"]
    trainings = [f"{part}.{key}" for part in ("train", "affinity.train", "segment.train") for key in short]
    lists = [f"{key}={name}.txt" for key in ("data.train_list", "data.eval_list", "segment.eval_list")]
    data = [f"data.root={root}", "data.labels=labels.json", f"model.weights={root / 'cpn.safetensors'}"]
    for list_path, count in ((root / f"{name}.txt", images), (long_list(root / f"{name}.txt"), LONGER * images)):
        list_path.write_text("".join(f"{index}\n" for index in range(count)))
    path = ROOT / "configs" / ("voc.yaml" if gpu else "voc_mini.yaml")
    return load(path, [f"name={name}", f"out={root / 'runs'}", *data, *lists, *trainings])


def long_list(path: Path) -> Path:
    """Return the path of the superpixels' list, which belongs to a list."""
    return path.with_name(f"long-{path.name}")


def write_data(root: Path, images: Path | None, count: int, classes: Sequence[str]) -> None:
    """Write ``count`` photos, of which 16 are distinct, with as many tags as VOC's images have."""
    (root / "JPEGImages").mkdir(parents=True)
    distinct = min(count, 16)
    if images is None:
        (root / "photos").mkdir()
        generate(root / "photos", distinct)
        images = root / "photos"
    photos = sorted(images.glob("*.jpg"))[:distinct]
    tags = {}
    for index in range(count):
        (root / "JPEGImages" / f"{index}.jpg").symlink_to(photos[index % len(photos)].resolve())
        drawn = np.random.default_rng(index).permutation(len(classes))[: PRESENT[index % len(PRESENT)]]
        tags[str(index)] = [classes[number] for number in drawn]
    (root / "labels.json").write_text(json.dumps(tags))


def write_weights(config: Config, root: Path) -> None:
    """Write random weights of all three networks that keep features alive."""
    torch.manual_seed(0)
    deeplab = build_deeplab(config)
    assert deeplab.cls_conv.bias is not None
    deeplab.cls_conv.bias.data[1 + POSSIBLE :] = -30
    networks: dict[str, Headed] = {
        "cpn": build_network(config),
        "affinity": build_affinity_net(config.model),
        "deeplab": deeplab,
    }
    for name, network in networks.items():
        write_network(network, root / f"{name}.safetensors")


def write_network(network: Headed, path: Path) -> None:
    """Write a network's random weights, scaled to keep features alive."""
    keep_alive(network)
    tensors = {key: tensor.contiguous() for key, tensor in to_released_keys(network.state_dict()).items()}
    path.write_bytes(safetensors.torch.save(tensors))


def listed_stages(config: Config, weights: Path) -> dict[str, Callable[[], object]]:
    """Return the stages that go through a list, in order. Each reads the files of the stages before it."""
    device, list_path = distributed.join().device, config.data.train_list
    samples, photos = (
        load_samples(config.data, config.classes, path, labels=True, masks=False)
        for path in (list_path, long_list(list_path))
    )
    cores, made = os.cpu_count() or 1, config.run / "refine"
    seeds = config.run / "cams" / list_path.stem / "seeds"

    sources = dict.fromkeys((sample.id for sample in samples), "bench")

    def crf() -> None:
        alphas = {made / "crf-low": config.crf.low_alpha, made / "crf-high": config.crf.high_alpha}
        write_label_maps(samples, seeds, alphas, sources=sources, parameters=config.crf.parameters, workers=cores)
        refine.write_labels(samples, made / "crf-low", made / "crf-high", made / "labels")

    def walk() -> None:
        affinity = weights / "affinity.safetensors"
        refine.walk(config, affinity, samples, seeds, made / "masks", sources=sources, device=device, workers=cores)

    cache = SuperpixelCache(config.run, config.superpixels)
    return {
        "superpixels": functools.partial(cache.build, photos, workers=cores),
        "seeds": functools.partial(cam.run, config, weights / "cpn.safetensors", list_path),
        "CRF of the seeds": crf,
        "random walk": walk,
        "segmenter, inference": functools.partial(segment.segment, config, weights / "deeplab.safetensors", list_path),
    }


def trainings(config: Config) -> dict[str, tuple[Callable[[], object], Path]]:
    """Return the trainings, which read the files of ``listed_stages`` for the same list, and their run's folders."""
    affinity = refine.affinity_config(config)
    masks = config.run / "refine" / "masks"
    return {
        "AffinityNet, training": (functools.partial(train.fit, affinity, Affinity), affinity.run),
        "segmenter, training": (functools.partial(segment.run, config, masks), segment.deeplab_config(config).run),
        "CPN, training": (functools.partial(train.run, config), config.run),
    }


def seconds(run: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - begin


def listed_rate(few: int, many: int, of_few: float, of_many: float) -> Rate:
    """Return the rate from the seconds of two lists. Raises ValueError if the longer list took no longer."""
    if of_many <= of_few:
        raise ValueError(f"{many} images took {of_many:.2f} s and {few} took {of_few:.2f}: take more with --few")
    rate = (many - few) / (of_many - of_few)
    return Rate(rate, None, None, max(0.0, of_few - few / rate))


def run_rate(run: Path, images: int, whole: float) -> Rate:
    """Return the rate of a training run of ``whole`` seconds on ``images``, without its first two lines."""
    rates = [line["images_per_second"] for line in read_metrics(run / "metrics.jsonl")[2:]]
    fifths = statistics.quantiles(rates, n=5, method="inclusive")
    median = statistics.median(rates)
    return Rate(median, fifths[0], fifths[-1], max(0.0, whole - images / median))


def step_rate(out: Path, device: str) -> Rate | None:
    """Return CPN's rate from ``train_step.json`` of the same device, or None if it lacks the captured step."""
    path = out / "train_step.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result["machine"]["device"] != device:
        return None
    row = next((row for row in result["rows"] if row["step"] == "+ whole step in a CUDA graph"), None)
    if row is None:
        return None
    of_ms = result["batch"] * 1e3
    return Rate(row["images/s"], of_ms / row["ms p80"], of_ms / row["ms p20"], row["first s"])


def rows_of(images: dict[str, int], rates: dict[str, Rate]) -> list[dict[str, Any]]:
    """Return a row for each stage and one for their sum. Without a rate a stage has no minutes, nor has the sum."""
    rows: list[dict[str, Any]] = []
    for stage, count in images.items():
        rate = rates.get(stage)
        row: dict[str, Any] = {"stage": stage, "images": count}
        if rate is None:
            rows.append(row | dict.fromkeys(("images/s", "p20", "p80", "start s", "minutes")))
            continue
        row |= {"images/s": rate.per_second, "p20": rate.low, "p80": rate.high, "start s": rate.start}
        rows.append(row | {"minutes": (rate.start + count / rate.per_second) / 60})
    all_minutes = [row["minutes"] for row in rows]
    known = None if None in all_minutes else sum(all_minutes)
    return [*rows, {"stage": "all", **dict.fromkeys(("images", "images/s", "p20", "p80", "start s")), "minutes": known}]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs (default: generated ones)")
    parser.add_argument("--few", type=int, help="images of the shorter list; the longer has four times as many")
    parser.add_argument("--steps", type=int, help="steps of each training (default 12, on a GPU 60)")
    options = parser.parse_args()
    device = distributed.join().device
    gpu, cores = device.type == "cuda", os.cpu_count() or 1
    few, steps = options.few or (cores if gpu else 2), options.steps or (60 if gpu else 12)
    counts = {"warm-up": few, "few": few, "many": 4 * few}
    images = work(load(ROOT / "configs" / "voc.yaml"))
    described, out = machine(device) | {"cores": cores}, folder(options.out, device)
    rates: dict[str, Rate] = {}
    left_out: dict[str, str] = {}
    failures: dict[str, str] = {}

    def save(*, finished: bool) -> list[dict[str, Any]]:
        rows = rows_of(images, rates)
        write_json(
            out / "schedule.json",
            described,
            rows,
            finished=finished,
            few=few,
            steps=steps,
            goal=GOAL,
            left_out=left_out,
            failures=failures,
        )
        return rows

    def listed(stage: str) -> Rate:
        took = {name: seconds(of_list[stage], device) for name, of_list in stages.items()}
        images_of_few = LONGER * few if stage == "superpixels" else few
        return listed_rate(images_of_few, 4 * images_of_few, took["few"], took["many"])

    def trained(stage: str) -> Rate:
        run, run_folder = training[stage]
        known = step_rate(out, described["device"]) if stage == "CPN, training" else None
        if known is not None:
            return known
        whole = seconds(run, device)
        batch = load(run_folder / "config.yaml").train.batch
        assert isinstance(batch, int)
        return run_rate(run_folder, steps * batch, whole)

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        configs = {
            name: configuration(root, name, count, steps, gpu=gpu, cores=cores) for name, count in counts.items()
        }
        write_data(root, options.images, LONGER * 4 * few, configs["few"].classes)
        write_weights(configs["few"], root)
        stages = {name: listed_stages(config, root) for name, config in configs.items()}
        training = trainings(configs["many"])
        for stage in (*stages["few"], *training):
            try:
                rates[stage] = trained(stage) if stage in training else listed(stage)
            except ModuleNotFoundError as error:
                left_out[stage] = f"needs {error.name}, which is not installed"
            except Exception as error:  # stages that do not need this one can still be measured
                failures[stage] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            save(finished=False)
    rows = save(finished=True)
    network = "ResNet38d at 448 px" if gpu else "MobileNetV2 at 225 px"
    print_table(
        f"VOC's chain, {network}, {described['device']}, {cores} cores; goal on an H100: {GOAL:g} minutes", rows
    )
    for what, why in left_out.items():
        print(f"left out: {what}: {why}")
    for what, why in failures.items():
        print(f"failed: {what}: {why}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
