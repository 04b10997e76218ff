"""Which of torchrun's processes this is, what its share is, and how the processes agree.

Without torchrun there is one process, which has everything and waits for nobody.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import distributed

from cpn_fast.errors import UserError

TIMEOUT = timedelta(hours=2)
"""The longest that processes wait for one that is still at work. A lost one ends the wait at once."""

Item = TypeVar("Item")


class Rank(NamedTuple):
    number: int
    world: int
    """How many processes there are, on all machines."""
    device: torch.device
    """A GPU of this process's own, or the CPU."""

    @property
    def first(self) -> bool:
        """Whether this process writes and reports for all."""
        return self.number == 0

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
        values = [None] * self.world
        distributed.all_gather_object(values, value, group=_on_cpu())
        return values

    def sum(self, counts: np.ndarray) -> np.ndarray:
        """Sum over the processes of an array that has one shape and dtype in all; all must call it."""
        if self.world == 1:
            return counts
        total = torch.from_numpy(counts.copy())
        distributed.all_reduce(total, group=_on_cpu())
        return total.numpy()


@functools.cache
def join() -> Rank:
    """This process's rank; the first call meets the other processes (NCCL for GPUs, Gloo for the CPU).

    Raises UserError when torchrun started more processes here than there are GPUs.
    """
    number, world, local = (int(os.environ.get(name, alone)) for name, alone in _ENVIRONMENT.items())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started process {local + 1} on this machine, which has {torch.cuda.device_count()} GPU(s): "
                f"give --nproc-per-node={torch.cuda.device_count()} or less"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        _on_cpu()
        atexit.register(distributed.destroy_process_group)
    return Rank(number, world, device)


_ENVIRONMENT = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


@functools.cache
def _on_cpu() -> Any:
    """The Gloo group, in which waiting occupies no GPU."""
    return distributed.new_group(backend="gloo", timeout=TIMEOUT)
