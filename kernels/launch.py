"""What the Triton kernels share: tuning over configurations that are known to compile well, and block sizes.

``bench/kernel_report.py`` compiles every configuration listed in a kernel's module for each architecture; a test fails
on one that spills, so autotuning only ever chooses among configurations that passed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on the CPU, in NumPy: for tests."""

DOT_SIDE = 16  # the smallest side of a tensor-core product


Table = dict[tuple[str, str], list[triton.Config]]
"""Configurations for a precision ("half", "tf32") and a family of GPUs ("ampere": sm_80 to 89, "hopper": sm_90 on)."""


def tuned(table: Table, key: list[str]) -> Callable[[Any], Any]:
    """Decorate a kernel to try its table's configurations once per ``key``; the interpreter takes the first one."""
    configs = [config for configs in table.values() for config in configs]

    def fitting(_: object, __: object, **arguments: Any) -> list[triton.Config]:
        return table[arguments["PRECISION"], family(torch.cuda.get_device_capability()[0])]

    if INTERPRETED:
        return triton.autotune(configs=configs[:1], key=key)
    return triton.autotune(configs=configs, key=key, prune_configs_by={"early_config_prune": fitting})


def family(major: int) -> str:
    """Which of a table's families a compute capability belongs to."""
    return "ampere" if major < 9 else "hopper"


def next_power(value: int, least: int = DOT_SIDE) -> int:
    return max(least, triton.next_power_of_2(value))


@triton.jit
def product(left, right, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + left @ right in float32."""
    if PRECISION == "ieee":
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="tf32" if PRECISION == "half" else PRECISION)


def precision(dtype: torch.dtype) -> str:
    """How products of a dtype run: ``half`` or ``tf32``."""
    if INTERPRETED:
        return "ieee"  # its products would take bfloat16's bits for integers
    return "tf32" if dtype == torch.float32 else "half"


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the tensor's own device, whichever one is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check(*tensors: Tensor) -> None:
    """Raise where the kernels cannot run: TypeError for the dtype, ValueError for the device."""
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"backend 'triton' takes float32, bfloat16 and float16, found {tensor.dtype}: use 'tiled'")
        if not (tensor.is_cuda or INTERPRETED):
            raise ValueError(f"backend 'triton' needs tensors on CUDA, found {tensor.device}: use 'tiled'")
