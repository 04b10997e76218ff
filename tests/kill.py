"""Kills every command that writes, at its file events, and compares what it leaves to an undisturbed run.

A trial kills a command several times in a row, each at an event chosen at random (``file_events``): the command's
process alone, or with all that it started. Then the command is given once more. It must end with 0, every file but logs
must have the bytes of the undisturbed run, no other file may be there, and no process may be left.

By hand: ``python tests/kill.py --kills 1000`` (``--seed`` for other moments, ``--command NAME`` for some alone).
Commands run in forked processes, so that only this one imports everything.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import multiprocessing.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

os.environ.setdefault("OMP_NUM_THREADS", "1")  # OpenMP's threads do not survive a fork

import yaml
from file_events import END, PLACE, Record, watch
from PIL import Image

from cpn_fast import cli, config, config_file  # noqa: F401
from cpn_fast.commands import demo, information, init, predict, report, reproduce  # noqa: F401
from cpn_fast.commands.demo_data import DEMO_CLASSES, generate
from cpn_fast.stages import chain  # noqa: F401
from cpn_fast.training import batch_size

LOGS = ("metrics.jsonl", "events.", "verified.json", "masks.json")
"""Files that tell of times, or of the starts themselves."""
TRAIN = {"batch": 2, "steps": 4, "checkpoint_every": 2, "log_every": 2, "data_threads": 1}
SIZE = {"long_side": [64, 96], "crop": 64}
LIST = "ImageSets/Segmentation/train.txt"
CONFIG = {
    "name": "kill",
    "classes": list(DEMO_CLASSES),
    "data": {"root": "data", "train_list": LIST},
    "superpixels": {"count": 30},
    "augment": SIZE,
    "model": {"backbone": "narrow"},
    "train": TRAIN,
    "cam": {"scales": [0.5], "batch": 2},
    "crf": {"workers": 1, "parameters": "cpn"},
    "affinity": {"train": TRAIN, "augment": SIZE},
    "walk": {"logt": 1},
    "segment": {"train": TRAIN, "augment": {"crop": 64}, "scales": [0.5], "bn_momentum": 0.1, "crf": None},
}
SEEDS = "runs/kill/cams/train/seeds"


class Command(NamedTuple):
    words: str
    needs: Sequence[str] = ()
    """Commands whose files it reads."""


WEIGHTS = "runs/kill/model.safetensors"
COMMANDS = {
    "init": Command("init data --out started"),
    "import-coco": Command("import-coco instances_own.json data/JPEGImages coco"),
    "superpixels": Command("superpixels config.yaml"),
    "shards": Command("shards config.yaml packed"),
    "train": Command("train config.yaml"),
    "train of shards": Command("train config.yaml --set data.shards=../packed --set name=sharded", ["shards"]),
    "cam": Command(f"cam config.yaml --list {LIST}", ["train"]),
    "evaluate": Command(f"evaluate config.yaml --cams {SEEDS} --list {LIST}", ["train", "cam"]),
    "information": Command(f"information config.yaml --checkpoint {WEIGHTS}", ["train"]),
    "refine": Command("refine config.yaml", ["train", "cam"]),
    "segment": Command("segment config.yaml --masks data/SegmentationClass --submission comp6.tar.gz"),
    "run": Command("run config.yaml --set name=chain --set superpixels.cache=chain"),
    "report": Command("report runs/kill", ["train", "cam", "evaluate"]),
    "predict": Command("predict data/JPEGImages --model runs/kill --annotations coco --annotations cvat", ["train"]),
    "export": Command(f"export {SEEDS} exported --form seam", ["train", "cam"]),
    "convert to .safetensors": Command(f"convert {WEIGHTS} new/x.safetensors", ["train"]),
    "convert to .pth": Command(f"convert {WEIGHTS} x.pth", ["train"]),
    "convert to .pt2": Command("convert runs/kill x.pt2", ["train"]),
    "convert to .onnx": Command("convert runs/kill x.onnx", ["train"]),
    "demo": Command("demo --out shown"),
    "reproduce": Command(
        "reproduce table3 --config config.yaml --set name=paper --set train.batch=2 --set train.epochs=null "
        "--set train.steps=4"
    ),
}
"""In an order in which each finds what it needs."""


def prepare(world: Path) -> None:
    """A data set, a config, and COCO's JSON of some of the images."""
    generate(world / "data", train=4, val=2)
    (world / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    images = []
    for number, path in enumerate(sorted((world / "data/JPEGImages").iterdir())):
        width, height = Image.open(path).size
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
    square = [10, 10, 40, 10, 40, 40, 10, 40]
    tree = {
        "images": images,
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "segmentation": [square], "iscrowd": 0} for n in range(4)
        ],
    }
    (world / "instances_own.json").write_text(json.dumps(tree))


