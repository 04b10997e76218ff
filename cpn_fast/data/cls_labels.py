"""Read psa's ``cls_labels.npy``, a pickled dict of id -> numbers (K,). Nothing in the pickle can run."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError

MAX_PICKLE = 256 * 2**20
"""Bytes; COCO's 82,783 images x 80 classes need 30 MB."""


def load_cls_labels(path: Path) -> dict[Any, Any]:
    """Return what the dict holds: arrays as numpy arrays, anything else as a plain Python value.

    Raises UserError for another file, OSError for one that cannot be read.
    """
    try:
        return _unpickle_dict(reading.read_bytes(path, MAX_PICKLE))
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise UserError(f"{path}: not a pickled dict of id -> array as psa's cls_labels.npy: {error}") from None


def _unpickle_dict(content: bytes) -> dict[Any, Any]:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = read_header(file)
    if not dtype.hasobject:
        raise ValueError(f"it holds {dtype} numbers")
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):  # raises for lengths beyond the end
        if opcode.name in _RESERVING and isinstance(argument, int) and argument > len(content):
            raise ValueError(f"{opcode.name} {argument} in a file of {len(content)} bytes")
    file.seek(start)
    array = _Unpickler(file).load()
    table = array.value if isinstance(array, _Array) else array
    if not isinstance(table, dict):
        raise ValueError(f"it holds a {type(table).__name__}")
    return {key: value.value if isinstance(value, _Array) else value for key, value in table.items()}


class _Dtype:
    """Stand-in for numpy.dtype."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stand-in for numpy.ndarray, so that a pickle reserves no more memory than it has bytes."""

    value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, _, content = state
        self.value = content[0] if kind.dtype.hasobject else np.frombuffer(content, kind.dtype).reshape(shape)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: _Dtype, content: bytes) -> Any:
    """Stand-in for numpy's scalar: the keys of irn's file are np.int32."""
    return np.frombuffer(content, kind.dtype)[0].item()


def _latin1(text: str, _: str) -> bytes:
    """Stand-in for _codecs.encode(text, "latin1"), which pickle protocol 2 calls for bytes."""
    return text.encode("latin1")


_RESERVING = ("PUT", "BINPUT", "LONG_BINPUT", "FRAME")
"""Opcodes whose argument makes the unpickler reserve memory before it reads on."""
_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a label file does not need")
        return _STAND_INS[module, name]
