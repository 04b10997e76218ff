"""The processes of torchrun: the rank of this one, its share of the work, and their communication.

Without torchrun there is one process. It has all the work and waits for no other. Then only ``device`` imports torch,
because scoring does not need it.
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
"""Longest wait for a process that still works. The wait ends at once if that process is lost."""
MEETING = timedelta(minutes=10)
"""Longest wait for a process that has not started: the machines of a cluster start at different times."""
SAID_AFTER = 10.0
"""Seconds of a meeting after which the missing processes are named."""

Item = TypeVar("Item")


class Rank(NamedTuple):
    """One of the processes that torchrun started, or the only process."""

    number: int
    """Number among the processes of all machines, from 0."""
    world: int
    """Number of processes on all machines."""
    local: int
    """Number among the processes of this machine."""

    @property
    def first(self) -> bool:
        """Whether this process writes and reports for all."""
        return self.number == 0

    @property
    def device(self) -> torch.device:
        """This process's GPU, which becomes CUDA's current device, or the CPU.

        Raises UserError if this machine has fewer GPUs than processes.
        """
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started process {self.local + 1} on this machine, which has {torch.cuda.device_count()} "
                "GPU(s): set --nproc-per-node to this number or a lower one"
            )
        device = torch.device("cuda", self.local)
        torch.cuda.set_device(device)
        return device

    @property
    def cores(self) -> int:
        """CPU cores for this process: an equal share of the machine's or container's cores."""
        cores = len(os.sched_getaffinity(0))
        with suppress(OSError, ValueError):  # "max 100000" without a limit
            quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
            cores = min(cores, -(-quota // period))
        processes = 1 if self.world == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, cores // processes)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return every ``world``-th item. Shares are disjoint if all processes give the same list."""
        return items[self.number :: self.world]

    def wait(self) -> None:
        """Return when all processes have called it."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """Return each process's (picklable) value in the order of ranks. All processes must call it."""
        if self.world == 1:
            return [value]
        from torch import distributed

        values = [None] * self.world
        distributed.all_gather_object(values, value, group=_on_cpu())
        return values

    def sum(self, counts: np.ndarray) -> np.ndarray:
        """Sum an array over the processes. All must call it, with the same shape and dtype."""
        if self.world == 1:
            return counts
        import torch

        total = torch.from_numpy(counts.copy())
        torch.distributed.all_reduce(total, group=_on_cpu())
        return total.numpy()


def announced() -> Rank:
    """Return this process's rank as the environment gives it, without a connection.

    Without WORLD_SIZE, or if it is 1, the other variables do not count: they may be left over from a job. Raises
    UserError for values that are no ranks.
    """
    found = {name: os.environ.get(name, default) for name, default in _ENVIRONMENT.items()}
    try:
        number, world, local = map(int, found.values())
    except ValueError:
        number = world = local = -1
    if world == 1:
        return Rank(0, 1, 0)
    if not 0 <= number < world or local < 0:
        words = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(
            f"the environment has {words}: expected whole numbers, and RANK from 0 to WORLD_SIZE - 1. Start with "
            "torchrun, or unset the three"
        )
    return Rank(number, world, local)


@functools.cache
def join() -> Rank:
    """Return this process's rank. The first call connects the processes: NCCL for GPU tensors, else Gloo."""
    rank = announced()
    if rank.world > 1:
        from torch import distributed

        backend = "nccl" if rank.device.type == "cuda" else "gloo"
        try:
            _Meeting(rank, backend).wait()
        except RuntimeError as error:
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                raise
            # torch 2.13's torchrun keeps its store across a restart, with the addresses of dead processes.
            raise UserError(
                f"the processes that torchrun restarted did not meet ({error}): start torchrun with "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment (docs/scaling.md, A lost worker)"
            ) from None
        atexit.register(distributed.destroy_process_group)
    return rank


def lost_another(error: BaseException) -> bool:
    """Return whether the error means that another process is gone while this one waited for it."""
    if not isinstance(error, RuntimeError) or announced().world == 1:
        return False
    from torch import distributed

    return isinstance(error, distributed.DistError) or ("gloo" in str(error) and "peer" in str(error))


def tell_torchrun(message: str, *, cause: bool = True) -> None:
    """Make torchrun end with the message, because torchrun prints its own lines after the lines of a process.

    torchrun gives each process a file for its error, and ends with the error of the earliest time, in whole seconds.
    ``cause`` is false for a process that ends because another one ended: its error must not be the earliest.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    details = {"py_callstack": message, "timestamp": str(int(time.time()) - cause)}
    with suppress(OSError):  # the message is printed already
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))


class _Meeting:
    """The processes' meeting, in a thread: torch's own wait cannot be interrupted and names no missing process."""

    def __init__(self, rank: Rank, backend: str) -> None:
        self.rank, self.backend = rank, backend
        self.missing: list[int] = [] if rank.first else [0]
        self.error: BaseException | None = None
        self.given_up = False
        self.address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        self.thread = threading.Thread(target=self._run, daemon=True)

    def wait(self) -> None:
        """Return when all processes have met. Signals work meanwhile. Raises UserError when MEETING is over."""
        start, announced = time.monotonic(), False
        self.thread.start()
        try:
            while self.thread.is_alive():
                self.thread.join(0.1)
                waited = time.monotonic() - start
                if waited > SAID_AFTER and not announced and self.missing:
                    print(f"Waiting for {self._who()}", file=sys.stderr, flush=True)
                    announced = True
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
            numbers = range(self.rank.world)
            while missing := [number for number in numbers if not store.check([f"here/{number}"])]:
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
        except distributed.DistNetworkError as error:  # no connection until MEETING was over
            self.error = UserError(f"{self._lost()}. torch says: {error}")
        except BaseException as error:
            self.error = error

    def _who(self) -> str:
        numbers = ", ".join(map(str, self.missing[:8])) + (", ..." if len(self.missing) > 8 else "")
        here = f"process {self.rank.number} is at {self.address}"
        return f"process {numbers or 'unknown'} of {self.rank.world}, numbered from 0; {here}"

    def _lost(self) -> str:
        return (
            f"after {MEETING.total_seconds() / 60:g} minutes still waiting for {self._who()} (MASTER_ADDR and "
            "MASTER_PORT). Read the output of the missing processes, and start all processes again"
        )


def _store(rank: Rank) -> Any:
    """Return the key-value store of all processes: torchrun's, or else one that process 0 holds."""
    from torch import distributed

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        meetings = distributed.rendezvous("env://", rank.number, rank.world, timeout=MEETING)  # type: ignore[attr-defined]
        store, *_ = next(meetings)
    else:
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError):
            raise UserError(
                f"WORLD_SIZE is {rank.world}, but MASTER_ADDR and MASTER_PORT do not say where the processes meet: set "
                "both, start with torchrun, or unset WORLD_SIZE"
            ) from None
        options = {"wait_for_workers": False, "multi_tenant": True}
        store = distributed.TCPStore(host, port, None, rank.first, MEETING, **options)  # type: ignore[attr-defined]
    store.set_timeout(TIMEOUT)
    return store


_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@functools.cache
def _on_cpu() -> Any:
    """Return the Gloo group: waiting in it does not occupy a GPU."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=TIMEOUT)
