"""What limits the segmenter: its mIoU with other steps, rates, images, backbones and masks: docs/results.md.

    python bench/segmenter.py CONFIG --run NAME --masks FOLDER [--set KEY=VALUE ...]

Trains the segmenter of a config on FOLDER/ID.png of data.train_list, or continues or reuses the run NAME. Scores its
masks on data.eval_list, training images with ground truth, and on segment.eval_list, there also after the CRF.
Beside them stands the score of FOLDER on data.eval_list. If FOLDER is the ground truth, the row shows what the same
training reaches without a wrong mask.

It takes hours on a CPU, so it is not part of run_all.py. A stopped run continues. The JSON in --out keeps the rows of
other runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timing import arguments, folder, machine, print_table, run_columns, with_earlier, write_json

from cpn_fast.config import Config
from cpn_fast.config_file import load
from cpn_fast.data.dataset import load_samples
from cpn_fast.runtime.files import read_metrics
from cpn_fast.stages import evaluate, segment


def scored(config: Config, masks: Path, list_path: Path) -> float | None:
    """Return the mIoU (%) of masks of a list, or None if they are the ground truth itself. Writes no scores."""
    samples = load_samples(config.data, config.classes, list_path, labels=False, masks=True)
    truth = samples[0].mask
    if truth is not None and truth.parent.samefile(masks):
        return None
    evaluation = evaluate.evaluate_masks(samples, masks, config.classes, list_path=str(list_path), workers=2)
    return 100 * float(evaluation.results[0].scores.mean_iou)


def losses(run: Path, ends: int = 5) -> tuple[float, float]:
    """Return the mean loss of the first and of the last ``ends`` lines of a run's metrics.jsonl."""
    logged = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    return statistics.mean(logged[:ends]), statistics.mean(logged[-ends:])


def measured(config: Config, masks: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Train, segment both lists, and return the row; ``about`` describes the machine."""
    weights = segment.run(config, masks)
    run, options, training = weights.parent, config.segment, config.data.eval_list
    without_crf = config.model_copy(update={"segment": options.model_copy(update={"crf": None})})
    on_training = segment.segment(without_crf, weights, training)
    on_validation = segment.segment(config, weights)
    first, last = losses(run)
    return {
        "images": len(load_samples(config.data, config.classes, config.data.train_list, labels=False, masks=False)),
        "backbone": config.model.backbone,
        "steps": options.train.steps,
        "batch": options.train.batch,
        "crop": options.augment.crop,
        "lr": options.train.lr,
        "first loss": first,
        "last loss": last,
        "its masks": scored(config, masks, training),
        "training": scored(config, on_training / "masks", training),
        "validation": scored(config, on_validation / "masks", options.eval_list),
        "with CRF": scored(config, on_validation / "crf", options.eval_list) if options.crf else None,
        **run_columns(run, about),
    }


def run(
    path: Path,
    name: str,
    masks: Path,
    overrides: Sequence[str],
    out: Path,
    about: dict[str, Any],
) -> None:
    config = load(path, [*overrides, f"name={name}"])
    row = {"run": name, **measured(config, masks, about)}
    file = out / "segmenter.json"
    rows = with_earlier(file, [row], "run")
    write_json(file, about, rows)
    print_table("mIoU of the segmenter's masks, %", rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("--run", required=True, metavar="NAME", help="name of the run and of its row")
    parser.add_argument("--masks", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    out = folder(options.out, options.device)
    run(options.config, options.run, options.masks, options.overrides, out, machine(options.device))


if __name__ == "__main__":
    main()
