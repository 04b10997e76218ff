"""What the benches share: timing, memory, the machine's own matrix rate, tables, JSON and bars."""

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
# The benches measure the tree that they lie in, installed or not, and so do the processes that they start.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


class Times(NamedTuple):
    """Seconds of the repetitions of a call."""

    median: float
    low: float
    """20th percentile."""
    high: float
    """80th percentile."""
    repeats: int


def call_times(
    run: Callable[[], object], device: torch.device, *, repeats: int = 20, budget: float = 5.0, flush: bool = True
) -> Times:
    """A call as a program makes it: on an idle device, from Python until all of its work is done.

    Calls that compile, tune and fill caches come first and are not counted. Then ``repeats`` are, or as many as start
    within ``budget`` seconds, but at least 10 on a GPU and 3 on a CPU. Before each one a GPU's L2 cache is overwritten
    unless ``flush`` is off, as it may be where a call moves far more than L2 holds.
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
    """What a call costs the GPU alone: replays of a CUDA graph of it, timed by events; the rest as ``call_times``.

    Raises RuntimeError for a call that cannot be captured, as one that reads a figure back.
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
            overwrite()  # meanwhile the CPU launches the graph
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
    """A kernel bench's columns: times of a call and, on a GPU, of the device alone, each with its spread.

    ``device ms`` is None where the call cannot be captured; ``not captured`` then says why.
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


def milliseconds(what: str, times: Times) -> dict[str, Any]:
    """Columns ``WHAT ms``, ``WHAT p20``, ``WHAT p80`` and ``repeats``."""
    shown = {f"{what} {name}": 1e3 * seconds for name, seconds in zip(("ms", "p20", "p80"), times[:3], strict=True)}
    return {**shown, "repeats": times.repeats}


def kernel_time(*rows: dict[str, Any]) -> str:
    """The column by which rows are compared: the device's time if all of them have it, else the call's."""
    return "device ms" if all(row.get("device ms") is not None for row in rows) else "call ms"


def warm_up(run: Callable[[], object], device: torch.device) -> None:
    """Compile, tune and fill caches: three calls on a GPU, one on a CPU, where each may take seconds."""
    for _ in range(3 if device.type == "cuda" else 1):
        run()
    wait(device)


def repeated(once: Callable[[], float], device: torch.device, repeats: int, budget: float) -> Times:
    """Repetitions of what returns its own seconds, as many as ``call_times`` says."""
    least = 10 if device.type == "cuda" else 3
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < least or (len(seconds) < repeats and time.perf_counter() - begin < budget):
        seconds.append(once())
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Times(statistics.median(seconds), fifths[0], fifths[-1], len(seconds))


def overwriting(device: torch.device) -> Callable[[], object] | None:
    """A call that fills a GPU's L2 cache with something else."""
    return torch.empty(256 << 20, dtype=torch.int8, device=device).zero_ if device.type == "cuda" else None


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def logged_rate(run: Path, skip: int = 0) -> float:
    """Median images/s of a training run's metrics.jsonl, without its first ``skip`` lines."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["images_per_second"] for line in lines[skip:])


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak memory during a call beyond what was held before it.

    CUDA: the allocator's own count. CPU: the allocations that torch's profiler saw, added up as they came and went.
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
    """Dense FLOP/s that this machine reaches on a large square product."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = device_times if device.type == "cuda" else call_times
    return 2 * side**3 / times(lambda: a @ b, device, budget=3, flush=False).median


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
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
    """``--device`` and ``--out``, which every bench takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default), help=f"default {default}")
    parser.add_argument("--out", type=Path, help="folder of the JSON and PNG; default bench/results/<device>")
    return parser


def folder(out: Path | None, device: torch.device) -> Path:
    """Where a bench's files go: ``out``, or bench/results/cpu, bench/results/nvidia-h100..."""
    if out is None:
        name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).lower().replace(" ", "-")
        out = RESULTS / name
    out.mkdir(parents=True, exist_ok=True)
    return out


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows as a table on the terminal; what a row lacks is a dash."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title)
    for key in keys:
        words = any(isinstance(row.get(key), str) for row in rows)
        table.add_column(key, justify="left" if words else "right")
    for row in rows:
        table.add_row(*(_text(row.get(key)) for key in keys))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def write_json(
    path: Path, machine_: dict[str, Any], rows: list[dict[str, Any]], *, finished: bool = True, **more: Any
) -> None:
    """One result file: the machine, the command line, the rows. It is there whole or as it was.

    A bench that takes long writes it after every row with ``finished`` off, so that one that is stopped leaves what it
    has measured.
    """
    command = " ".join(["python", "bench/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    content = {"command": command, "machine": machine_, "finished": finished, **more, "rows": rows}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def plot_bars(path: Path, title: str, unit: str, groups: dict[str, dict[str, float]]) -> None:
    """Grouped horizontal bars, log scale: ``groups[group][bar]``."""
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
