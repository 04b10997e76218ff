"""A short search for the settings that give each method its best: docs/results.md.

    python bench/settings.py CONFIG [CONFIG ...] --set data.root=FOLDER --try KEY=VALUE [KEY=VALUE ...] [--try ...]

Trains every config as it is and with each --try, for --steps steps, or continues or reuses an earlier run. Scores the
CAM seeds of data.eval_list, training images with ground truth, at their best threshold. No other list is read, so that
a choice by this table owes nothing to the validation list. Prints the lead of each --try over the config as it is.

All configs run with one setting, then all with the next, so a stopped call leaves whole comparisons. It takes hours on
a CPU, so it is not part of run_all.py. A stopped run continues. The JSON in --out keeps the rows of other calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_images import oracle_threshold
from timing import arguments, folder, logged_rate, machine, print_table, write_json

from cpn_fast.commands.reproduce import scored_seeds
from cpn_fast.config import Config
from cpn_fast.config_file import load
from cpn_fast.runtime.files import read_json
from cpn_fast.stages import train

UNCHANGED = "as it is"


def measured(config: Config, about: dict[str, Any]) -> dict[str, Any]:
    """Train, score the training list's seeds, and return the row; ``about`` describes the machine."""
    weights = train.run(config)
    evaluation = scored_seeds(config, weights, config.data.eval_list)
    return {
        "train": 100 * float(evaluation.oracle.mean_iou),
        "threshold": oracle_threshold(evaluation),
        "images/s": logged_rate(config.run),
        "device": about["device"],
        "precision": read_json(config.run / "environment.json")["precision"],
    }


def with_leads(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each row's lead, in points, over its config as it is after as many steps. It is None if that was not run."""
    base = {(row["config"], row["steps"]): row["train"] for row in rows if row["setting"] == UNCHANGED}
    leads = [(row["train"], base.get((row["config"], row["steps"]))) for row in rows]
    return [
        row | {"lead": None if unchanged is None else score - unchanged}
        for row, (score, unchanged) in zip(rows, leads, strict=True)
    ]


def run(
    configs: Sequence[Path],
    settings: Sequence[Sequence[str]],
    overrides: list[str],
    steps: int,
    out: Path,
    about: dict[str, Any],
) -> None:
    path = out / "settings.json"
    for setting in settings:
        title = " ".join(setting) or UNCHANGED
        for config_path in configs:
            base = load(config_path, overrides).name
            name = re.sub(r"[^\w.-]", "-", "-".join([base, f"{steps}-steps", *setting]))
            config = load(config_path, [*overrides, f"train.steps={steps}", *setting, f"name={name}"])
            row = {"config": base, "setting": title, "steps": steps, **measured(config, about)}
            key = (base, title, steps)
            # Read only now: another call may have written it meanwhile.
            rows = read_json(path)["rows"] if path.exists() else []
            rows = [row for row in rows if (row["config"], row["setting"], row["steps"]) != key]
            rows = with_leads([*rows, row])
            write_json(path, about, rows)
    print_table("mIoU of the training list's CAM seeds, %", rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--try", action="append", nargs="+", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="of each run; default 1000")
    options = parser.parse_args()
    out, about = folder(options.out, options.device), machine(options.device)
    run(options.configs, [(), *options.settings], options.overrides, options.steps, out, about)


if __name__ == "__main__":
    main()
