"""Host time of a call of each operation's Triton backend, without a GPU: everything except the launches themselves.

Triton gets a driver that compiles for sm_90 and whose launcher does nothing. CPU tensors of a few pixels replace GPU
tensors. Everything else (checks, choice of blocks, allocations, autograd, Triton's own work for a launch) is the same
as on a GPU. The times do not include ``cuLaunchKernel`` (2 to 3 us each, not measured here) and the extra time of
torch's CUDA allocator over its CPU allocator. Tensors are float32, which has the same calls as bfloat16; float16 has
more in backward, to keep gradients in range. "operators" is a call through torch's custom operators, as under a
dispatch mode; "direct" is the call of a program without torch.compile. The goals were set on an idle machine, when the
only way, with autotuning, took 72 us forward and 211 us with backward for pixel_correlation. Times are CPU time, but a
busy neighbour on the same core or cache still makes them longer: compare rows of one run.

    python bench/host_time.py [--out FOLDER]
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import arguments, folder, machine, print_table, write_json
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cpn_fast.kernels import (
    background_suppression,
    complementary_losses,
    launch,
    operators,
    pixel_correlation,
    region_correlation,
    region_pooling,
)

CALLS, ROUNDS = 100, 15
GOALS = {"forward": 35.0, "forward + backward": 95.0}


class NoGpu:
    """A Triton driver whose launches do nothing."""

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
    """Return the CPU time of a call in each round. The time of other programs does not count."""
    for _ in range(CALLS):
        run()
    rounds = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for _ in range(CALLS):
            run()
        rounds.append((time.thread_time() - begin) / CALLS * 1e6)
    return rounds


def calls() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Return each operation as CPN calls it, and the tensors that get gradients."""
    shape = (2, 21, 4, 4)
    cam = torch.rand(shape)
    features = torch.randn(2, 192, 4, 4).to(memory_format=torch.channels_last)
    keys = torch.randn(2, 21, 192)
    maps = [torch.randn(3, *shape) for _ in range(2)]
    visible, labels = torch.rand(2), torch.zeros(2, 20).index_fill_(1, torch.tensor([3]), 1)

    def losses(raw: Tensor, refined: Tensor) -> Tensor:
        terms = complementary_losses(raw, refined, visible, labels, size=(8, 8), backend="triton")
        return terms.tcp + terms.tcp_refined + terms.cpcr

    return {
        "pixel_correlation": (lambda embedding: pixel_correlation(cam, embedding, backend="triton"), [features]),
        "region_pooling": (functools.partial(region_pooling, backend="triton"), [cam, features]),
        "region_correlation": (
            functools.partial(region_correlation, scale=0.2, backend="triton"),
            [cam, keys, features],
        ),
        "complementary_losses and their sum": (losses, maps),
        "background_suppression": (
            lambda refined: background_suppression(refined, labels, size=(8, 8), backend="triton"),
            [maps[1][0]],
        ),
    }


def with_backward(run: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor) -> object:
    return torch.autograd.grad(run(*leaves), leaves, gradient)


def main() -> None:
    options = arguments(__doc__).parse_args()
    driver.set_active(NoGpu())
    launch.INTERPRETED = True  # so kernels accept CPU tensors; Triton itself still compiles
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    direct = operators._is_direct
    for name, (run, tensors) in calls().items():
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        gradient = torch.ones_like(run(*tensors))
        passes: dict[str, Callable[[], object]] = {
            "forward": functools.partial(run, *tensors),
            "forward + backward": functools.partial(with_backward, run, leaves, gradient),
        }
        for (way, condition), (kind, call) in itertools.product(
            (("operators", lambda _: False), ("direct", direct)), passes.items()
        ):
            operators._is_direct = condition
            times = microseconds(call)
            row = {"operation": name, "way": way, "pass": kind, "us": statistics.median(times), "least us": min(times)}
            rows.append(row | {"goal us": GOALS[kind] if name == "pixel_correlation" else None})
    described = machine(torch.device("cpu"))
    write_json(folder(options.out, torch.device("cpu")) / "host_time.json", described, rows)
    print_table(f"Host time of a call (triton) on {described['device']}, launches left out", rows)


if __name__ == "__main__":
    main()
