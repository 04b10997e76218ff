"""Jobs in the background, of which few wait at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any


class Backlog:
    """Holds at most ``most`` unfinished jobs of a pool, which bounds the memory of what they are to write.

    A context: its end waits for all of them. The first error of a job is raised here.
    """

    def __init__(self, most: int, finished: Callable[[], object] = lambda: None) -> None:
        """``finished`` is called after every job."""
        self.most, self.finished = most, finished
        self.jobs: deque[Future[Any]] = deque()

    def __enter__(self) -> Backlog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self._wait(0)

    def add(self, job: Future[Any]) -> None:
        """Take a job over, and wait for the oldest ones if there are too many."""
        self.jobs.append(job)
        self._wait(self.most)

    def _wait(self, most: int) -> None:
        while len(self.jobs) > most:
            self.jobs.popleft().result()
            self.finished()
