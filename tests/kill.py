"""Kills ``cpn-fast run`` in every stage, again and again, and compares what it ends with to an undisturbed run.

By hand: ``python tests/kill.py --minutes 10`` (``--seed`` for other moments). Chains run in forked processes, so that
only this one needs to import everything.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from cpn_fast import cli, run  # noqa: F401 (imported here so that no fork has to)
from cpn_fast.demo_data import DEMO_CLASSES, generate

STAGES = {
    "superpixels": "superpixels/*",
    "train": "kill/checkpoints",
    "cam": "kill/cams/*/*",
    "CRF": "kill/refine/crf-*",
    "labels": "kill/refine/labels",
    "AffinityNet": "kill/refine/affinity/checkpoints",
    "walk": "kill/refine/masks",
    "DeepLab": "kill/segment/deeplab/checkpoints",
    "segment": "kill/segment/val/*",
    "evaluate": "kill/evaluation/*/*",
}
"""Stage -> folders that it writes into."""
LOGS = ("metrics.jsonl", "events.", ".lock", "verified.json", "masks.json")
"""Files that tell of times, or of the starts themselves."""


def write_config(folder: Path, data: Path) -> None:
    """A chain of a few seconds, whose paths are relative: two folders can hold the same bytes."""
    train = {"batch": 2, "steps": 6, "checkpoint_every": 2, "log_every": 2, "data_threads": 1}
    size = {"long_side": [64, 96], "crop": 64}
    tree = {
        "name": "kill",
        "classes": list(DEMO_CLASSES),
        "data": {"root": str(data), "train_list": "ImageSets/Segmentation/train.txt"},
        "superpixels": {"count": 30},
        "augment": size,
        "model": {"backbone": "narrow"},
        "train": train,
        "cam": {"scales": [0.5], "batch": 2},
        "crf": {"workers": 1, "parameters": "cpn"},
        "affinity": {"train": train, "augment": size},
        "walk": {"logt": 1},
        "segment": {"train": train, "augment": {"crop": 64}, "scales": [0.5], "bn_momentum": 0.1, "crf": None},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


def start(folder: Path) -> int:
    """``cpn-fast run`` in a process of its own; its output goes to a file."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    os.setsid()
    os.chdir(folder)
    log = os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["cpn-fast", "run", "config.yaml"]
    code = 1
    try:
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        print(ended.code or "", file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(code)


def end(process: int) -> int:
    """Wait for it; its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_when(process: int, ready: Callable[[], bool], pause: float) -> int | None:
    """Send SIGKILL a ``pause`` after something became true; the exit code if the process ended before."""
    while not ready():
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    time.sleep(pause)
    os.kill(process, signal.SIGKILL)
    code = end(process)
    return None if code == -signal.SIGKILL else code


def names(folder: Path, stages: Iterable[str]) -> set[str]:
    """Files of stages, those included that are being written: each writing has another name."""
    places = [place for stage in stages for place in folder.glob(f"runs/{STAGES[stage]}") if place.is_dir()]
    return {f"{place}/{name}" for place in places for name in os.listdir(place)}  # noqa: PTH208


def results(folder: Path) -> dict[str, bytes]:
    """Every file of the runs but logs."""
    files = [path for path in (folder / "runs").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not path.name.startswith(LOGS)}


def disturbed(folder: Path, data: Path, dice: random.Random, kills: int) -> dict[str, int]:
    """Run a chain to its end, killing it up to ``kills`` times in each stage; how often each was killed."""
    write_config(folder, data)
    found = dict.fromkeys(STAGES, 0)
    for number, stage in enumerate(STAGES):
        later = list(STAGES)[number + 1 :]
        for _ in range(kills):
            own, others, more = names(folder, [stage]), names(folder, later), dice.randint(1, 3)

            def ready(stage=stage, later=later, own=own, others=others, more=more) -> bool:
                return len(names(folder, [stage]) - own) >= more or bool(names(folder, later) - others)

            code = kill_when(start(folder), ready, dice.random() * 0.02)
            if code is not None:
                assert code == 0, (folder / "log.txt").read_text()[-3000:]
                break
            found[stage] += 1
    assert end(start(folder)) == 0, (folder / "log.txt").read_text()[-3000:]
    return found


def compare(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    differing = [name for name in expected if found[name] != expected[name]]
    assert not differing, differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=3, help="in each stage of a chain")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    totals: dict[str, int] = dict.fromkeys(STAGES, 0)
    chains = 0
    with tempfile.TemporaryDirectory() as scratch:
        data, whole = Path(scratch, "data"), Path(scratch, "whole")
        generate(data, train=8, val=3)
        write_config(whole, data)
        assert end(start(whole)) == 0, (whole / "log.txt").read_text()[-3000:]
        expected, until = results(whole), time.monotonic() + 60 * options.minutes
        while not chains or time.monotonic() < until:
            chains += 1
            kills = disturbed(Path(scratch, f"chain{chains}"), data, dice, options.kills)
            compare(results(Path(scratch, f"chain{chains}")), expected)
            totals = {stage: totals[stage] + kills[stage] for stage in STAGES}
            print(f"{chains} chains, {sum(totals.values())} kills: {totals}", flush=True)


if __name__ == "__main__":
    main()
