"""Every bench in one command, each with a time limit; then one table of what they found.

    python bench/run_all.py [SCRIPT ...] [--device DEVICE] [--out FOLDER]
    python bench/run_all.py --table     # only the tables, from the JSON files that are there

Nothing needs to be installed but what the scripts import: they measure the tree that this file lies in. One that needs
a missing package is skipped and says so. The limits add up to ten minutes on a GPU; a CPU gets four times as much. JSON
and PNG files go to bench/results/<device>, with ``table.md``, made of all JSON files there; README shows the tables of
all devices. Without SCRIPTs all run. The exit code is 1 if one fails or runs out of time.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from timing import RESULTS, arguments, folder

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- bench/run_all.py writes from here -->\n", "<!-- to here -->\n"


class Bench(NamedTuple):
    limit: int
    """Seconds on a GPU."""
    value: str
    """Column of the JSON's rows that is compared: a time, or a rate if its name ends in /s."""
    way: str
    """Column that names what a row measured."""
    ours: tuple[str, ...]
    """Of these, the first that was measured."""
    peers: tuple[str, ...]
    """Of these, the fastest."""
    each: tuple[str, ...] = ()
    """Columns that must agree for rows to be compared."""


COMPILED = ("eager", "compiled eager", "flex attention")
BENCHES = {
    "affinity_kernel": Bench(70, "ms", "backend", ("triton", "tiled"), COMPILED, ("size", "pass")),
    "region_kernel": Bench(30, "ms", "backend", ("triton",), COMPILED, ("op", "size", "pass")),
    "loss_kernel": Bench(60, "ms", "backend", ("triton", "tiled"), COMPILED, ("case", "pass")),
    "superpixels": Bench(50, "total ms", "way", ("ours, cached",), ("released",), ("images",)),
    "data_pipeline": Bench(60, "images/s", "way", ("ours",), ("pillow",), ("what",)),
    "train_step": Bench(140, "images/s", "step", (), ("as released",)),
    "cam_inference": Bench(60, "images/s", "way", (), ("as released",)),
    "scaling": Bench(50, "images/s", "way", (), ("1 process",)),
    "evaluate": Bench(
        40, "ms per image", "way", ("ours, 40 thresholds",), ("released, 40 thresholds", "40 passes, 40 thresholds")
    ),
    "random_walk": Bench(40, "ms", "way", ("ours",), ("released",), ("cells", "steps")),
}


def rows_of(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """A JSON's rows, one for each thing measured: the data pipeline has two in a row, per CPU second."""
    if name != "data_pipeline":
        return result["rows"]
    return [
        {"what": row["what"], "way": way, "images/s": row[way]} for row in result["rows"] for way in ("ours", "pillow")
    ]


def compared(name: str, result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], float]]:
    """What was measured, our row, the peer's, and how many times faster ours is."""
    bench = BENCHES[name]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(name, result):
        groups.setdefault(", ".join(str(row[key]) for key in bench.each), []).append(row)
    rate = bench.value.endswith("/s")
    for what, rows in groups.items():
        by_way = {row[bench.way]: row for row in rows}
        own = next((by_way[way] for way in bench.ours or reversed(by_way) if way in by_way), None)
        peers = [by_way[way] for way in bench.peers if way in by_way]
        if own is None or not peers or own in peers:
            continue
        peer = (max if rate else min)(peers, key=lambda row: row[bench.value])
        ratio = own[bench.value] / peer[bench.value]
        yield what, own, peer, ratio if rate else 1 / ratio


def table(place: Path) -> str:
    """Markdown of all results in a folder: a line for each comparison."""
    lines, machines = [], {}
    for name, bench in BENCHES.items():
        path = place / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        machines[result["machine"]["device"]] = None
        for what, own, peer, ratio in compared(name, result):
            ours, theirs = (f"{row[bench.way]}: {number(row[bench.value])}" for row in (own, peer))
            lines.append(f"| `{name}` | {what} | {bench.value} | {ours} | {theirs} | {ratio:.3g} |")
    head = ["| `bench/` | What | Unit | Ours | Peer | Times faster |", "|---|---|---|---|---|---|"]
    return "\n".join([f"**{', '.join(machines)}**", "", *head, *lines]) + "\n"


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def in_readme(readme: str, tables: list[str]) -> str:
    """README with the tables between its two markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n".join(tables) + END + after


class Outcome(NamedTuple):
    word: str
    """done, skipped, failed or out of time."""
    why: str
    seconds: float


def run(script: Path, given: list[str], limit: float, environment: dict[str, str]) -> Outcome:
    """Run a bench for at most ``limit`` seconds; its standard output shows as it comes."""
    begin = time.perf_counter()

    def took() -> float:
        return time.perf_counter() - begin

    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script), *given],
            stderr=errors,
            env=environment,
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
    """End what is left of a bench and the processes it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def link_package(place: Path) -> None:
    """This tree as it would be installed."""
    (place / "cpn_fast").mkdir()
    for part in [*(ROOT / "cpn_fast").iterdir(), *(ROOT / name for name in ("kernels", "pipelines", "configs"))]:
        (place / "cpn_fast" / part.name).symlink_to(part)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"of: {', '.join(BENCHES)}")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the tables anew")
    options = parser.parse_args()
    unknown = [name for name in options.scripts if name not in BENCHES]
    if unknown:
        parser.error(f"no such bench: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    place = folder(options.out, options.device)
    times = 1 if options.device.type == "cuda" else 4
    given = ["--device", str(options.device), "--out", str(place)]
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as package:
        link_package(Path(package))
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        for name in [] if options.table else options.scripts or BENCHES:
            print(f"== {name}, at most {times * BENCHES[name].limit} s", flush=True)
            script = Path(__file__).with_name(f"{name}.py")
            outcomes[name] = run(script, given, times * BENCHES[name].limit, os.environ | {"PYTHONPATH": path})
            print(f"{name}: {outcomes[name].word} {outcomes[name].why}", flush=True)

    (place / "table.md").write_text(table(place))
    if options.out is None:
        README.write_text(
            in_readme(README.read_text(), [path.read_text() for path in sorted(RESULTS.glob("*/table.md"))])
        )
    print(f"\n{(place / 'table.md').read_text()}")
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome.word} {outcome.why} ({outcome.seconds:.0f} s)")
    return 1 if {outcome.word for outcome in outcomes.values()} & {"failed", "out of time"} else 0


if __name__ == "__main__":
    sys.exit(main())
