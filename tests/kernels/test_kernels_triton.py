"""The Triton kernels: numerics in the interpreter and on a GPU, and the assembler's output, which needs no GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a new process, because Triton reads TRITON_INTERPRET at import."""
    rest = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=rest | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("file", ["every_kernel", "test_kernels_transforms"])
def test_every_kernel_in_the_interpreter(file: str) -> None:
    finished = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{file}.py", TRITON_INTERPRET="1")
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]


@pytest.mark.gpu
def test_every_kernel_on_a_gpu() -> None:
    finished = run("-m", "pytest", "-q", "-n", "8", "-p", "no:cacheprovider", "tests/kernels/every_kernel.py")
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]


@pytest.mark.parametrize(("arch", "dtype"), [(86, "bf16"), (90, "bf16"), (90, "fp32")])
def test_no_configuration_spills_or_misses_the_tensor_cores(arch: int, dtype: str, tmp_path: Path) -> None:
    options = ("--arch", str(arch), "--dtype", dtype, "--shapes", "paper", "--out", str(tmp_path))
    finished = run("bench/kernel_report.py", *options)
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
    text = (tmp_path / "kernel_report.json").read_text()
    rows = json.loads(text)["rows"]
    assert text.splitlines().count(f"  {json.dumps(rows[0])},") == 1  # a row is a line
    expected = {"HGMMA"} if arch == 90 else {"HMMA"}
    assert {row["tensor_core"] for row in rows if row["kernel"].startswith("pixel forward")} == expected


@pytest.mark.parametrize(
    ("capability", "family"),
    [(8.0, "ampere"), (8.9, "ampere"), (9.0, "hopper"), (10.3, "blackwell"), (12.0, "ampere"), (13.0, "ampere")],
)
def test_consumer_blackwell_and_what_is_not_known_take_the_smaller_blocks(capability: float, family: str) -> None:
    from cpn_fast.kernels import launch

    assert launch.family(int(capability)) == family


def test_the_blocks_are_the_narrowest_that_fit() -> None:
    from cpn_fast.kernels import launch

    rows = {(64, 32): launch.Blocks(64, 32, True, 4, 2), (64, 128): launch.Blocks(32, 32, True, 4, 2)}
    wide = launch.Blocks(16, 16, False, 4, 2)
    table = {("half", "hopper", *size): blocks for size, blocks in rows.items()} | {("half", "hopper", 128, 128): wide}
    for (channels, columns), expected in (((16, 32), (64, 32)), ((64, 64), (64, 128))):
        assert launch.fitting(table, "half", "hopper", channels, columns) == rows[expected]
    assert launch.fitting(table, "half", "hopper", 65, 16) == wide


@pytest.mark.parametrize(
    ("hip", "capability", "message"),
    [
        ("6.2", (9, 4), "needs an NVIDIA GPU, found ROCm"),
        (None, (7, 5), r"compute capability 8.0 or above \(Ampere\), found 7.5 \(Tesla T4\)"),
        (None, (8, 0), None),
        (None, (12, 0), None),
    ],
)
def test_gpus_without_our_instructions_are_refused_by_name(
    hip: str | None, capability: tuple[int, int], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpn_fast.kernels import launch

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    launch.gpu_obstacle.cache_clear()
    found = launch.gpu_obstacle(0)
    launch.gpu_obstacle.cache_clear()
    assert found is None if message is None else re.search(message, str(found))


def test_a_maximum_keeps_nan_in_the_machine_code() -> None:
    """The hardware's plain maximum drops NaN. The interpreter, which is NumPy, does not."""
    finished = run(
        "-c",
        "import sys; sys.path.insert(0, 'bench'); import kernel_report as report\n"
        "for case in report.cases('bf16', 90, 'paper'):\n"
        "    if case.name.startswith('pixel forward'): print(report.compiled(case, 'bf16', 90).asm['ptx'])",
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "max.NaN.f32" in finished.stdout
    assert not re.search(r"max(\.ftz)?\.f32", finished.stdout)


def test_images_of_all_sizes_take_the_same_superpixel_programs() -> None:
    """Triton compiles a kernel anew for a number that is 1 or a multiple of 16."""
    finished = run(
        "-c",
        "import sys; sys.path.insert(0, 'bench'); import torch; from triton.runtime import driver\n"
        "from host_time import NoGpu; from cpn_fast.kernels import launch, slic_triton as s\n"
        "driver.set_active(NoGpu()); launch.INTERPRETED = True\n"
        "for height, width, count in ((40, 24, 4), (48, 32, 1), (333, 500, 200)):\n"
        "    torch.ops.cpn_fast.slic_triton(torch.zeros(1, 3, height, width).byte(), None, count, 10.0, 1)\n"
        "for kernel in (s._assign_kernel, s._means_kernel, s._join_kernel):\n"
        "    print(kernel.__name__, sum(len(cache[0]) for cache in kernel.device_caches.values()))",
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    # The first and the last turn have a program each.
    assert finished.stdout.split() == ["_assign_kernel", "2", "_means_kernel", "1", "_join_kernel", "1"]


def test_symbolic_sizes_leave_short_guards() -> None:
    """Channels and classes become constants. Pixels and images stay symbols, in readable guards."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from cpn_fast.kernels import pixel_triton

    def run(cam: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return pixel_triton._correlate(cam, embedding, 1e-5)

    graph = make_fx(run, tracing_mode="symbolic")(torch.rand(3, 5, 77), torch.rand(3, 40, 77))
    (called,) = (node for node in graph.graph.nodes if "pixel_correlation_triton" in str(node.target))
    g = called.meta["val"][2]
    assert isinstance(g.shape[0], torch.SymInt)
    assert isinstance(g.shape[1], torch.SymInt)
    assert g.shape[2] == 64
    assert max((len(str(guard.expr)) for guard in graph.shape_env.guards), default=0) < 100
