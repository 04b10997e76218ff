"""Run the benches of speed, the most valuable first, in ten minutes on a GPU; then write one table of the results.

    python bench/run_all.py [SCRIPT ...] [--device DEVICE] [--out FOLDER] [--minutes M]
    python bench/run_all.py --table     # only the tables, from the existing JSON files

Without SCRIPTs all of ``BENCHES`` run. They measure the tree that this file lies in, and need only the packages that
they import. A bench that needs a missing package is skipped and named. Each has a time limit, its share of
``--minutes`` (10 on a GPU, 60 on a CPU), and writes its JSON file row by row, so that a stopped bench keeps its rows.
Benches that did not start for lack of time are named. JSON and PNG files go to bench/results/<device>, with
``table.md`` from all JSON files there. docs/speed.md shows the tables of all devices, and README a few of their rows.
The exit code is 1 if a bench fails or runs out of time.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from timing import RESULTS, ROOT, arguments, folder

README, SPEED = ROOT / "README.md", ROOT / "docs/speed.md"
BEGIN, END = "<!-- bench/run_all.py writes from here -->\n", "<!-- to here -->\n"


class Bench(NamedTuple):
    limit: int
    """Seconds, of ten minutes on a GPU."""
    value: tuple[str, ...]
    """Columns to compare, times or rates of images. The first column that ours and a peer have is used."""
    way: str
    """Column with the name of the way that a row measured."""
    ours: tuple[str, ...]
    """Our ways. The first that was measured is compared; the last row if this is empty."""
    peers: tuple[str, ...]
    """The peers' ways. The fastest is compared."""
    each: tuple[str, ...] = ()
    """Columns in which compared rows must agree."""
    what: str = ""
    """Name of the comparison if ``each`` is empty, with keys of the JSON in braces."""
    headline: tuple[str, str] | None = None
    """README's row: a pattern for the whole "What" of a row, and a name for people."""


KERNEL = ("device ms", "call ms")
UNITS = {"device ms": "ms of the device", "call ms": "ms of a call"}
COMPILED = ("eager", "compiled eager", "flex attention")
BENCHES = {  # in the order in which they run; the limits down to schedule add up to ten minutes
    "train_step": Bench(
        190,
        ("images/s",),
        "step",
        ("the trainer's step", "+ whole step in a CUDA graph", "+ compiled network and losses", "+ bf16 autocast"),
        ("as released",),
        what="CPN's step, {backbone} at {side} px, {batch} images",
        headline=("CPN's step.*", "{what}"),
    ),
    "affinity_kernel": Bench(
        100,
        KERNEL,
        "backend",
        ("triton", "tiled"),
        COMPILED,
        ("size", "pass"),
        headline=(r"training .*, forward \+ backward", "PCM, {what}"),
    ),
    "data_pipeline": Bench(
        30,
        ("images/s", "images/CPU s"),
        "way",
        ("ours",),
        ("pillow",),
        ("what",),
        headline=(r"train, crop 448 \+ superpixels", "decoding and augmenting images and superpixels, 448 px"),
    ),
    "cam_inference": Bench(
        55,
        ("images/s",),
        "way",
        (),
        ("as released",),
        what="CAM seeds, four scales with flips",
        headline=("CAM seeds.*", "{what}"),
    ),
    "loss_kernel": Bench(
        60,
        KERNEL,
        "backend",
        ("triton", "tiled"),
        COMPILED,
        ("case", "pass"),
        headline=(r"1?2 x 56 -> 448, forward \+ backward", "losses, {what}"),
    ),
    "region_kernel": Bench(45, KERNEL, "backend", ("triton",), COMPILED, ("op", "size", "pass")),
    "schedule": Bench(105, (), "stage", (), ()),
    "superpixels": Bench(
        50,
        ("total ms",),
        "way",
        ("ours, cached",),
        ("released",),
        ("images",),
        headline=("JPEGs", "a JPEG's superpixels in training, ours from the cache"),
    ),
    "scaling": Bench(50, ("images/s",), "way", (), ("1 process",), what="training with several processes"),
    "evaluate": Bench(
        40,
        ("ms per image",),
        "way",
        ("ours, 40 thresholds",),
        ("released, 40 thresholds", "40 passes, 40 thresholds"),
        what="scoring seeds at 40 thresholds",
        headline=("scoring.*", "{what}"),
    ),
    "random_walk": Bench(
        40,
        KERNEL,
        "way",
        ("ours",),
        ("released",),
        ("cells", "steps"),
        headline=("47x63, 64", "random walk, 47 x 63 cells, 64 steps"),
    ),
}
RESERVE = 10
"""Seconds of the total time that are reserved for the start and the tables."""


