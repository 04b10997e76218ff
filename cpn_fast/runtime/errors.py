"""The exception for errors that a user can fix, how it lists names, and detection of full memory.

The command line prints a UserError without a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Bad input: the message names the file or key, what was found, what was expected and what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means full memory, of a GPU or the machine. It knows torch's, DALI's and NumPy's."""
    message = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or "out of memory" in message.lower() or "DefaultCPUAllocator" in message


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, with an ellipsis if there are more."""
    return ", ".join(names[:most]) + " ..." * (len(names) > most)
