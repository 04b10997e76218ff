"""Quality of the methods' seeds on real images, after training and at its checkpoints: docs/results.md.

    python bench/real_images.py [CONFIG ...] --set data.root=FOLDER [--seeds N ...] [--every STEPS] [--validation LIST]

Trains every config (by default configs/voc_mini*.yaml) with each of --seeds (train.seed), or continues or reuses an
earlier run. A run's folder has the config's name for seed 0, and NAME_seedN for other seeds. Scores the CAM seeds of
data.eval_list, training images with ground truth, and of the validation list, both at the best threshold of the first,
at all scales of the config and at scale 1 alone. Prints means and spreads (sample standard deviations) over
--seeds. The curve uses the validation list's best threshold at each checkpoint.

All configs run with the first seed, then all with the second, so a stopped call leaves whole comparisons.

It takes hours on a CPU, so it is not part of run_all.py. A stopped run continues. A run that was trained on another
machine (model.safetensors, metrics.jsonl and environment.json in its folder) is scored as it is. The JSON in --out
keeps configs and seeds of other calls, each row with its machine and precision, so that they may be measured one after
the other, beside one another, and on several machines.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from timing import arguments, folder, machine, print_table, run_columns, with_earlier, write_json

from cpn_fast.commands.reproduce import at_scale, scored_seeds
from cpn_fast.config import Config
from cpn_fast.config_file import load
from cpn_fast.data.scores import Evaluation
from cpn_fast.runtime.files import read_json, read_metrics
from cpn_fast.stages import train
from cpn_fast.training import checkpoint

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("cam", "seam", "seam_prcm", "grid", "paper")


SCORES = ("train", "threshold", "validation", "validation, oracle")
"""Figures of a run: mIoU (%) of its CAM seeds, and the best threshold of the training list."""


def scores(config: Config, validation: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows of one trained network at all scales and at one; ``about`` describes the machine."""
    weights = train.run(config)
    rows = []
    for config_ in (config, at_scale(config, 1.0)):
        on_training = scored_seeds(config_, weights, config_.data.eval_list)
        threshold = oracle_threshold(on_training)
        on_validation = scored_seeds(config_, weights, validation, threshold)
        rows.append(
            {
                "seed": config.train.seed,
                "scales": ", ".join(f"{scale:g}" for scale in config_.cam.scales),
                "train": 100 * float(on_training.oracle.mean_iou),
                "threshold": threshold,
                "validation": 100 * float(on_validation.fixed.mean_iou),
                "validation, oracle": 100 * float(on_validation.oracle.mean_iou),
                **run_columns(config.run, about),
                "trained on": read_json(config.run / "environment.json")["device"],
            }
        )
    return rows


def curve(config: Config, validation: Path, end: float) -> dict[int, float]:
    """Return steps -> mIoU (%) of the validation list's seeds at their best threshold; ``end`` is the last value."""
    points = {}
    last = read_metrics(config.run / "metrics.jsonl")[-1]["step"]
    for path in reversed(checkpoint.existing(config.run / "checkpoints")):
        if step(path) == last or step(path) % config.train.checkpoint_every:  # a stopped run's checkpoint
            continue
        renamed = config.model_copy(update={"name": f"{config.name}-{path.stem}"})
        scored = scored_seeds(renamed, path, validation)
        points[step(path)] = 100 * float(scored.oracle.mean_iou)
    return points | {last: end}


def step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def spread(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and sample standard deviation (None for one run) over the runs of each config and set of scales."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["config"], row["scales"]), []).append(row)
    summaries = []
    for (name, scales), runs in groups.items():
        summary: dict[str, Any] = {"config": name, "scales": scales, "seeds": len(runs)}
        for key in SCORES:
            values = [run[key] for run in runs]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            summary[key] = {"mean": statistics.mean(values), "spread": deviation}
        summaries.append(summary)
    return summaries


def written(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the summary as text: 38.51 ± 0.25."""

    def text(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return f"{value['mean']:.2f}" + ("" if value["spread"] is None else f" ± {value['spread']:.2f}")

    return {key: text(value) for key, value in summary.items()}


def earlier_curves(path: Path) -> dict[str, dict[int, dict[int, float]]]:
    """Read the curves from this script's JSON. Without the file there are none."""
    if not path.exists():
        return {}
    return {
        config: {int(seed): {int(at): miou for at, miou in points.items()} for seed, points in of_seeds.items()}
        for config, of_seeds in read_json(path)["curves"].items()
    }


def oracle_threshold(evaluation: Evaluation) -> float:
    (threshold,) = (result.threshold for result in evaluation.results if result.kind == "oracle")
    assert threshold is not None
    return threshold


def plot(path: Path, title: str, curves: dict[str, dict[int, dict[int, float]]]) -> None:
    """Plot the mean over the seeds of each config, and their range: ``curves[config][seed][step]``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, of_seeds in curves.items():
        points = list(of_seeds.values())
        steps = sorted(set[int].intersection(*(set(of_seed) for of_seed in points)))
        values = [[of_seed[at] for of_seed in points] for at in steps]
        (line,) = axes.plot(steps, [statistics.mean(v) for v in values], "o-", label=f"{name} ({len(points)})")
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2)
    axes.set(xlabel="optimiser steps", ylabel="validation mIoU of seeds at their best threshold, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(title="config (seeds)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(
    configs: Iterable[Path],
    seeds: Sequence[int],
    overrides: list[str],
    every: int,
    validation: Path,
    out: Path,
    about: dict[str, Any],
) -> None:
    steps = [f"train.checkpoint_every={every}", "train.keep_checkpoints=1000"]
    bases = [(path, load(path, overrides).name) for path in configs]
    for seed, (path, base) in itertools.product(seeds, bases):
        name = f"{base}_seed{seed}" if seed else base
        config = load(path, [*overrides, *steps, f"train.seed={seed}", f"name={name}"])
        measured = scores(config, validation, about)
        points = curve(config, validation, measured[0]["validation, oracle"])
        file = out / "real_images.json"
        rows = with_earlier(file, [{"config": base, **row} for row in measured], "config", "seed")
        curves = earlier_curves(file)
        curves.setdefault(base, {})[seed] = points
        write_json(file, about, rows, spread=spread(rows), curves=curves)
        plot(out / "real_images.png", "Seeds of real images", curves)
    print_table("mIoU of CAM seeds on real images, %", [written(summary) for summary in spread(rows)])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="train.seed; default 0")
    parser.add_argument(
        "--every", type=int, default=1000, metavar="STEPS", help="steps between checkpoints; default 1000"
    )
    parser.add_argument("--validation", type=Path, default=Path("ImageSets/Segmentation/val.txt"), metavar="LIST")
    options = parser.parse_args()
    configs = options.configs or [CONFIGS / f"voc_mini{name}.yaml" for name in ("", *(f"_{name}" for name in NAMES))]
    about = machine(options.device)
    out = folder(options.out, options.device)
    run(configs, options.seeds, options.overrides, options.every, options.validation, out, about)


if __name__ == "__main__":
    main()
