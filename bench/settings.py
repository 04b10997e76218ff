"""A short search for the settings that give each method its best: docs/results.md.

    python bench/settings.py CONFIG [CONFIG ...] --set data.root=FOLDER --try KEY=VALUE [KEY=VALUE ...] [--try ...]

Trains every config as it is and with each --try, for --steps steps, or continues or reuses an earlier run. Scores the
CAM seeds of data.eval_list, training images with ground truth, at their best threshold. No other list is read, so that
a choice by this table owes nothing to the validation list. Prints the lead of each --try over the config as it is.

In a --try, features=FACTOR is not a key: it multiplies MobileNetV2's inner features, which PCM and PRCM read.

All configs run with one setting, then all with the next, so a stopped call leaves whole comparisons. It takes hours on
a CPU, so it is not part of run_all.py. A stopped run continues. The JSON in --out keeps the rows of other calls.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from real_images import oracle_threshold
from timing import arguments, folder, machine, print_table, run_columns, with_earlier, write_json

from cpn_fast.commands.reproduce import scored_seeds
from cpn_fast.config import Config
from cpn_fast.config_file import load
from cpn_fast.models import mobilenet_v2
from cpn_fast.stages import train

FEATURES = "features="


def measured(config: Config, about: dict[str, Any]) -> dict[str, Any]:
    """Train, score the training list's seeds, and return the row; ``about`` describes the machine."""
    weights = train.run(config)
    evaluation = scored_seeds(config, weights, config.data.eval_list)
    return {
        "train": 100 * float(evaluation.oracle.mean_iou),
        "threshold": oracle_threshold(evaluation),
        **run_columns(config.run, about),
    }


@contextmanager
def inner_features(setting: Sequence[str]) -> Iterator[None]:
    """Multiply the factor of MobileNetV2's inner features by the setting's ``features``, if it has one."""
    factors = [float(text.removeprefix(FEATURES)) for text in setting if text.startswith(FEATURES)]
    with mock.patch.object(mobilenet_v2, "_INNER_SCALE", math.prod([mobilenet_v2._INNER_SCALE, *factors])):
        yield


def run(
    configs: Sequence[Path],
    settings: Sequence[Sequence[str]],
    overrides: list[str],
    steps: int,
    out: Path,
    about: dict[str, Any],
) -> None:
    file = out / "settings.json"
    unchanged: dict[str, float] = {}  # a config's score as it is; it comes first
    for setting in [(), *settings]:
        for config_path in configs:
            base = load(config_path, overrides).name
            name = re.sub(r"[^\w.-]", "-", "-".join([base, f"{steps}-steps", *setting]))
            keys = [text for text in setting if not text.startswith(FEATURES)]
            config = load(config_path, [*overrides, f"train.steps={steps}", *keys, f"name={name}"])
            row: dict[str, Any] = {"config": base, "setting": " ".join(setting) or "as it is", "steps": steps}
            with inner_features(setting):
                row |= measured(config, about)
            row["lead"] = row["train"] - unchanged.setdefault(base, row["train"])
            rows = with_earlier(file, [row], "config", "setting", "steps")
            write_json(file, about, rows)
    print_table("mIoU of the training list's CAM seeds, %", rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--try", action="append", nargs="+", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="of each run; default 1000")
    options = parser.parse_args()
    out, about = folder(options.out, options.device), machine(options.device)
    run(options.configs, options.settings, options.overrides, options.steps, out, about)


if __name__ == "__main__":
    main()
