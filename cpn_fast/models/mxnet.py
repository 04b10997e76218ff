"""ResNet38's ImageNet weights in MXNet's .params format, read without mxnet."""

from __future__ import annotations

import math
import re
import struct
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cpn_fast.runtime.errors import UserError


class Content(NamedTuple):
    """What a file of weights holds."""

    tensors: dict[str, Tensor]
    dropped: list[str]
    """Names of the entries that are left out."""


# MXNet's .params: a header, the arrays, then their names; all little-endian.
_PARAMS_MAGIC = 0x112
_V2, _V1 = 0xF993FAC9, 0xF993FAC8  # first word of an array; in the oldest format it is the number of dimensions
_MAX_DIMS = 32
_TYPES = (torch.float32, torch.float64, torch.float16, torch.uint8, torch.int32, torch.int8, torch.int64)


class _ParamsFile:
    """Reads a .params file from front to back. A length beyond the file's end is an error."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self.file = file
        self.remaining = path.stat().st_size

    def error(self, message: str) -> UserError:
        return UserError(f"{self.path}: not a readable .params file: {message}")

    def take(self, length: int) -> bytearray:
        if length > self.remaining:
            raise self.error(f"expected {length} more bytes, found {self.remaining}; it is damaged or cut short")
        data = bytearray(length)
        if self.file.readinto(data) != length:
            raise self.error("it became shorter while it was being read")
        self.remaining -= length
        return data

    def number(self, form: str) -> int:
        """Read an integer of the ``struct`` module's format ``form``."""
        (value,) = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))
        return int(value)

    def array(self) -> Tensor:
        version = self.number("I")
        dims, form = version, "I"
        if version in (_V1, _V2):
            if version == _V2 and self.number("i") != 0:
                raise self.error("it holds a sparse array; expected dense ones")
            dims, form = self.number("I"), "q"
        if not 1 <= dims <= _MAX_DIMS:
            raise self.error(f"an array has {dims:#x} dimensions or an unknown version; expected 1 to {_MAX_DIMS}")
        shape = [self.number(form) for _ in range(dims)]
        if min(shape) < 1:
            raise self.error(f"an array has shape {shape}")
        self.take(8)  # the device of the array
        code = self.number("i")
        if not 0 <= code < len(_TYPES):
            raise self.error(f"an array has type {code}; expected 0 to {len(_TYPES) - 1}")
        data = self.take(math.prod(shape) * _TYPES[code].itemsize)
        return torch.frombuffer(data, dtype=_TYPES[code]).reshape(shape)

    def name(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.error(f"a name is not text: {bytes(data[:40])!r}") from None


def read_params(path: Path) -> Content:
    """Return the tensors of ResNet38 by the released PyTorch names, without its classifier.

    Raises UserError for a file of another kind or network, and for one that is damaged.
    """
    with path.open("rb") as opened:
        file = _ParamsFile(path, opened)
        if file.number("Q") != _PARAMS_MAGIC:
            raise file.error(f"it does not start with {_PARAMS_MAGIC:#x}")
        file.take(8)  # reserved
        arrays = [file.array() for _ in range(file.number("Q"))]
        if (count := file.number("Q")) != len(arrays):
            raise file.error(f"{len(arrays)} arrays have {count} names")
        names = [file.name() for _ in range(count)]
        if file.remaining:
            raise file.error(f"{file.remaining} bytes follow the last name")
    tensors: dict[str, Tensor] = {}
    dropped = []
    for name, tensor in zip(names, arrays, strict=True):
        if "linear1000" in name:
            dropped.append(name)
            continue
        key = _from_mxnet(name)
        if key is None or key in tensors:
            raise file.error(f"{name!r} is an unknown or duplicate name for ResNet38")
        tensors[key] = tensor
    return Content(tensors, dropped)


_MXNET_NAME = re.compile(
    r"(?:arg|aux):(?:(conv1a)_(weight)"
    r"|res(\d)(?:a|b(\d+))_(branch\w+)_(weight)"
    r"|bn(\d)(?:a|b(\d+))_(branch\w+)_(gamma|beta|moving_mean|moving_var)"
    r"|(bn7)_(gamma|beta|moving_mean|moving_var))"
)
_FIELDS = {
    "weight": "weight", "gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var",
}  # fmt: skip


def _from_mxnet(name: str) -> str | None:
    """Convert ``arg:res2b1_branch2a_weight`` to ``b2_1.conv_branch2a.weight``; None for names of other networks."""
    match = _MXNET_NAME.fullmatch(name)
    if match is None:
        return None
    conv1a, _, conv_stage, conv_block, conv_branch, _, bn_stage, bn_block, bn_branch, _, bn7, _ = match.groups()
    field = _FIELDS[match[match.lastindex or 0]]
    if conv1a or bn7:
        return f"{conv1a or bn7}.{field}"
    block = conv_block or bn_block
    kind = f"conv_{conv_branch}" if conv_branch else f"bn_{bn_branch}"
    return f"b{conv_stage or bn_stage}{f'_{block}' if block else ''}.{kind}.{field}"
