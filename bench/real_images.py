"""How good the methods' seeds are on real images, at the end and on the way there: README's "On real images".

    python bench/real_images.py [CONFIG ...] --set data.root=FOLDER [--every STEPS] [--validation LIST]

Trains every config (by default configs/voc_mini*.yaml), or continues or takes what is in its run's folder, and scores
seeds at the best threshold of the training list: of that list, at all scales of the config and at scale 1 alone, and
of the validation list at the same threshold. The curve has the validation list's own best threshold at each checkpoint.
Hours on a CPU, so it is not part of run_all.py; stopped, it goes on where it was.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timing import arguments, folder, machine, print_table, write_json

from cpn_fast import cam, checkpoint, evaluate, train
from cpn_fast.config import Config, load
from cpn_fast.dataset import load_samples

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("cam", "seam", "seam_prcm", "grid", "paper")


def score(config: Config, weights: Path, list_path: Path, held_out: float | None = None) -> evaluate.Evaluation:
    """Make what is missing of a list's seeds and score them."""
    seeds = cam.run(config, weights, list_path) / "seeds"
    samples = load_samples(config.data, config.classes, list_path, labels=False, masks=True)
    name = str(list_path)
    return evaluate.evaluate_cams(
        samples, seeds, config.evaluate, config.classes, list_name=name, held_out=held_out, workers=2
    )


def named(config: Config, suffix: str, scales: tuple[float, ...]) -> Config:
    """A run beside the config's own, for seeds of other weights or scales."""
    options = config.cam.model_copy(update={"scales": scales})
    return config.model_copy(update={"name": f"{config.name}-{suffix}", "cam": options})


def seeds(config: Config, validation: Path) -> list[dict[str, Any]]:
    """Rows of the trained network at all scales and at one."""
    weights = train.run(config)
    rows = []
    for config_ in (config, named(config, "scale-1", (1.0,))):
        found = score(config_, weights, config_.data.train_list)
        threshold = oracle_threshold(found)
        held_out = score(config_, weights, validation, threshold)
        rows.append(
            {
                "config": config.name,
                "scales": ", ".join(f"{scale:g}" for scale in config_.cam.scales),
                "train": 100 * float(found.oracle.mean_iou),
                "threshold": threshold,
                "validation": 100 * float(held_out.fixed.mean_iou),
                "validation, oracle": 100 * float(held_out.oracle.mean_iou),
                "images/s": images_per_second(config),
            }
        )
    return rows


def curve(config: Config, validation: Path, end: float) -> dict[int, float]:
    """Steps -> mIoU (%) of the validation list's seeds at their own best threshold, which is ``end`` after the last."""
    found = {}
    *earlier, last = reversed(checkpoint.existing(config.run / "checkpoints"))
    for path in earlier:
        scored = score(named(config, path.stem, config.cam.scales), path, validation)
        found[step(path)] = 100 * float(scored.oracle.mean_iou)
    return found | {step(last): end}


def step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def oracle_threshold(found: evaluate.Evaluation) -> float:
    (threshold,) = (result.threshold for result in found.results if result.kind == "oracle")
    assert threshold is not None
    return threshold


def images_per_second(config: Config) -> float:
    """The median of the run's log."""
    lines = (config.run / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["images_per_second"] for line in lines)


def plot(path: Path, title: str, curves: dict[str, dict[int, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, points in curves.items():
        axes.plot(list(points), list(points.values()), "o-", label=name)
    axes.set(xlabel="optimiser steps", ylabel="validation mIoU of seeds at their best threshold, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(configs: Iterable[Path], overrides: list[str], every: int, validation: Path, out: Path, about: Any) -> None:
    rows: list[dict[str, Any]] = []
    curves: dict[str, dict[int, float]] = {}
    for path in configs:
        steps = [f"train.checkpoint_every={every}", "train.keep_checkpoints=1000"]
        config = load(path, [*overrides, *steps])
        own = seeds(config, validation)
        rows += own
        curves[config.name] = curve(config, validation, own[0]["validation, oracle"])
        write_json(out / "real_images.json", about, rows, curves=curves)
        plot(out / "real_images.png", "Seeds of real images", curves)
    print_table("mIoU of seeds on real images, %", rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--every", type=int, default=1000, metavar="STEPS", help="between checkpoints; default 1000")
    parser.add_argument("--validation", type=Path, default=Path("ImageSets/Segmentation/val.txt"), metavar="LIST")
    options = parser.parse_args()
    configs = options.configs or [CONFIGS / f"voc_mini{name}.yaml" for name in ("", *(f"_{name}" for name in NAMES))]
    about = machine(options.device)
    run(configs, options.overrides, options.every, options.validation, folder(options.out, options.device), about)


if __name__ == "__main__":
    main()
