"""The Triton kernels without a GPU: numerics in the interpreter, and what the assembler makes of them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    rest = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=rest | environment, capture_output=True, text=True, check=False
    )


def test_every_kernel_in_the_interpreter() -> None:
    files = ("tests/interpreted_kernels.py", "tests/test_kernels_transforms.py")
    finished = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]


@pytest.mark.parametrize(("arch", "dtype"), [(86, "bf16"), (90, "bf16"), (90, "fp32")])
def test_no_configuration_spills_or_misses_the_tensor_cores(arch: int, dtype: str, tmp_path: Path) -> None:
    options = ("--arch", str(arch), "--dtype", dtype, "--shapes", "paper", "--out", str(tmp_path))
    finished = run("bench/kernel_report.py", *options)
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
    rows = json.loads((tmp_path / "kernel_report.json").read_text())["rows"]
    expected = {"HGMMA"} if arch == 90 else {"HMMA"}
    assert {row["tensor_core"] for row in rows if row["kernel"].startswith("pixel forward")} == expected


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_autotuning_chooses_among_the_reported_configurations(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpn_fast.kernels import launch, pixel_triton

    if launch.INTERPRETED:
        pytest.skip("the interpreter does not tune")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    family = "ampere" if capability < (9, 0) else "hopper"
    for kernel, table in (
        (pixel_triton._forward_kernel, pixel_triton.FORWARD),
        (pixel_triton._backward_kernel, pixel_triton.BACKWARD),
    ):
        kernel.nargs = {}
        for precision in ("half", "tf32"):
            for chunks, columns in itertools.product((1, 3, 4), (16, 32, 64, 128)):
                found = kernel.prune_configs({"PRECISION": precision, "DK": 64, "CHUNKS": chunks, "CB": columns})
                fitting = [
                    (width, most, configs)
                    for (*kind, width, most), configs in table.items()
                    if kind == [precision, family] and width >= 64 * chunks and most >= columns
                ]
                assert found == min(fitting, key=lambda row: row[:2])[2]
