"""The default precision of the forward pass is one that the device computes natively."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cpn_fast.runtime import precision

CPU = torch.device("cpu")
X86 = "model name\t: A CPU\nflags\t\t: fpu sse2 avx2 {}\nbogomips\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\nCPU part\t: 0xd40\n"


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    functions = (precision.computes, precision._warn)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.fixture
def cpu_info(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


def cast() -> torch.dtype:
    """Return the dtype of a product of two float32 matrices."""
    return (torch.eye(2) @ torch.eye(2)).dtype


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86.format("avx512f avx512_bf16 vaes"), torch.bfloat16),
        (X86.format("amx_bf16 amx_tile"), torch.bfloat16),
        (X86.format("avx512f avx512_fp16"), torch.float32),
        (X86.format(""), torch.float32),
        (ARM.format("asimdhp sve bf16"), torch.bfloat16),
        (ARM.format("asimdhp"), torch.float32),
        (None, torch.float32),
    ],
)
def test_null_is_bf16_where_a_cpu_computes_it(text: str | None, expected: torch.dtype, cpu_info: Path, capsys) -> None:
    if text is not None:
        cpu_info.write_text(text)
    with precision.autocast(None, CPU):
        assert cast() == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "flag", "dtype"), [("bf16", "amx_bf16", torch.bfloat16), ("fp16", "avx512_fp16", torch.float16)]
)
def test_an_emulated_precision_is_taken_where_it_is_asked_for_and_warned_of_once(
    name: str, flag: str, dtype: torch.dtype, cpu_info: Path, capsys
) -> None:
    cpu_info.write_text(X86.format("avx512f"))
    for _ in range(3):
        with precision.autocast(name, CPU):
            assert cast() == dtype
    warning = capsys.readouterr().err
    assert warning.count("Warning") == 1
    assert f"precision {name} is emulated on this CPU" in warning

    precision.computes.cache_clear()
    precision._warn.cache_clear()
    cpu_info.write_text(X86.format(flag))
    with precision.autocast(name, CPU):
        assert cast() == dtype
    assert capsys.readouterr().err == ""


def test_fp32_is_left_alone(cpu_info: Path) -> None:
    cpu_info.write_text(X86.format("avx512_bf16"))
    with precision.autocast("fp32", CPU):
        assert cast() == torch.float32


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_null_is_bf16_from_sm_80_on(capability: tuple[int, int], expected: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.default(torch.device("cuda", 0)) == expected
    assert precision.computes("fp16", torch.device("cuda", 0))
