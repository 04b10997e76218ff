"""What the tests change in Triton's interpreter."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

try:
    from cpn_fast.kernels.launch import INTERPRETED
except ImportError:
    INTERPRETED = False

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    from cpn_fast.kernels import upsampled_triton

    @pytest.fixture(autouse=True)
    def _extrema_drop_nan_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
        """Drop NaN unless the kernel keeps it. NumPy reduces: our own reduction would be a call for each element."""
        apply = interpreter.ReduceOps.apply_impl
        keep = {upsampled_triton.larger: np.max, upsampled_triton.smaller: np.min}

        def reduced(self: Any, values: tuple[Any, ...]) -> Any:
            if self.combine_fn in keep:
                return self.min_max(values[0], val_reduce_op=keep[self.combine_fn])
            return apply(self, values)

        monkeypatch.setattr(interpreter.ReduceOps, "apply_impl", reduced)
        for name, drop in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
            monkeypatch.setattr(
                interpreter.InterpreterBuilder, name, lambda self, a, b, drop=drop: self.binary_op(a, b, drop)
            )

    @pytest.fixture(autouse=True)
    def _types_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
        """The interpreter makes its table of types anew for each value, which is a fifth of its time."""
        find = interpreter._get_np_dtype
        known = functools.cache(find)

        def once(kind: tl.dtype) -> np.dtype[Any]:
            return known(kind) if type(kind) is tl.dtype else find(kind)  # pointers and blocks have no hash

        monkeypatch.setattr(interpreter, "_get_np_dtype", once)
