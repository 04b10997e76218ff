"""Shared code of the Triton kernels: tables of blocks that compile well, products, and the check of the GPU.

``bench/kernel_report.py`` compiles every entry of a kernel's table, at every block size, for each architecture, and
fails if one spills. The tests do the same at the paper's size for one architecture of each family.
"""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpn_fast.kernels.operators import constant

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on the CPU, in NumPy, for tests."""

_HERE = nullcontext()
DOT_SIDE = 16  # the smallest side of a tensor-core product


class Blocks(NamedTuple):
    """Block sizes of a pixel kernel: one fixed choice without autotuning, so that runs repeat bit for bit."""

    targets: int  # pixels of a program's block
    sources: int  # pixels of one iteration of its loop
    resident: bool  # whether the targets' embeddings stay in registers
    warps: int
    stages: int
    unrolled: bool = True  # backward: unroll the columns of one group of classes; takes more shared memory

    def options(self) -> dict[str, Any]:
        """Return the arguments of the launch."""
        return {
            "BM": self.targets, "BN": self.sources, "RESIDENT": self.resident,
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


Table = dict[tuple[str, str, int, int], Blocks]
"""Blocks for (precision "half" or "tf32", family of GPUs, most channels of an embedding, most columns of classes)."""


def fitting(table: Table, numbers: str, gpu: str, channels: int, columns: int) -> Blocks:
    """Return the smallest entry of a precision and a family that has enough channels and columns."""
    sizes = [(width, most) for *kind, width, most in table if kind == [numbers, gpu]]
    width, most = min(size for size in sizes if size[0] >= channels and size[1] >= columns)
    return table[numbers, gpu, width, most]


def family(major: int) -> str:
    """Return the family of a compute capability in the tables.

    "ampere": sm_80 to 89 and from 120 (consumer Blackwell), with products of a warp and 99 KiB of shared memory or
    more; "hopper": sm_90, with products of a warp group; "blackwell": sm_100 to 110, with sums in tensor memory.
    """
    return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(major, "ampere")


@functools.cache
def family_of(device: int) -> str:
    """Return the family of a GPU by its index. The interpreter, which has no GPU, counts as "hopper"."""
    return "hopper" if INTERPRETED else family(torch.cuda.get_device_capability(device)[0])


def next_power(value: int, least: int = DOT_SIDE) -> int:
    """Return the lowest power of two that is at least ``value`` and ``least``. A symbolic value becomes a constant."""
    return max(least, 1 << (int(value) - 1).bit_length())


@triton.jit
def product(left, right, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + left @ right in float32."""
    if PRECISION == "ieee":
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="tf32" if PRECISION == "half" else PRECISION)


def precision(dtype: torch.dtype) -> str:
    """Return the precision of products of a dtype: ``half`` or ``tf32``."""
    if INTERPRETED and dtype == torch.bfloat16:
        return "ieee"  # the interpreter's products would read bfloat16's bits as integers
    return "tf32" if dtype == torch.float32 else "half"


def half_scale(largest: Tensor) -> Tensor:
    """Return each image's scale, (N, 1, 1): the gradient divided by it has a ``largest`` (N,) of 2^13.

    A backward pass is linear in the gradient. With the scale, what it stores in float16 is at most 2^15, and small
    gradients do not become zero. The scale is 1 where ``largest`` is not finite, so that NaN and inf spread as without
    it. It is at least 2^-40, because what ``largest`` leaves out of the gradient must stay finite.
    """
    return (largest * 2**-13).nan_to_num(nan=1, posinf=1).clamp(min=2**-40)[:, None, None]


def multiply(found: tuple[Tensor, ...], scale: Tensor, outputs: tuple[Tensor, ...]) -> None:
    """Write ``found`` times ``scale`` to ``outputs``. An empty one is not wanted."""
    for wide, output in zip(found, outputs, strict=True):
        if output.numel():
            torch.mul(wide, scale, out=output)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context that launches on the tensor's device even if another device is current."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _HERE


def obstacle(*tensors: Tensor) -> str | None:
    """Return why the kernels cannot run on these tensors, or None."""
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"takes float32, bfloat16 and float16, found {tensor.dtype}"
        if not (tensor.is_cuda or tensor.is_meta or INTERPRETED):
            return f"needs tensors on CUDA, found {tensor.device}"
    return _gpu_obstacle(tensors[0].get_device()) if tensors[0].is_cuda else None


@constant
def _gpu_obstacle(device: int) -> str | None:
    return gpu_obstacle(device)


@functools.cache
def gpu_obstacle(device: int) -> str | None:
    """Return why the kernels cannot run on a GPU, or None. Without any GPU (fake tensors) it is None."""
    if torch.version.hip:
        return "needs an NVIDIA GPU, found ROCm"
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return f"needs a GPU of compute capability 8.0 or above (Ampere), found {major}.{minor} ({name})"
    return None


def check(reason: str | None) -> None:
    """Raise ValueError if there is an obstacle."""
    if reason is not None:
        raise ValueError(f"backend 'triton' {reason}: use 'tiled'")
