"""A training in fp32 on the CPU beside the same training on a GPU: loss curves, CAMs and their differences.

    python bench/gpu_and_cpu.py --set data.root=FOLDER [--config CONFIG] [--steps N] [--images N] [--out FOLDER]

Trains a config three times, by default configs/voc_mini.yaml for 200 steps of its own batch, from the same weights:

- ``cpu``: fp32 on the CPU;
- ``gpu``: the same random seed, on the GPU in its native precision with our kernels. Without a GPU it is ``bf16``: on
  the CPU in bf16;
- ``other seed``: fp32 on the CPU with another random seed. It shows how far two equally good trainings are apart.

Compares the other two with ``cpu``: the loss of each step, the mean of the last fifth, and the CAM seeds of the first
--images images of the training list. A CAM's scores are from 0 to 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timing import ROOT, arguments, folder, logged_rate, machine, print_table, write_json

from cpn_fast.config import Config
from cpn_fast.config_file import load
from cpn_fast.data.dataset import Sample, load_samples
from cpn_fast.data.seeds import Seed, read_seed
from cpn_fast.runtime.files import read_metrics

SHOWN = 4
"""Images in the picture."""


class Training(NamedTuple):
    name: str
    overrides: tuple[str, ...]
    on_gpu: bool


class Result(NamedTuple):
    losses: np.ndarray
    """(steps,)"""
    seeds: list[Seed]
    rate: float
    """Images/s, the median."""

    @property
    def last(self) -> float:
        """The mean loss of the last fifth."""
        return float(self.losses[-((len(self.losses) + 4) // 5) :].mean())


def trainings(config: Config, gpu: bool) -> list[Training]:
    other = f"train.seed={config.train.seed + 1}"
    return [
        Training("cpu", ("train.precision=fp32",), False),
        Training("gpu" if gpu else "bf16", (f"train.precision={'null' if gpu else 'bf16'}",), gpu),
        Training("other seed", ("train.precision=fp32", other), False),
    ]


def train(training: Training, path: Path, overrides: list[str], few: Path, out: Path) -> Result:
    """Train and make seeds as a user would, in processes that see the GPU only where ``training`` says so."""
    name = training.name.replace(" ", "_")
    settings = [*overrides, *training.overrides, "train.log_every=1", f"out={out}", f"name={name}"]
    flags = [argument for setting in settings for argument in ("--set", setting)]
    hidden = {} if training.on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    for command in (["train"], ["cam", "--checkpoint", str(out / name / "model.safetensors"), "--list", str(few)]):
        call = [sys.executable, "-m", "cpn_fast", command[0], str(path), *command[1:], *flags]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL, env=os.environ | hidden)
    lines = read_metrics(out / name / "metrics.jsonl")
    config = load(path, settings)
    made = out / name / "cams" / config.list_name(few) / "seeds"
    seeds = [read_seed(made / f"{id_}.npz") for id_ in few.read_text().splitlines()]
    rate = logged_rate(out / name, skip=len(lines) // 5)
    return Result(np.array([line["loss"] for line in lines]), seeds, rate)


def differences(result: Result, of_cpu: Result, threshold: float) -> dict[str, float]:
    """Return a row's differences from the training on the CPU; losses relative to its."""
    relative = np.abs(result.losses / of_cpu.losses - 1)
    pairs = list(zip(result.seeds, of_cpu.seeds, strict=True))
    scores = [np.concatenate([seed.cam.ravel() for seed in seeds]) for seeds in zip(*pairs, strict=True)]
    return {
        "loss, first step, %": 100 * float(relative[0]),
        "loss, a step (median), %": 100 * float(np.median(relative)),
        "loss, last fifth, %": 100 * (result.last / of_cpu.last - 1),
        "CAM, mean difference": float(np.abs(scores[0] - scores[1]).mean()),
        "CAM, correlation": float(np.corrcoef(scores)[0, 1]),
        "mask, other pixels, %": 100
        * float(np.mean([(a.mask(threshold) != b.mask(threshold)).mean() for a, b in pairs])),
    }


def plot(path: Path, title: str, results: dict[str, Result], samples: list[Sample]) -> None:
    """Plot the losses, and for the first images the highest score of each training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 2.2 * len(samples)), layout="constrained")
    columns = 1 + len(results)
    grid = figure.add_gridspec(len(samples), 1 + columns, width_ratios=[0.75 * columns] + [1] * columns)
    axes = figure.add_subplot(grid[:, 0])
    for name, result in results.items():
        axes.plot(np.arange(1, len(result.losses) + 1), result.losses, label=name, linewidth=1)
    axes.set(xlabel="optimiser step", ylabel="loss")
    axes.legend()
    axes.grid(alpha=0.3)
    for row, sample in enumerate(samples):
        pictures: dict[str, Any] = {"photo": Image.open(sample.image)}
        pictures |= {name: result.seeds[row].cam.max(0) for name, result in results.items()}
        for column, (name, picture) in enumerate(pictures.items(), 1):
            place = figure.add_subplot(grid[row, column])
            place.set_axis_off()
            place.imshow(picture, vmin=0, vmax=1, cmap="jet")
            if row == 0:
                place.set_title(name)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/voc_mini.yaml", metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument(
        "--images", type=int, default=64, metavar="N", help="images whose CAMs are compared; default 64"
    )
    options = parser.parse_args()
    overrides = [*options.overrides, f"train.steps={options.steps}"]
    config = load(options.config, overrides)
    samples = load_samples(config.data, config.classes, config.data.train_list, labels=True, masks=False)
    tagged = [sample for sample in samples if sample.label is not None and sample.label.any()][: options.images]
    about, target = machine(options.device), folder(options.out, options.device)
    results: dict[str, Result] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        few = Path(temporary) / "few.txt"
        few.write_text("".join(f"{sample.id}\n" for sample in tagged))
        for training in trainings(config, options.device.type == "cuda"):
            result = train(training, options.config, overrides, few, Path(temporary) / "runs")
            results[training.name] = result
            row = {"training": training.name, "loss, last fifth": result.last}
            if len(results) > 1:
                row |= differences(result, results["cpu"], config.cam.mask_threshold)
            rows.append(row | {"images/s": result.rate})
            write_json(target / "gpu_and_cpu.json", about, rows, config=config.name, steps=options.steps)
            plot(target / "gpu_and_cpu.png", f"{config.name}, {options.steps} steps", results, tagged[:SHOWN])
    print_table(f"{config.name}, {options.steps} steps: differences from fp32 on the CPU", rows)


if __name__ == "__main__":
    main()
