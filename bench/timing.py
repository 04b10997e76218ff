"""What the benches share: timing, memory, the machine's own matrix rate, tables, JSON and bars."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def median_seconds(
    run: Callable[[], object], device: torch.device, *, repeats: int = 20, budget: float = 5.0
) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of a call after one warm-up call, within about ``budget`` seconds.

    On CUDA the L2 cache is flushed before every repetition and events on the device are timed.
    """
    start = time.perf_counter()
    run()
    _wait(device)
    first = time.perf_counter() - start
    repeats = max(1, min(repeats, int(budget / max(first, 1e-9))))
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device.type == "cuda" else None
    seconds = []
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            begin_cpu = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin_cpu)
    if len(seconds) < 3:
        return statistics.median(seconds), min(seconds), max(seconds)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return statistics.median(seconds), fifths[0], fifths[-1]


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
    return 2 * side**3 / median_seconds(lambda: a @ b, device, repeats=10, budget=3)[0]


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
    """Rows of one set of keys as a table on the terminal."""
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def write_json(path: Path, machine_: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> None:
    """One result file: the machine, the command line, the rows."""
    command = " ".join(["python", "bench/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, "machine": machine_, **more, "rows": rows}, indent=1) + "\n")


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else str(value)
