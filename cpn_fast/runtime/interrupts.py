"""Stopping in good order: SIGTERM (as schedulers send it) and Ctrl-C.

Files appear whole or not at all, so a stage may be left at any moment, and is; training alone notes the signal and ends
its step first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command, given again, goes on."""


class Stopped(BaseException):
    """A stage stopped because it was asked to, and left everything in order; no error that a block might catch."""


@contextmanager
def acted_on() -> Iterator[None]:
    """Within the block signals raise Stopped, but where they are ``noted``."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped; finished files are kept")

    with _handled(stop):
        yield


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Within the block signals only make the function that it gives return True; a second Ctrl-C acts at once.

    Outside the main thread, where Python delivers no signals, it always returns False.
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
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
