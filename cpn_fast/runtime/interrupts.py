"""Stop a command cleanly at SIGTERM (from schedulers) and Ctrl-C.

Files appear whole or not at all, so a stage stops at any moment. Only training notes the signal and finishes its step
first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command, given again, goes on."""


class Stopped(BaseException):
    """A signal stopped a stage, and its files are in order. It is not an Exception, so that no block catches it."""


@contextmanager
def acted_on() -> Iterator[None]:
    """Make signals raise Stopped within the block, except where they are ``noted``.

    Python drops an exception in ``__del__``, so a signal that comes within one is sent again a moment later.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped; finished files are kept")

    def send_again() -> None:
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # else the block has ended
            os.kill(os.getpid(), signal.SIGTERM)

    def report(dropped: Any) -> None:
        if dropped.exc_type is Stopped:
            threading.Timer(0.01, send_again).start()
        else:
            previous(dropped)

    previous, sys.unraisablehook = sys.unraisablehook, report
    try:
        with _handled(stop):
            yield
    finally:
        sys.unraisablehook = previous


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a signal has come. Within the block signals do nothing else.

    But a second Ctrl-C raises KeyboardInterrupt. Outside the main thread, where Python delivers no signals, the
    function always returns False.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    with _handled(note):
        yield lambda: bool(received)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)
