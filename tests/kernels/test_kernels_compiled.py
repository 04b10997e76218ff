"""Checks of the compiler's intermediate code of region and loss kernels. They need no GPU."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")
from cpn_fast.kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
BENCH = Path(__file__).parents[2] / "bench"
ARCH = 90


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the benches change it
    return importlib.import_module("kernel_report")


def kernels(report: ModuleType, dtype: str, *starts: str) -> Iterator[tuple[str, Any]]:
    """Yield names and compiled kernels at the paper's size."""
    found = [case for case in report.cases(dtype, ARCH, "paper") if case.name.startswith(starts)]
    assert found
    for case in found:
        yield case.name, report.compiled(case, dtype, ARCH)


def test_no_extremum_of_the_losses_drops_nan(report: ModuleType) -> None:
    """The hardware's max and min drop NaN by default, and a NaN in a CAM would leave no trace."""
    kept = 0
    for name, kernel in kernels(report, "fp32", "losses", "suppression"):
        extrema = re.findall(r"\b(?:max|min)\.[\w.]*f32\b", kernel.asm["ptx"])
        assert [found for found in extrema if "NaN" not in found] == [], name
        kept += len(extrema)
    assert kept > 50


def narrow_products(ttir: str) -> list[str]:
    """Return 32-bit products of two variables in addresses. D and E are numbers of channels; times classes they are
    small."""
    definitions: dict[str, tuple[str, str]] = {}
    for name, operation, rest in re.findall(r"(%[\w#]+)(?::\d+)? = (?:\"?)([\w.]+)(?:\"?) ?(.*)", ttir):
        definitions[name] = operation, rest
    found, seen = [], set()
    waiting = [re.findall(r"%[\w#]+", rest)[1] for operation, rest in definitions.values() if operation == "tt.addptr"]
    assert waiting
    while waiting:
        name = waiting.pop()
        if name in seen or name not in definitions:
            continue
        seen.add(name)
        operation, rest = definitions[name]
        operands = re.findall(r"%[\w#]+", rest)
        sources = [definitions.get(operand, ("", "")) for operand in operands]
        small = any(made == "arith.constant" or re.match(r"(?:tt\.splat )?%[DE]\b", of) for made, of in sources)
        if operation == "arith.muli" and not small and re.search(r": (?:tensor<[\dx]+x)?i32", rest):
            found.append(f"{name} = {operation} {rest}")
        if operation != "tt.load":
            waiting += operands
    return found


def test_addresses_of_regions_are_made_in_64_bits(report: ModuleType) -> None:
    """Channels times pixels may exceed 2^31, so their product must not be a 32-bit one."""
    for name, kernel in kernels(report, "bf16", "region"):
        assert narrow_products(kernel.asm["ttir"]) == [], name


def test_a_narrow_product_would_be_seen() -> None:
    text = """
    %cst = arith.constant dense<4> : tensor<32xi32>
    %0 = tt.make_range {end = 32 : i32, start = 0 : i32} : tensor<32xi32>
    %1 = tt.splat %stride : i32 -> tensor<32xi32>
    %2 = arith.muli %0, %1 : tensor<32xi32>
    %3 = arith.extsi %2 : tensor<32xi32> to tensor<32xi64>
    %4 = arith.muli %0, %cst : tensor<32xi32>
    %5 = tt.addptr %p, %3 : tensor<32x!tt.ptr<f32>>, tensor<32xi64>
    %6 = tt.addptr %p, %4 : tensor<32x!tt.ptr<f32>>, tensor<32xi32>
    """
    assert [line.split()[0] for line in narrow_products(text)] == ["%2"]
