"""Locks: one owner at a time of a folder that a command writes into, and of a file while it is written.

A lock is the kernel's (``flock`` on a hidden file). It ends with the process that holds it, however the process ends,
so a dead owner leaves no lock. NFS (version 4) passes the lock to the server, for all hosts. There too it ends with
the process; after the death of a host it ends with the server's lease (90 seconds by default).
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, refusal

if TYPE_CHECKING:
    from cpn_fast.runtime.distributed import Rank

LOCK = ".lock"
SAID_AFTER, SAID_EVERY = 3.0, 60.0
"""Seconds until a waiting process says so, and seconds between two such messages."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

_held: dict[str, list[int]] = {}
"""This process's locks of folders: path -> its descriptor, repeated for each time that it was taken."""


@contextmanager
def owned(folder: Path, rank: Rank | None = None, *, part: str = "", waits: bool = False) -> Iterator[None]:
    """Own a folder, or a named ``part`` of it, in the block. No other process owns it at the same time.

    If another process owns it, raises UserError, which names the owner. But this process waits, with a message, if
    ``waits`` is true or if it already owns a folder: it may be a stage of ``run``, whose work should not be lost.
    A process may own a folder several times over. With ``rank`` all of torchrun's processes must call it; the first
    one owns the folder for all. Raises UserError if the file system cannot lock files.
    """
    path, problem = folder / (f".{part}{LOCK}" if part else LOCK), ""
    with ExitStack() as stack:
        if rank is None or rank.first:
            try:
                stack.enter_context(_hold(path, folder / part, waits=waits or bool(_held)))
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{error.filename or path}: {refusal(error)}"
        if rank is not None:
            problem = rank.gather(problem)[0]
        if problem:
            raise UserError(problem)
        yield


def lock(path: Path) -> int | None:
    """Lock ``path``, which is created if necessary, and return a descriptor. None if another process has the lock.

    The lock lasts until the descriptor is closed. Its holder may rename or remove the file. Raises UserError if the
    file system cannot lock files.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
            os.close(descriptor)  # its owner removed or renamed the file in between: try again
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise UserError(
                f"{path}: this file system cannot lock files ({error.strerror}), so two commands could write here at "
                "once and spoil each other's files. Mount it with locks (Lustre: -o flock), or write to another one"
            ) from None


def lock_when_free(path: Path, resource: Path) -> int:
    """Lock ``path`` as ``lock`` does, but wait for another holder, and name the ``resource`` on standard error."""
    start = last_message = time.monotonic()
    while (descriptor := lock(path)) is None:
        now = time.monotonic()
        if now - start >= SAID_AFTER and (last_message == start or now - last_message >= SAID_EVERY):
            print(f"Waiting for {resource}: it is in use by {_owner(path)}", file=sys.stderr, flush=True)
            last_message = now
        time.sleep(0.1)
    return descriptor


@contextmanager
def _hold(path: Path, resource: Path, *, waits: bool) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    key = os.path.realpath(path)
    descriptors = _held.get(key, [])
    if descriptors:
        descriptor = descriptors[0]
    else:
        taken = lock_when_free(path, resource) if waits else lock(path)
        if taken is None:
            raise UserError(
                f"{resource}: in use by {_owner(path)}. Two commands at once would spoil each other's files: wait for "
                "its end, or stop it and give this command again"
            )
        descriptor = taken
        with suppress(OSError):  # a lock without a note still holds; only the owner's name is missing
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_self()).encode())
    _held.setdefault(key, []).append(descriptor)
    try:
        yield
    finally:
        _held[key].pop()
        if not _held[key]:
            del _held[key]
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _self() -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "user": user, "host": socket.gethostname(), "pid": str(os.getpid()), "since": since}


def _owner(path: Path) -> str:
    """Describe the holder of a lock."""
    try:
        note = json.loads(reading.read_bytes(path, reading.OWNER))
        words = "`{command}` (process {pid} of {user} on {host}, since {since})".format(**note)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "another process"
    return "".join(letter if letter.isprintable() else "?" for letter in words[:500])


def _forget() -> None:
    """Close the locks in a forked process, which otherwise would hold them as long as it lives."""
    for descriptors in _held.values():
        os.close(descriptors[0])
    _held.clear()


os.register_at_fork(after_in_child=_forget)
