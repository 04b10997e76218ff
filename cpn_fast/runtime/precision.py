"""The precision of a network's forward pass on a device."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

CPU_INFO = Path("/proc/cpuinfo")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NATIVE = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"}}
"""Flags of CPUs (x86, ARM) that multiply natively in a precision. One of them is enough."""


def autocast(precision: str | None, device: torch.device) -> Any:
    """Return the forward pass's autocast. None means bf16 if the device computes it natively, else fp32.

    Warns once on stderr if the requested precision is emulated.
    """
    chosen = precision or default(device)
    if chosen == "fp32":
        return nullcontext()
    if not computes(chosen, device):
        _warn(chosen, device)
    return torch.autocast(device.type, DTYPES[chosen])


def dtype(precision: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of products under ``autocast``."""
    return DTYPES[precision or default(device)]


def default(device: torch.device) -> str:
    """Return ``bf16`` or ``fp32``: the precision that null means on a device."""
    return "bf16" if computes("bf16", device) else "fp32"


@lru_cache
def computes(precision: str, device: torch.device) -> bool:
    """Return whether a device computes ``bf16`` or ``fp16`` natively.

    CUDA computes bf16 from sm_80 on and fp16 always. CPUs tell it by their flags.
    """
    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.get_device_capability(device) >= (8, 0)
    return CPU_INFO.exists() and not NATIVE[precision].isdisjoint(CPU_INFO.read_text().split())


@lru_cache
def _warn(precision: str, device: torch.device) -> None:
    processor = "GPU" if device.type == "cuda" else "CPU"
    print(
        f"Warning: precision {precision} is emulated on this {processor} and many times slower than fp32: set the key "
        "precision (of train, affinity.train, segment.train) to fp32, or to null for the fastest native precision",
        file=sys.stderr,
    )
