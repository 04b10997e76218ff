"""The exception for errors that a user can fix, how it lists names, and the system's errors in words.

The command line prints a UserError without a traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FILE = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL)
"""EINVAL is of ``reading.Refused``, and of seeks in a damaged archive."""


class UserError(Exception):
    """Bad input: the message names the file or key, what was found, what was expected and what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means full memory, of a GPU or the machine.

    It knows the errors of torch, cuBLAS, cuDNN, DALI and NumPy.
    """
    message = str(error) if isinstance(error, RuntimeError) else ""
    said = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return (
        isinstance(error, MemoryError) or "out of memory" in message.lower() or any(words in message for words in said)
    )


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, with an ellipsis if there are more."""
    return ", ".join(names[:most]) + " ..." * (len(names) > most)


def refusal(error: OSError) -> str:
    """Return the system's reason, and what to do."""
    reason, remedy = error.strerror or type(error).__name__, "fix this and"
    if error.errno in FULL:
        reason, remedy = "the disk is full", "make room and"
    elif error.errno == errno.EEXIST:
        reason, remedy = "it is a file, and a folder is expected", "move it, or name another folder, and"
    return f"{reason}. Complete files are unchanged: {remedy} give the same command again"


def is_unread(error: BaseException) -> TypeGuard[OSError]:
    """Return whether the system could not read a file, which may be whole. Otherwise it is damaged or no file."""
    return isinstance(error, OSError) and error.errno not in _NO_FILE


def unread(path: Path, error: OSError) -> UserError:
    """Return the error of a file that the system cannot read. It does not advise to delete the file."""
    return UserError(f"{path}: cannot be read: {refusal(error)}")