def shrink() -> None:
    """In the process of a command: what a demo trains on is small, and what ``init`` measures is always the same."""
    few = [f"train.{key}={value}" for key, value in TRAIN.items()]
    small = [*few, *(f"{section}.{override}" for section in ("affinity", "segment") for override in few)]
    small += ["augment.long_side=[64,96]", "augment.crop=64", "superpixels.count=30", "cam.scales=[0.5]"]
    vars(demo)["generate"] = functools.partial(generate, train=4, val=2)
    vars(demo)["load"] = lambda path, overrides: config_file.load(path, [*overrides, *small])
    batch_size.try_steps = lambda *_: 60.0


class Trials:
    """A folder in which commands run, at the same path each time, since some results hold absolute paths."""

    def __init__(self, scratch: Path, dice: random.Random) -> None:
        self.scratch, self.dice = scratch, dice
        self.world, self.states = scratch / "world", scratch / "states"
        self.record = Record(scratch / "events")
        self.sessions: set[int] = set()
        self.events: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        """Command -> how many events it has, and how long it takes, when nothing disturbs it."""

    def start(self, name: str, *, at: int = 0) -> str | None:
        """Give a command; the kind of event at which it was killed, or None when it ended with 0."""
        group, half = self.dice.random() < 0.5, self.dice.random() < 0.5
        sys.stdout.flush()
        process = os.fork()
        if not process:
            self._be(name, at=at, group=group, half=half)
        self.sessions.add(process)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code == -signal.SIGKILL:
            return self.record.killed_at
        assert code == 0, f"{name} ended with {code}:\n{(self.scratch / 'log.txt').read_text()[-3000:]}"
        return None

    def _be(self, name: str, *, at: int, group: bool, half: bool) -> NoReturn:
        """The command, in a forked process."""
        code = 1
        try:
            os.setsid()
            os.chdir(self.world)
            log = os.open(self.scratch / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
            os.environ[PLACE] = f"{self.scratch / 'events'}{os.pathsep}{self.world}"
            os.environ["TMPDIR"] = tempfile.tempdir = str(self.scratch)
            sys.modules["__main__"] = types.ModuleType("__main__")  # CRF processes would import this file
            forkserver = multiprocessing.get_context("forkserver")
            preload = forkserver.set_forkserver_preload
            type(forkserver).set_forkserver_preload = lambda self, names: preload([*names, "file_events"])  # type: ignore[method-assign, assignment]
            sys.argv = ["cpn-fast", *COMMANDS[name].words.split()]
            shrink()
            self.record.begin(os.getpid(), at=at, group=group, half=half)
            watch()
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            print(ended.code or "", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            vars(multiprocessing.util)["_exit_function"]()  # as an interpreter does that exits
            if not code:
                self.record.note(END)
            os._exit(code)

    def enter(self, state: str) -> None:
        """Make the world as it was before, or after, a command."""
        shutil.rmtree(self.world, ignore_errors=True)
        shutil.copytree(self.states / state, self.world, symlinks=True)

    def undisturbed(self, names: Sequence[str]) -> None:
        """Give commands, one after the other, and keep what was there before and after each."""
        for name in names:
            self._keep(f"before {name}")
            began = time.monotonic()
            assert self.start(name) is None
            self.events[name], self.seconds[name] = self.record.count, time.monotonic() - began
            print(f"{name}: {self.events[name]} events, {self.seconds[name]:.1f} s", flush=True)
            self._keep(f"after {name}")

    def _keep(self, state: str) -> None:
        shutil.copytree(self.world, self.states / state, symlinks=True)

    def trial(self, name: str, most: int, kills: Counter[str]) -> None:
        """Kill a command up to ``most`` times, count the events' kinds in ``kills``, and compare what it makes then."""
        self.enter(f"before {name}")
        span, told = self.events[name] + 1, "killed at"
        for _ in range(most):
            at = self.dice.randint(1, self.dice.choice((span, span, max(2, span // 3))))
            at = -1 if at == span else at
            kind = self.start(name, at=at)
            if kind is None:
                break
            kills[kind] += 1
            told += f" {kind} {at}"
        else:
            assert self.start(name) is None
        try:
            self.compare(name)
        except AssertionError as error:
            raise AssertionError(f"{error} ({told})") from None

    def compare(self, name: str) -> None:
        expected, found = files(self.states / f"after {name}"), files(self.world)
        assert found.keys() == expected.keys(), f"{name}: {sorted(found.keys() ^ expected.keys())}"
        differing = [path for path in expected if found[path] != expected[path]]
        assert not differing, f"{name}: {differing}"
        until = time.monotonic() + 20
        while alive := self.alive():
            assert time.monotonic() < until, f"{name}: processes {alive} outlive it"
            time.sleep(0.05)
        self.sessions.clear()

    def alive(self) -> list[str]:
        """Processes that killed commands left."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session = path.read_text().rpartition(") ")[2].split()[:4]
                if int(session) in self.sessions and state != "Z":
                    found.append(path.parent.name)
        return found


def files(folder: Path) -> dict[str, bytes]:
    """Every file but logs; of a link where it leads to, of a folder that it is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.name.startswith(LOGS):
            content = b"" if path.is_dir() else path.read_bytes()
            found[str(path.relative_to(folder))] = os.fsencode(path.readlink()) if path.is_symlink() else content
    return found


def needed(names: Sequence[str]) -> list[str]:
    """Commands with those whose files they read, in order."""
    wanted = {*names, *(need for name in names for need in COMMANDS[name].needs)}
    return [name for name in COMMANDS if name in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", choices=COMMANDS, action="append", help="only these")
    parser.add_argument("--most", type=int, default=4, help="kills in a row of a command")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    names = options.command or list(COMMANDS)
    if "convert to .onnx" in names:
        importlib.import_module("onnxscript")
    kills: dict[str, Counter[str]] = {name: Counter() for name in names}
    failed = 0
    scratch = tempfile.mkdtemp()  # not TemporaryDirectory, which forked processes would remove
    try:
        trials = Trials(Path(scratch).resolve(), dice)
        prepare(trials.world)
        trials.undisturbed(needed(names))
        while (total := sum(own.total() for own in kills.values())) < options.kills:
            name = min(
                names, key=lambda name: kills[name].total() * trials.seconds[name] ** 0.5
            )  # long ones less often
            try:
                trials.trial(name, min(dice.randint(1, options.most), options.kills - total), kills[name])
            except AssertionError as error:
                failed += 1
                print(f"FAILED: {error}", flush=True)
            done = sum(own.total() for own in kills.values())
            if done // 50 > total // 50:
                print(f"{done} kills, {failed} failures", flush=True)
        for name in names:
            print(f"{name}: {kills[name].total()} kills {dict(kills[name])}")
    finally:
        shutil.rmtree(scratch)
    print(f"{total} kills, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
