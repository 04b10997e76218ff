"""File events of a process and its children: count them, and kill the process at one of them (kill.py).

An event is the opening of a file for writing, fsync, rename, unlink, truncate, link, mkdir or rmdir, in one folder. The
kill comes just before its event, which is after the event before. So kills at all events cover the moments before and
after each event.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import threading
from pathlib import Path
from typing import Any

AUDITED = {
    "open": "open",
    "os.rename": "rename",
    "os.remove": "unlink",
    "os.truncate": "truncate",
    "os.link": "link",
    "os.symlink": "link",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
}
"""Python's audit event -> kind. ``fsync`` has no audit event and is wrapped."""
END = "end"
"""The kind of a kill after all work, before the exit."""
PLACE = "CPN_FAST_FILE_EVENTS"
"""Environment variable with the file of the record and the watched folder."""


class Record:
    """The processes' shared state: a small memory-mapped file."""

    FORM = struct.Struct("<qqq??16s")

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(self.FORM.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.FORM.size)

    def begin(self, main: int, *, at: int, group: bool, half: bool) -> None:
        """Set the kill: at event ``at`` (-1: at the end; 0: never) of the process ``main``, or of its whole ``group``.

        With ``half`` a file loses its second half if the kill is at its fsync.
        """
        self._memory[:] = self.FORM.pack(0, at, main, group, half, b"")

    @property
    def count(self) -> int:
        return int(self.FORM.unpack(self._memory[:])[0])

    @property
    def killed_at(self) -> str:
        """Kind of the event at which a process was killed."""
        return self.FORM.unpack(self._memory[:])[5].rstrip(b"\0").decode()

    def note(self, kind: str, descriptor: int | None = None) -> None:
        """Count an event that is about to happen, and kill if it is the chosen one."""
        count, at, main, group, half, killed_at = self.FORM.unpack(self._memory[:])
        count += kind != END
        fatal = at == (-1 if kind == END else count)
        self._memory[:] = self.FORM.pack(count, at, main, group, half, kind.encode() if fatal else killed_at)
        if not fatal:
            return
        if (
            half and kind == "fsync" and descriptor is not None and (group or main == os.getpid())
        ):  # not in a process that survives
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        if group:
            os.killpg(0, signal.SIGKILL)
        os.kill(main, signal.SIGKILL)


def watch() -> Record:
    """Count this process's events from now on, in the record and folder that the environment variable names."""
    record_path, folder = os.environ[PLACE].split(os.pathsep)
    record, lock = Record(Path(record_path)), threading.RLock()
    busy = False

    def noticed(kind: str, path: Any) -> None:
        nonlocal busy
        with lock:
            if busy:  # the truncation of a kill
                return
            name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)  # noqa: PTH115
            if not os.path.abspath(name).startswith(folder + os.sep):  # noqa: PTH100
                return
            busy = True
            record.note(kind, path if isinstance(path, int) else None)
            busy = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        kind = AUDITED.get(event)
        if kind is None:
            return
        if event == "open" and (isinstance(arguments[0], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        noticed(kind, arguments[1] if event in ("os.link", "os.symlink") else arguments[0])

    synchronise = os.fsync

    def fsync(descriptor: int) -> None:
        noticed("fsync", descriptor)
        synchronise(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(audit)
    return record


if PLACE in os.environ:  # imported by multiprocessing's fork server, whose processes write too
    watch()
