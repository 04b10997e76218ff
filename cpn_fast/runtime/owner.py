"""One owner at a time: of a folder that a command writes into, and of a file while it is written.

A lock is the kernel's (``flock`` on a hidden file), so it ends with the process that holds it, however that ends: a
dead owner need not be found out. NFS (version 4) passes it on to the server, for all hosts; there it ends with the
process too, and that of a host that died when the server's lease runs out (90 seconds by default).
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
from cpn_fast.runtime.errors import UserError

if TYPE_CHECKING:
    from cpn_fast.runtime.distributed import Rank

LOCK = ".lock"
SAID_AFTER, SAID_EVERY = 3.0, 60.0
"""Seconds until somebody who waits says so, and between two times."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

_held: dict[str, list[int]] = {}
"""This process's locks of folders: path -> descriptor, once for each time that it was taken."""


@contextmanager
def owned(folder: Path, rank: Rank | None = None, *, part: str = "", waits: bool = False) -> Iterator[None]:
    """Own a folder, or by its name a ``part`` of one, in the block: no other process does so at the same time.

    If another has it, a process that owns nothing yet raises UserError, which says who that is. One that ``waits``, and
    one that owns something already (a stage of ``run``, whose work should not be lost), waits for it and says for what.
    The same process may own a folder several times over. With ``rank`` all of torchrun's processes must call it; the
    first owns it for all. Raises UserError where files cannot be locked.
    """
    path, problem = folder / (f".{part}{LOCK}" if part else LOCK), ""
    with ExitStack() as stack:
        if rank is None or rank.first:
            try:
                stack.enter_context(_hold(path, folder / part, waits=waits or bool(_held)))
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{error.filename or path}: {error.strerror}"
        if rank is not None:
            problem = rank.gather(problem)[0]
        if problem:
            raise UserError(problem)
        yield


def lock(path: Path) -> int | None:
    """A descriptor of ``path``, made if need be, that holds its lock until it is closed; None if another holds it.

    Whoever holds it may rename or remove the file. Raises UserError where files cannot be locked.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
            os.close(descriptor)  # its owner took it away in between: again
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise UserError(
                f"{path}: this file system cannot lock files ({error.strerror}), so that two commands could write here "
                "at once and spoil each other's. Mount it with locks (Lustre: -o flock), or write to another one"
            ) from None


def lock_when_free(path: Path, what: Path) -> int:
    """As ``lock``, but waits for another that holds it, and says on standard error for what."""
    began = said = time.monotonic()
    while (descriptor := lock(path)) is None:
        now = time.monotonic()
        if now - began >= SAID_AFTER and (said == began or now - said >= SAID_EVERY):
            print(f"Waiting for {what}: it is in use by {_owner(path)}", file=sys.stderr, flush=True)
            said = now
        time.sleep(0.1)
    return descriptor


@contextmanager
def _hold(path: Path, what: Path, *, waits: bool) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    key = os.path.realpath(path)
    descriptors = _held.get(key, [])
    if descriptors:
        descriptor = descriptors[0]
    else:
        found = lock_when_free(path, what) if waits else lock(path)
        if found is None:
            raise UserError(
                f"{what}: in use by {_owner(path)}. Two at once would spoil each other's files: wait for its end, or "
                "stop it and give this command again"
            )
        descriptor = found
        with suppress(OSError):  # without it the owner is not named, but owns it
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
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "user": user, "host": socket.gethostname(), "pid": str(os.getpid()), "since": since}


def _owner(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        note = json.loads(reading.read_bytes(path, reading.OWNER))
        words = "`{command}` (process {pid} of {user} on {host}, since {since})".format(**note)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "another process"
    return "".join(letter if letter.isprintable() else "?" for letter in words[:500])


def _forget() -> None:
    """In a forked process: it would hold the locks as long as it lives."""
    for descriptors in _held.values():
        os.close(descriptors[0])
    _held.clear()


os.register_at_fork(after_in_child=_forget)
