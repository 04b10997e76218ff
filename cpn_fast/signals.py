"""Stopping in good order: SIGTERM (as schedulers send it) and Ctrl-C are noted, and acted on between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command, given again, goes on."""


class Stopped(Exception):
    """A stage stopped because it was asked to, and left everything in order."""


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
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
