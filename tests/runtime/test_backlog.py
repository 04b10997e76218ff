from __future__ import annotations

from concurrent.futures import Future

import pytest

from cpn_fast.runtime.backlog import Backlog


class Job(Future):
    """A future that is done when somebody waits for it."""

    def __init__(self, waited: list[int], number: int, fails: bool = False) -> None:
        super().__init__()
        self.waited, self.number, self.fails = waited, number, fails

    def result(self, timeout: float | None = None) -> None:
        self.waited.append(self.number)
        if self.fails:
            raise OSError("no room")


def test_the_oldest_jobs_are_waited_for_and_at_the_end_all() -> None:
    waited: list[int] = []
    finished: list[int] = []
    with Backlog(2, lambda: finished.append(len(waited))) as backlog:
        for number in range(4):
            backlog.add(Job(waited, number))
            assert waited == list(range(max(0, number - 1)))
    assert waited == [0, 1, 2, 3]
    assert finished == [1, 2, 3, 4]


def test_a_job_that_fails_ends_the_block() -> None:
    waited: list[int] = []
    with pytest.raises(OSError, match="no room"), Backlog(0) as backlog:
        backlog.add(Job(waited, 0, fails=True))
    with pytest.raises(OSError, match="no room"), Backlog(5) as backlog:
        backlog.add(Job(waited, 1, fails=True))
    assert waited == [0, 1]


def test_nothing_is_waited_for_after_another_error() -> None:
    waited: list[int] = []

    def block() -> None:
        with Backlog(5) as backlog:
            backlog.add(Job(waited, 0))
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert not waited
