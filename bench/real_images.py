"""How good the methods' seeds are on real images, at the end and on the way there: README's "On real images".

    python bench/real_images.py [CONFIG ...] --set data.root=FOLDER [--every STEPS] [--validation LIST]

Trains every config (by default configs/voc_mini*.yaml), or continues or takes what is in its run's folder, and scores
seeds at the best threshold of the training list: of that list, at all scales of the config and at scale 1 alone, and
of the validation list at the same threshold. The curve has the validation list's own best threshold at each checkpoint.
Hours on a CPU, so it is not part of run_all.py; stopped, it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timing import arguments, folder, logged_rate, machine, print_table, write_json

from cpn_fast import checkpoint, evaluate, train
from cpn_fast.config import Config, load
from cpn_fast.reproduce import at_scale, scored_seeds

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("cam", "seam", "seam_prcm", "grid", "paper")


def seeds(config: Config, validation: Path) -> list[dict[str, Any]]:
    """Rows of the trained network at all scales and at one."""
    weights = train.run(config)
    rows = []
    for config_ in (config, at_scale(config, 1.0)):
        found = scored_seeds(config_, weights, config_.data.train_list)
        threshold = oracle_threshold(found)
        held_out = scored_seeds(config_, weights, validation, threshold)
        rows.append(
            {
                "config": config.name,
                "scales": ", ".join(f"{scale:g}" for scale in config_.cam.scales),
                "train": 100 * float(found.oracle.mean_iou),
                "threshold": threshold,
                "validation": 100 * float(held_out.fixed.mean_iou),
                "validation, oracle": 100 * float(held_out.oracle.mean_iou),
                "images/s": logged_rate(config.run),
            }
        )
    return rows


def curve(config: Config, validation: Path, end: float) -> dict[int, float]:
    """Steps -> mIoU (%) of the validation list's seeds at their own best threshold, which is ``end`` after the last."""
    found = {}
    *earlier, last = reversed(checkpoint.existing(config.run / "checkpoints"))
    for path in earlier:
        beside = config.model_copy(update={"name": f"{config.name}-{path.stem}"})
        scored = scored_seeds(beside, path, validation)
        found[step(path)] = 100 * float(scored.oracle.mean_iou)
    return found | {step(last): end}


def step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def oracle_threshold(found: evaluate.Evaluation) -> float:
    (threshold,) = (result.threshold for result in found.results if result.kind == "oracle")
    assert threshold is not None
    return threshold


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