def rows_of(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a JSON's rows, one for each measurement. The data pipeline has two measurements in a row."""
    if name != "data_pipeline":
        return result["rows"]
    ways = ("ours", "pillow")
    return [{"what": row["what"], "way": way, result["unit"]: row[way]} for row in result["rows"] for way in ways]


class Comparison(NamedTuple):
    what: str
    column: str
    our_row: dict[str, Any]
    peer: dict[str, Any]
    ratio: float
    """Times faster."""


def compared(name: str, result: dict[str, Any]) -> Iterator[Comparison]:
    """Yield our row with the fastest peer's row, for each comparison."""
    bench = BENCHES[name]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(name, result):
        groups.setdefault(", ".join(str(row[key]) for key in bench.each) or bench.what.format_map(result), []).append(
            row
        )
    for what, rows in groups.items():
        for column in bench.value:  # empty for a bench without peers
            by_way = {row[bench.way]: row for row in rows if row.get(column) is not None}
            our_row = next((by_way[way] for way in bench.ours or reversed(by_way) if way in by_way), None)
            peers = [by_way[way] for way in bench.peers if way in by_way]
            if our_row is None or not peers or our_row in peers:
                continue
            rate = column.startswith("images/")
            peer = (max if rate else min)(peers, key=lambda row: row[column])
            ratio = our_row[column] / peer[column]
            yield Comparison(what, column, our_row, peer, ratio if rate else 1 / ratio)
            break


def table(results: Path) -> str:
    """Return Markdown of all results in a folder: a line for each comparison, and the files' notes."""
    lines, notes = [], []
    for name, bench in BENCHES.items():
        path = results / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        notes += ["", result["note"]] if "note" in result else []
        cut_off = "" if result.get("finished", True) else " (the bench was cut off)"
        for what, column, our_row, peer, ratio in compared(name, result):
            ours, theirs = (f"{row[bench.way]}: {number(row[column])}" for row in (our_row, peer))
            unit, device = UNITS.get(column, column), result["machine"]["device"]
            lines.append(f"| `{name}` | {what}{cut_off} | {device} | {unit} | {ours} | {theirs} | {ratio:.3g} |")
    head = ["| `bench/` | What | Machine | Unit | Ours | Peer | Times faster |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *lines, *notes]) + "\n"


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def devices() -> list[Path]:
    """Return the folders of results that have a table, GPUs first."""
    return sorted((path.parent for path in RESULTS.glob("*/table.md")), key=lambda place: (place.name == "cpu", place))


def headlines(folders: Iterable[Path]) -> str:
    """Return Markdown of README's rows, device by device."""
    lines = []
    for results in folders:
        for name, bench in BENCHES.items():
            path = results / f"{name}.json"
            if bench.headline is None or not path.exists():
                continue
            result = json.loads(path.read_text())
            pattern, words = bench.headline
            for what, column, our_row, peer, ratio in compared(name, result):
                if re.fullmatch(pattern, what):
                    unit, device = UNITS.get(column, column), result["machine"]["device"]
                    ours, theirs = (f"{number(row[column])} ({row[bench.way]})" for row in (our_row, peer))
                    lines.append(f"| {words.format(what=what)}, {unit} | {device} | {ours} | {theirs} | {ratio:.3g} |")
    head = ["| What | Machine | Ours | Fastest peer | Times faster |", "|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) + "\n"


def in_page(page: str, text: str) -> str:
    """Return a page with a new text between its two markers."""
    before, old_and_after = page.split(BEGIN)
    _, after = old_and_after.split(END)
    return before + BEGIN + text + END + after


class Outcome(NamedTuple):
    word: str
    """done, skipped, failed, out of time or not started."""
    why: str
    seconds: float


def run(script: Path, flags: list[str], limit: float) -> Outcome:
    """Run a bench for at most ``limit`` seconds. Its standard output appears at once."""
    begin = time.perf_counter()

    def took() -> float:
        return time.perf_counter() - begin

    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script), *flags],
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return Outcome("out of time", f"stopped after {limit:.0f} s", took())
        finally:
            stop(process)
        errors.seek(0)
        text = errors.read()
    if code == 0:
        return Outcome("done", "", took())
    missing = re.findall(r"^ModuleNotFoundError: No module named '([\w.]+)'", text, re.MULTILINE)
    if missing and not missing[-1].startswith("cpn_fast"):
        return Outcome("skipped", f"needs {missing[-1]}, which is not installed", took())
    print(text, file=sys.stderr)
    return Outcome("failed", next(reversed(text.strip().splitlines()), f"exit code {code}"), took())


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a bench and the processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run_in_turn(scripts: dict[str, Path], flags: list[str], limits: dict[str, float], seconds: float) -> list[Outcome]:
    """Run benches one after another, each within its limit and all within ``seconds``. Print each outcome at once."""
    deadline = time.perf_counter() + seconds
    outcomes = []
    for name, script in scripts.items():
        limit = min(limits[name], deadline - time.perf_counter())
        if limit > 1:
            print(f"== {name}, at most {limit:.0f} s", flush=True)
            outcome = run(script, flags, limit)
        else:
            outcome = Outcome("not started", "no time was left", 0)
        print(f"{name}: {outcome.word} {outcome.why} ({outcome.seconds:.0f} s)", flush=True)
        outcomes.append(outcome)
    return outcomes


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"of: {', '.join(BENCHES)}")
    parser.add_argument("--minutes", type=float, help="total time (default 10 on a GPU, 60 on a CPU)")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the tables again")
    options = parser.parse_args()
    unknown = [name for name in options.scripts if name not in BENCHES]
    if unknown:
        parser.error(f"no such bench: {', '.join(unknown)}; benches are {', '.join(BENCHES)}")
    results, gpu = folder(options.out, options.device), options.device.type == "cuda"
    minutes = options.minutes or (10 if gpu else 60)
    chosen = [] if options.table else list(options.scripts or BENCHES)
    flags = ["--device", str(options.device), "--out", str(results)]
    outcomes = run_in_turn(
        {name: Path(__file__).with_name(f"{name}.py") for name in chosen},
        flags,
        {name: BENCHES[name].limit * minutes / 10 for name in chosen},
        60 * minutes - RESERVE,
    )

    (results / "table.md").write_text(table(results))
    if options.out is None:
        for path in RESULTS.glob("*/table.md"):
            path.write_text(table(path.parent))
        folders = devices()
        SPEED.write_text(in_page(SPEED.read_text(), "\n".join(table(results) for results in folders)))
        README.write_text(in_page(README.read_text(), headlines(folders)))
    print(f"\n{(results / 'table.md').read_text()}")
    for name, outcome in zip(chosen, outcomes, strict=True):
        print(f"{name}: {outcome.word} {outcome.why} ({outcome.seconds:.0f} s)")
    return 1 if {outcome.word for outcome in outcomes} & {"failed", "out of time"} else 0


if __name__ == "__main__":
    sys.exit(main())
