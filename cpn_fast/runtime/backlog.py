"""Background jobs with a bounded queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any


class Backlog:
    """Hold at most ``most`` unfinished jobs of a pool, so that their results take bounded memory.

    A context manager: its end waits for all jobs. It raises the first error of a job.
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
        """Add a job, and wait for the oldest jobs if there are more than ``most``."""
        self.jobs.append(job)
        self._wait(self.most)

    def _wait(self, most: int) -> None:
        while len(self.jobs) > most:
            self.jobs.popleft().result()
            self.finished()
