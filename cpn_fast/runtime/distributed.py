"""Which of torchrun's processes this is, what its share is, and how the processes agree.

Without torchrun there is one process, which has everything and waits for nobody; torch is then imported for ``device``
alone, as scoring does without it.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from cpn_fast.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

TIMEOUT = timedelta(hours=2)
"""The longest that processes wait for one that is still at work. A lost one ends the wait at once."""
MEETING = timedelta(minutes=10)
"""The longest that processes wait for one that has not begun, as machines of a cluster begin apart."""
SAID_AFTER = 10.0
"""Seconds of a meeting after which it is said who is missing."""

Item = TypeVar("Item")


class Rank(NamedTuple):
    number: int
    world: int
    """How many processes there are, on all machines."""
    local: int
    """Number among the processes of this machine."""

    @property
    def first(self) -> bool:
        """Whether this process writes and reports for all."""
        return self.number == 0

    @property
    def device(self) -> torch.device:
        """A GPU of this process's own, or the CPU. Raises UserError if there are fewer GPUs here than processes."""
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started process {self.local + 1} on this machine, which has {torch.cuda.device_count()} "
                "GPU(s): give --nproc-per-node as many or fewer"
            )
        device = torch.device("cuda", self.local)
        torch.cuda.set_device(device)
        return device

    @property
    def cores(self) -> int:
        """CPU cores for this process: those that this machine, or its container, leaves to each of its processes."""
        cores = len(os.sched_getaffinity(0))
        with suppress(OSError, ValueError):  # "max 100000" without a limit
            quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
            cores = min(cores, -(-quota // period))
        return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every ``world``-th item. No two processes have one in common, so give all of them the same list."""
        return items[self.number :: self.world]

    def wait(self) -> None:
        """Return once all processes are here."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """Each process's (picklable) value, in the order of ranks; all must call it."""
        if self.world == 1:
            return [value]
        from torch import distributed

        values = [None] * self.world
        distributed.all_gather_object(values, value, group=_on_cpu())
        return values

    def sum(self, counts: np.ndarray) -> np.ndarray:
        """Sum over the processes of an array that has one shape and dtype in all; all must call it."""
        if self.world == 1:
            return counts
        import torch

        total = torch.from_numpy(counts.copy())
        torch.distributed.all_reduce(total, group=_on_cpu())
        return total.numpy()


@functools.cache
def join() -> Rank:
    """This process's rank; the first call meets the other processes: by NCCL for GPU tensors, by Gloo for the rest."""
    number, world, local = (int(os.environ.get(name, alone)) for name, alone in _ENVIRONMENT.items())
    rank = Rank(number, world, local)
    if world > 1:
        from torch import distributed

        backend = "nccl" if rank.device.type == "cuda" else "gloo"
        try:
            _Meeting(rank, backend).wait()
        except RuntimeError as error:
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                raise
            # torch 2.13's torchrun keeps its store over a restart, with the addresses of processes that are gone.
            raise UserError(
                f"the processes that torchrun started again did not meet ({error}): start torchrun with "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment (docs/scaling.md, A lost worker)"
            ) from None
        atexit.register(distributed.destroy_process_group)
    return rank


def lost_another(error: BaseException) -> bool:
    """Whether it says that a process which this one was waiting for, or talking to, is gone."""
    if not isinstance(error, RuntimeError) or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    from torch import distributed

    return isinstance(error, distributed.DistError) or ("gloo" in str(error) and "peer" in str(error))


def tell_torchrun(message: str, *, cause: bool = True) -> None:
    """Have torchrun end with the message, for its own lines come after all that a process prints.

    It shows what a process left in the file that it named, and ends with the earliest, in whole seconds. ``cause`` is
    false for a process that ends because another one did, which must not be taken for the earliest.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    about = {"py_callstack": message, "timestamp": str(int(time.time()) - cause)}
    with suppress(OSError):  # it is printed already
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": about}}))


class _Meeting:
    """The processes' meeting, in a thread: torch's own waiting cannot be interrupted, and does not say for whom."""

    def __init__(self, rank: Rank, backend: str) -> None:
        self.rank, self.backend = rank, backend
        self.missing: list[int] = [] if rank.first else [0]
        self.error: BaseException | None = None
        self.given_up = False
        self.place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        self.thread = threading.Thread(target=self._run, daemon=True)

    def wait(self) -> None:
        """Return when all are here. Signals are acted on meanwhile. Raises UserError when MEETING is over."""
        began, said = time.monotonic(), False
        self.thread.start()
        try:
            while self.thread.is_alive():
                self.thread.join(0.1)
                waited = time.monotonic() - began
                if waited > SAID_AFTER and not said and self.missing:
                    print(f"Waiting for {self._who()}", file=sys.stderr, flush=True)
                    said = True
                if waited > MEETING.total_seconds():
                    raise UserError(self._lost())
        finally:
            self.given_up = True
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        from torch import distributed

        try:
            store = _store(self.rank)
            store.set(f"here/{self.rank.number}", "")
            others = range(self.rank.world)
            while missing := [number for number in others if not store.check([f"here/{number}"])]:
                self.missing = missing
                time.sleep(0.1)
                if self.given_up:
                    return
            self.missing = []
            group = distributed.PrefixStore("default_pg", store)  # type: ignore[attr-defined]
            distributed.init_process_group(
                self.backend, store=group, rank=self.rank.number, world_size=self.rank.world, timeout=TIMEOUT
            )
            _on_cpu()
        except distributed.DistNetworkError as error:  # no connection, though it is tried until MEETING is over
            self.error = UserError(f"{self._lost()}. torch says: {error}")
        except BaseException as error:
            self.error = error

    def _who(self) -> str:
        numbers = ", ".join(map(str, self.missing[:8])) + (", ..." if len(self.missing) > 8 else "")
        here = f"process {self.rank.number} is at {self.place}"
        return f"process {numbers or 'unknown'} of {self.rank.world}, numbered from 0; {here}"

    def _lost(self) -> str:
        return (
            f"after {MEETING.total_seconds() / 60:g} minutes still waiting for {self._who()} (MASTER_ADDR and "
            "MASTER_PORT). See what the missing ones say, and start all of them again"
        )


def _store(rank: Rank) -> Any:
    """What all processes write into and read from: torchrun's, or without it one that process 0 keeps."""
    from torch import distributed

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        met = distributed.rendezvous("env://", rank.number, rank.world, timeout=MEETING)  # type: ignore[attr-defined]
        store, *_ = next(met)
    else:
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError):
            raise UserError(
                f"WORLD_SIZE is {rank.world}, but MASTER_ADDR and MASTER_PORT do not say where the processes meet: set "
                "both, start with torchrun, or unset WORLD_SIZE"
            ) from None
        kept = {"wait_for_workers": False, "multi_tenant": True}
        store = distributed.TCPStore(host, port, None, rank.first, MEETING, **kept)  # type: ignore[attr-defined]
    store.set_timeout(TIMEOUT)
    return store


_ENVIRONMENT = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


@functools.cache
def _on_cpu() -> Any:
    """The Gloo group, in which waiting occupies no GPU."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=TIMEOUT)
