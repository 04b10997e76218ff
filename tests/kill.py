"""Kill every command that writes, at its file events, and compare its files with those of an undisturbed run.

A trial kills a command several times in a row, each time at a random event (``file_events``). It kills the command's
process alone, or with all processes that it started. Then it gives the command once more. The command must end with 0.
Every file except logs must have the bytes of the undisturbed run. No other file and no process may be left.

By hand: ``python tests/kill.py --kills 1000`` (``--seed`` for other events, ``--command NAME`` for one command).
Commands run in forked processes, so that only this process imports everything.
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

LOGS = ("metrics.jsonl", "events.", "verified.json")
"""Starts of names of files that depend on times or on the number of starts."""
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
    """Commands whose files this command reads."""


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
    "run": Command("run config.yaml --set name=chain --set superpixels.cache=own"),
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
"""In an order in which each command comes after the commands that it needs."""


def prepare(world: Path) -> None:
    """Write a data set, a config, and a COCO JSON of some of the images."""
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
    """Make the demo's data small and the measurement of ``init`` constant, in the process of a command."""
    few = [f"train.{key}={value}" for key, value in TRAIN.items()]
    small = [*few, *(f"{section}.{override}" for section in ("affinity", "segment") for override in few)]
    small += ["augment.long_side=[64,96]", "augment.crop=64", "superpixels.count=30", "cam.scales=[0.5]"]
    vars(demo)["generate"] = functools.partial(generate, train=4, val=2)
    vars(demo)["load"] = lambda path, overrides: config_file.load(path, [*overrides, *small])
    batch_size.try_steps = lambda *_: 60.0


class Trials:
    """A folder in which commands run. Its path is always the same, because some results hold absolute paths."""

    def __init__(self, scratch: Path, rng: random.Random) -> None:
        self.scratch, self.rng = scratch, rng
        self.world, self.states = scratch / "world", scratch / "states"
        self.record = Record(scratch / "events")
        self.sessions: set[int] = set()
        self.events: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        """Command -> seconds of an undisturbed run; ``events`` has its number of events."""

    def start(self, name: str, *, at: int = 0) -> str | None:
        """Run a command. Return the kind of event at which it was killed, or None if it ended with 0."""
        group, half = self.rng.random() < 0.5, self.rng.random() < 0.5
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
        """Run the command in a forked process, and exit."""
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
            sys.modules["__main__"] = types.ModuleType("__main__")  # or CRF processes would import this file
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
            vars(multiprocessing.util)["_exit_function"]()  # as the interpreter does at its exit
            if not code:
                self.record.note(END)
            os._exit(code)

    def enter(self, state: str) -> None:
        """Restore the world's state before or after a command."""
        shutil.rmtree(self.world, ignore_errors=True)
        shutil.copytree(self.states / state, self.world, symlinks=True)

    def undisturbed(self, names: Sequence[str]) -> None:
        """Run commands one after another, and keep the world's state before and after each."""
        for name in names:
            self._keep(f"before {name}")
            begin = time.monotonic()
            assert self.start(name) is None
            self.events[name], self.seconds[name] = self.record.count, time.monotonic() - begin
            print(f"{name}: {self.events[name]} events, {self.seconds[name]:.1f} s", flush=True)
            self._keep(f"after {name}")

    def _keep(self, state: str) -> None:
        shutil.copytree(self.world, self.states / state, symlinks=True)

    def trial(self, name: str, most: int, kills: Counter[str]) -> None:
        """Kill a command up to ``most`` times, count the kinds of events in ``kills``, and compare the final files."""
        self.enter(f"before {name}")
        span, history = self.events[name] + 1, "killed at"
        for _ in range(most):
            at = self.rng.randint(1, self.rng.choice((span, span, max(2, span // 3))))
            at = -1 if at == span else at
            kind = self.start(name, at=at)
            if kind is None:
                break
            kills[kind] += 1
            history += f" {kind} {at}"
        else:
            assert self.start(name) is None
        try:
            self.compare(name)
        except AssertionError as error:
            raise AssertionError(f"{error} ({history})") from None

    def compare(self, name: str) -> None:
        expected, actual = files(self.states / f"after {name}"), files(self.world)
        assert actual.keys() == expected.keys(), f"{name}: {sorted(actual.keys() ^ expected.keys())}"
        differing = [path for path in expected if actual[path] != expected[path]]
        assert not differing, f"{name}: {differing}"
        until = time.monotonic() + 20
        while alive := self.alive():
            assert time.monotonic() < until, f"{name}: processes {alive} outlive it"
            time.sleep(0.05)
        self.sessions.clear()

    def alive(self) -> list[str]:
        """Return processes that killed commands have left."""
        processes = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session = path.read_text().rpartition(") ")[2].split()[:4]
                if int(session) in self.sessions and state != "Z":
                    processes.append(path.parent.name)
        return processes


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file except logs. A link's content is its target, a folder's is empty."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        if not path.name.startswith(LOGS):
            content = b"" if path.is_dir() else path.read_bytes()
            contents[str(path.relative_to(folder))] = os.fsencode(path.readlink()) if path.is_symlink() else content
    return contents


def needed(names: Sequence[str]) -> list[str]:
    """Return commands and the commands whose files they read, in order."""
    wanted = {*names, *(need for name in names for need in COMMANDS[name].needs)}
    return [name for name in COMMANDS if name in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", choices=COMMANDS, action="append", help="only this command; may be repeated")
    parser.add_argument("--most", type=int, default=4, help="most kills of a command in a row")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    names = options.command or list(COMMANDS)
    if "convert to .onnx" in names:
        importlib.import_module("onnxscript")
    kills: dict[str, Counter[str]] = {name: Counter() for name in names}
    failed = 0
    scratch = tempfile.mkdtemp()  # not TemporaryDirectory: forked processes would remove it
    try:
        trials = Trials(Path(scratch).resolve(), rng)
        prepare(trials.world)
        trials.undisturbed(needed(names))
        while (total := sum(kinds.total() for kinds in kills.values())) < options.kills:
            name = min(
                names, key=lambda name: kills[name].total() * trials.seconds[name] ** 0.5
            )  # long commands less often
            try:
                trials.trial(name, min(rng.randint(1, options.most), options.kills - total), kills[name])
            except AssertionError as error:
                failed += 1
                print(f"FAILED: {error}", flush=True)
            done = sum(kinds.total() for kinds in kills.values())
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
