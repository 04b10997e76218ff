"""In what precision a network's forward pass runs on a device."""

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
"""The flags of CPUs (x86, ARM) that multiply in a precision themselves; any one of them will do."""


def autocast(precision: str | None, device: torch.device) -> Any:
    """The forward pass's autocast; None is bf16 where the device computes it itself, elsewhere fp32.

    Warns once on stderr where a precision that was asked for is emulated.
    """
    chosen = precision or default(device)
    if chosen == "fp32":
        return nullcontext()
    if not computes(chosen, device):
        _warn(chosen, device)
    return torch.autocast(device.type, DTYPES[chosen])


def dtype(precision: str | None, device: torch.device) -> torch.dtype:
    """In what products run under ``autocast``."""
    return DTYPES[precision or default(device)]


def default(device: torch.device) -> str:
    """``bf16`` or ``fp32``: what null stands for on a device."""
    return "bf16" if computes("bf16", device) else "fp32"


@lru_cache
def computes(precision: str, device: torch.device) -> bool:
    """Whether a device computes ``bf16`` or ``fp16`` itself: CUDA from sm_80 (fp16: always), CPUs by their flags."""
    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.get_device_capability(device) >= (8, 0)
    return CPU_INFO.exists() and not NATIVE[precision].isdisjoint(CPU_INFO.read_text().split())


@lru_cache
def _warn(precision: str, device: torch.device) -> None:
    place = "GPU" if device.type == "cuda" else "CPU"
    print(
        f"Warning: precision {precision} is emulated on this {place} and many times slower than fp32: set the key "
        "precision (of train, affinity.train, segment.train) to fp32, or to null for the fastest that is native",
        file=sys.stderr,
    )
