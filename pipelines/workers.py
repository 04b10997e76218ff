"""Processes that make superpixels (``slic.serve``). The death of one becomes an error that names the image."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any, TypeVar

from cpn_fast.runtime.errors import UserError

Result = TypeVar("Result")

START = "import sys; sys.path[:] = {path!r}; from cpn_fast.pipelines import slic; slic.serve({descriptor})"


class Workers:
    """A pool of ``count`` processes, each started at its first use. Threads wait for an idle process.

    The processes import neither torch nor DALI, and write no files. They end with this process, however it ends,
    because that closes their socket pair.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._workers = [_Worker() for _ in range(count)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def call(self, name: object, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function of ``slic`` in an idle process, and return its result. Threads may call this.

        Raises the function's error, and UserError, which names ``name``, if the process dies.
        """
        worker = self._idle.get()
        try:
            return worker.call(name, function, *arguments)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._workers:
            worker.end()


class _Worker:
    def __init__(self) -> None:
        self._connection: Connection | None = None

    def call(self, name: object, function: Callable[..., Result], *arguments: Any) -> Result:
        if self._connection is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send((function, arguments))
            succeeded, result = self._connection.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            self.end()
            raise UserError(_death(name, code)) from None
        except BaseException:  # after Ctrl-C, for example, the next call would get this call's answer
            self.end()
            raise
        if not succeeded:
            raise result
        return result

    def end(self) -> None:
        if self._connection is not None:
            self._connection = None
            self._end()

    def _start(self) -> None:
        ours, theirs = Pipe()
        command = [sys.executable, "-c", START.format(path=sys.path, descriptor=theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self._connection = ours
        self._end = weakref.finalize(self, _end, self._process, ours)


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def _death(name: object, code: int) -> str:
    if code >= 0:
        return f"{name}: the process that makes its superpixels ended with {code}; its output is above"
    killer = signal.Signals(-code).name
    advice = "Take it off the list; if other images fail too, install fast-slic anew (make setup, `cpn-fast doctor`)"
    if -code == signal.SIGKILL:
        advice = "The system does this when memory runs out: free some, or scale the image down"
    return f"{name}: the process that makes its superpixels was ended by {killer}. {advice}"
