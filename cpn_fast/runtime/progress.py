"""Reports of a command while it works and at its end: for people, logs, or programs.

Standard output is for results. Progress goes to standard error: bars on a terminal, elsewhere a line a minute. In mode
``json`` standard output holds only JSON, one object a line, and everything else goes to standard error:

- ``{"event": "progress", "stage": "cam", "done": 3, "total": 10, "note": ""}``, at most one a second for each stage,
  and always its first and its last;
- ``{"event": "command", "command": "cpn-fast train ..."}`` for each command that ``reproduce --commands`` prints;
- at the end ``{"event": "done", "command": ...}`` with files and figures, or ``error`` or ``stopped`` with ``message``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import IO, Any, Literal, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from cpn_fast.runtime import distributed, terminal

Mode = Literal["text", "quiet", "json"]
EVERY: dict[Mode, float] = {"text": 60.0, "json": 1.0}
"""Seconds between two lines of a stage, by mode."""
Item = TypeVar("Item")

_mode: Mode = "text"
_programs: IO[str] | None = None  # the real standard output in mode json


def use(mode: Mode) -> None:
    """Set the mode of all later reports."""
    global _mode, _programs
    if _programs is not None:
        sys.stdout, _programs = _programs, None
    if mode == "json":
        _programs, sys.stdout = sys.stdout, sys.stderr
    _mode = mode


def tell(event: str, **content: Any) -> None:
    """Write an event for programs, in mode ``json`` only."""
    if _programs is not None:
        print(json.dumps({"event": event, **content}, default=str), file=_programs, flush=True)


class Progress:
    """Progress of a stage, as a context manager. Under torchrun only the first process reports, for itself."""

    def __init__(self, stage: str, total: int, done: int = 0) -> None:
        self.stage, self.total, self.done, self.note = stage, total, done, ""
        self._bars: Bars | None = None
        self._within = ExitStack()
        self._told, self._told_done = time.monotonic(), -1
        self._reports = distributed.announced().first and _mode != "quiet"

    def __enter__(self) -> Progress:
        console = terminal.console(stderr=True)
        if self._reports and _mode == "text" and console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=console,
            )
            self._bars.add_task(self.stage, total=self.total, completed=self.done, note="")
            self._bars.start()
            self._within.callback(self._bars.stop)
            self._within.enter_context(terminal.escaping())  # rich has replaced our escaping streams
        elif _mode == "json":
            self._line()
        return self

    def __exit__(self, *_: object) -> None:
        self._within.close()
        if self._bars is None and _mode == "json" and self._told_done != self.done:
            self._line()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Add ``count`` finished items. A ``note`` stays beside the bar until the next note."""
        self.done += count
        self.note = self.note if note is None else note
        if self._bars is not None:
            self._bars.update(TaskID(0), completed=self.done, note=self.note)
        elif _mode != "quiet" and time.monotonic() - self._told >= EVERY[_mode]:
            self._line()

    def _line(self) -> None:
        if not self._reports:
            return
        self._told, self._told_done = time.monotonic(), self.done
        if _mode == "json":
            tell("progress", stage=self.stage, done=self.done, total=self.total, note=self.note)
        else:
            print(f"{self.stage} {self.done}/{self.total}  {self.note}".rstrip(), file=sys.stderr, flush=True)


def track(items: Iterable[Item], stage: str, total: int) -> Iterator[Item]:
    """Yield the items and report progress. An item counts as done when the next one is requested.

    Without items it reports nothing.
    """
    if total == 0:
        yield from items
        return
    with Progress(stage, total) as progress:
        for item in items:
            yield item
            progress.advance()
