"""Shared code of the benches: timing, memory, the machine's rate of matrix products, tables, JSON and bars."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
# The benches and the processes that they start measure the tree that they lie in, even if another one is installed.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


class Times(NamedTuple):
    """Seconds of a call over its repetitions."""

    median: float
    low: float
    """20th percentile."""
    high: float
    """80th percentile."""
    repeats: int


def call_times(
    run: Callable[[], object], device: torch.device, *, repeats: int = 20, budget: float = 5.0, flush: bool = True
) -> Times:
    """Time a call as a program makes it: on an idle device, from Python until all of its work is done.

    Warm-up calls, which compile and fill caches, are not counted. Then ``repeats`` calls are timed, or as many as start
    within ``budget`` seconds, but at least 10 on a GPU and 3 on a CPU. Before each call a GPU's L2 cache is
    overwritten. ``flush=False`` skips this, for a call that moves far more than L2 holds.
    """
    warm_up(run, device)
    overwrite = overwriting(device) if flush else None
    clock = time.perf_counter

    def once() -> float:
        if overwrite is not None:
            overwrite()
        wait(device)
        begin = clock()
        run()
        wait(device)
        return clock() - begin

    return repeated(once, device, repeats, budget)


def device_times(
    run: Callable[[], object], device: torch.device, *, repeats: int = 20, budget: float = 5.0, flush: bool = True
) -> Times:
    """Time a call on the GPU alone: events around replays of its CUDA graph. Arguments are as for ``call_times``.

    Raises RuntimeError for a call that cannot be captured, for example one that reads a value back.
    """
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        warm_up(run, device)
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        run()
    overwrite = overwriting(device) if flush else None

    def once() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if overwrite is not None:
            overwrite()  # while it runs, the CPU launches the graph
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    once()
    return repeated(once, device, repeats, budget)


def kernel_columns(
    run: Callable[[], object], device: torch.device, *, repeats: int = 20, budget: float = 5.0
) -> dict[str, Any]:
    """Return a kernel bench's columns: times of a call and, on a GPU, of the device alone, each with its spread.

    ``device ms`` is None if the call cannot be captured; then ``not captured`` gives the reason.
    """
    columns = {**milliseconds("call", call_times(run, device, repeats=repeats, budget=budget))}
    if device.type != "cuda":
        return columns
    try:
        return {**milliseconds("device", device_times(run, device, repeats=repeats, budget=budget)), **columns}
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        missing = dict.fromkeys(("device ms", "device p20", "device p80"))
        return {**missing, **columns, "not captured": str(error).splitlines()[0]}


def milliseconds(clock: str, times: Times) -> dict[str, Any]:
    """Return columns ``CLOCK ms``, ``CLOCK p20``, ``CLOCK p80`` and ``repeats``; the clock is "call" or "device"."""
    shown = {f"{clock} {name}": 1e3 * seconds for name, seconds in zip(("ms", "p20", "p80"), times[:3], strict=True)}
    return {**shown, "repeats": times.repeats}


def kernel_time(*rows: dict[str, Any]) -> str:
    """Return the column to compare rows by: the device's time if all rows have it, else the call's."""
    return "device ms" if all(row.get("device ms") is not None for row in rows) else "call ms"


def warm_up(run: Callable[[], object], device: torch.device) -> None:
    """Compile and fill caches: three calls on a GPU, one on a CPU, where a call may take seconds."""
    for _ in range(3 if device.type == "cuda" else 1):
        run()
    wait(device)


def repeated(once: Callable[[], float], device: torch.device, repeats: int, budget: float) -> Times:
    """Repeat a function that returns its seconds, as often as ``call_times`` says."""
    least = 10 if device.type == "cuda" else 3
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < least or (len(seconds) < repeats and time.perf_counter() - begin < budget):
        seconds.append(once())
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Times(statistics.median(seconds), fifths[0], fifths[-1], len(seconds))


def overwriting(device: torch.device) -> Callable[[], object] | None:
    """Return a function that overwrites a GPU's L2 cache, or None on a CPU."""
    return torch.empty(256 << 20, dtype=torch.int8, device=device).zero_ if device.type == "cuda" else None


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def logged_rate(run: Path, skip: int = 0) -> float:
    """Return the median images/s of a training run's metrics.jsonl, without its first ``skip`` lines."""
    from cpn_fast.runtime.files import read_metrics

    return statistics.median(line["images_per_second"] for line in read_metrics(run / "metrics.jsonl")[skip:])


def run_columns(run: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a training run: its rate, the machine that scores it (``about``) and its precision."""
    environment = json.loads((run / "environment.json").read_text())
    return {"images/s": logged_rate(run), "device": about["device"], "precision": environment["precision"]}


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory during a call, without the memory held before it.

    CUDA: the allocator's count. CPU: the running sum of allocations and frees in torch's profiler.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the dense FLOP/s of this machine on a large square product."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = device_times if device.type == "cuda" else call_times
    return 2 * side**3 / times(lambda: a @ b, device, budget=3, flush=False).median


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine of the figures."""
    described: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    try:
        import triton

        described["triton"] = triton.__version__
    except ImportError:
        described["triton"] = None
    if device.type == "cuda":
        described["device"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    else:
        described["device"] = _cpu_name()
        described["threads"] = torch.get_num_threads()
    return described


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--device`` and ``--out``, which every bench has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default), help=f"default {default}")
    parser.add_argument("--out", type=Path, help="folder of the JSON and PNG; default bench/results/<device>")
    return parser


def folder(out: Path | None, device: torch.device) -> Path:
    """Return the folder of a bench's files: ``out``, or bench/results/cpu, bench/results/nvidia-h100..."""
    if out is None:
        name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).lower().replace(" ", "-")
        out = RESULTS / name
    out.mkdir(parents=True, exist_ok=True)
    return out


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table on the terminal, with a dash for a missing value."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title)
    for key in keys:
        words = any(isinstance(row.get(key), str) for row in rows)
        table.add_column(key, justify="left" if words else "right")
    for row in rows:
        table.add_row(*(_text(row.get(key)) for key in keys))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def with_earlier(path: Path, rows: list[dict[str, Any]], *key: str) -> list[dict[str, Any]]:
    """Return the rows of an earlier result file and ``rows``, which replace those with the same ``key`` columns.

    Call it right before ``write_json``: another call may write the file during the measurement.
    """
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = {tuple(row[column] for column in key) for row in rows}
    return [row for row in earlier if tuple(row[column] for column in key) not in measured] + rows


def write_json(
    path: Path, machine_: dict[str, Any], rows: list[dict[str, Any]], *, finished: bool = True, **more: Any
) -> None:
    """Write a result file with the machine, the command line and the rows, whole or not at all.

    A long bench writes it after every row with ``finished`` off, so that a stopped bench keeps its rows.
    """
    command = " ".join(["python", "bench/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    content = {"command": command, "machine": machine_, "finished": finished, **more, "rows": rows}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def plot_bars(path: Path, title: str, unit: str, groups: dict[str, dict[str, float]]) -> None:
    """Plot grouped horizontal bars on a log scale: ``groups[group][bar]``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.22 * len(groups) * (len(names) + 1)), layout="constrained")
    for index, name in enumerate(names):
        at = [g * (len(names) + 1) + index for g, bars in enumerate(groups.values()) if name in bars]
        drawn = axes.barh(at, [bars[name] for bars in groups.values() if name in bars], label=name)
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    axes.set_yticks([g * (len(names) + 1) + (len(names) - 1) / 2 for g in range(len(groups))], list(groups))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.set_xlabel(unit)
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else escape(str(value))
