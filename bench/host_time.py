"""Host time of a call of pixel_correlation's Triton backend, without a GPU: everything but the launches themselves.

Triton gets a driver that compiles for sm_90 and whose launcher does nothing, and CPU tensors of a few pixels stand for
a GPU's; all the rest (checks, choice of blocks, allocations, autograd, Triton's own work for a launch) is what a
program on a GPU runs. Left out are ``cuLaunchKernel`` (2 to 3 us each, not measured here) and what torch's CUDA
allocator takes more than its CPU one. "operators" is the same call through torch's custom operators, as under a
dispatch mode; "direct" is what a program without torch.compile gets. Before that there was one way, with tuning:
72 us forward and 211 us with backward where the goals were set, on an idle machine. Times are the processor's own,
but a busy neighbour in the same core or cache still makes them longer: compare rows of one run.

    python bench/host_time.py [--out FOLDER]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import arguments, folder, machine, print_table, write_json
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cpn_fast.kernels import launch, operators, pixel_correlation

CALLS, ROUNDS = 100, 15
GOALS = {"forward": 35.0, "forward + backward": 95.0}


class NoGpu:
    """A driver of Triton whose launches do nothing."""

    class utils:
        @staticmethod
        def load_binary(*_: Any) -> tuple[Any, ...]:
            return object(), 0, 0, 0, 1024

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def microseconds(run: Callable[[], object]) -> list[float]:
    """Of the processor, for a call in each round: other programs' work does not count."""
    for _ in range(CALLS):
        run()
    found = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for _ in range(CALLS):
            run()
        found.append((time.thread_time() - begin) / CALLS * 1e6)
    return found


def main() -> None:
    options = arguments(__doc__).parse_args()
    driver.set_active(NoGpu())  # type: ignore[arg-type]
    launch.INTERPRETED = True  # kernels take CPU tensors; Triton itself still compiles
    cam = torch.rand(1, 21, 4, 4, dtype=torch.float16)
    embedding = torch.randn(1, 192, 4, 4, dtype=torch.float16).to(memory_format=torch.channels_last)
    leaf, gradient = embedding.clone().requires_grad_(), torch.ones_like(cam)

    def forward() -> Tensor:
        return pixel_correlation(cam, embedding, backend="triton")

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(pixel_correlation(cam, leaf, backend="triton"), leaf, gradient)

    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    direct = operators._is_direct
    for way, condition in (("operators", lambda _: False), ("direct", direct)):
        operators._is_direct = condition
        for name, run in (("forward", forward), ("forward + backward", both)):
            found = microseconds(run)
            row = {"way": way, "pass": name, "us": statistics.median(found), "least us": min(found)}
            rows.append(row | {"goal us": GOALS[name]})
    described = machine(torch.device("cpu"))
    write_json(folder(options.out, torch.device("cpu")) / "host_time.json", described, rows)
    print_table(f"Host time of pixel_correlation (triton) on {described['device']}, launches left out", rows)


if __name__ == "__main__":
    main()
