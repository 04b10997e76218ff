"""The exception for what a user can put right, which the command line prints without a traceback; and full memory."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Bad input: the message names the file or key, what was found, what was expected and what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a GPU's or the machine's memory is full; torch, DALI and NumPy each say it in their way."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or "out of memory" in said.lower() or "DefaultCPUAllocator" in said


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and an ellipsis if there are more."""
    return ", ".join(names[:most]) + " ..." * (len(names) > most)
