"""Region pooling and region correlation (PRCM): eager, compiled eager, tiled and Triton, with and without backward.

GB/s count every input and output once (forward reads and writes them, and backward does so again with the gradients).
Errors are RMS of the difference from float64 over float64's RMS, the worst of the output and the gradients.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from timing import (
    arguments,
    folder,
    kernel_columns,
    kernel_time,
    machine,
    peak_extra_bytes,
    plot_bars,
    print_table,
    write_json,
)
from torch import Tensor

from cpn_fast.kernels import region_correlation, region_pooling

CLASSES, FEATURES, DEPTH = 21, 195, 192
SIZES = {"cpu": ((4, 56, 56), (1, 95, 125)), "cuda": ((12, 56, 56), (2, 94, 125), (1, 135, 240))}


def pooling(cam: Tensor, features: Tensor, *, backend: Any) -> Tensor:
    return region_pooling(cam, features, backend=backend)


def correlation(cam: Tensor, keys: Tensor, queries: Tensor, *, backend: Any) -> Tensor:
    return region_correlation(cam, keys, queries, scale=CLASSES**-0.5, backend=backend)


def step(op: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Return the output and the gradients of all inputs."""
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def forward(op: Callable[..., Tensor], constants: list[Tensor]) -> list[Tensor]:
    return [op(*constants)]


def worst_error(results: list[Tensor], exact: list[Tensor]) -> float:
    errors = [
        (r.double() - e).square().mean().sqrt() / e.square().mean().sqrt() for r, e in zip(results, exact, strict=True)
    ]
    return float(max(errors))


def main() -> None:
    options = arguments(__doc__).parse_args()
    device = options.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    names, left_out = ["eager", "compiled eager", "tiled"], {"triton": "needs a GPU"}
    if device.type == "cuda":  # ours is first: if time runs out, it is there
        names, left_out = ["triton", *names], {}
    described, target = machine(device), folder(options.out, device)
    rows: list[dict[str, Any]] = []
    save = functools.partial(write_json, target / "region_kernel.json", described, rows, left_out=left_out)
    for batch, height, width in SIZES[device.type]:
        for op, shapes in (
            (pooling, ((batch, CLASSES, height, width), (batch, FEATURES, height, width))),
            (
                correlation,
                ((batch, CLASSES, height, width), (batch, CLASSES, DEPTH), (batch, DEPTH, height, width)),
            ),
        ):
            generator = torch.Generator(device).manual_seed(0)
            values = [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes]
            leaves = [value.requires_grad_() for value in values]
            wide = [value.detach().double().requires_grad_() for value in values]
            gradient = torch.randn(op(*leaves, backend="eager").shape, device=device, generator=generator).to(dtype)
            exact = step(functools.partial(op, backend="eager"), wide, gradient.double())
            moved = sum(value.nbytes for value in values) + gradient.nbytes
            for name, backward in itertools.product(names, (False, True)):
                run: Callable[..., Tensor] = functools.partial(op, backend=name.removeprefix("compiled "))
                if name.startswith("compiled"):
                    run = torch.compile(run, dynamic=False)
                call: Callable[[], list[Tensor]] = functools.partial(step, run, leaves, gradient)
                if not backward:
                    constants = [leaf.detach() for leaf in leaves]
                    call = functools.partial(forward, run, constants)
                times = kernel_columns(call, device, budget=1 if device.type == "cuda" else 3)
                rows.append(
                    {
                        "size": f"{batch} x {height} x {width}",
                        "op": op.__name__,
                        "pass": "forward + backward" if backward else "forward",
                        "backend": name,
                        **times,
                        "extra MiB": peak_extra_bytes(call, device) / 2**20,
                        "GB/s": (2 if backward else 1) * moved / times[kernel_time(times)] / 1e6,
                        "error": worst_error(call(), exact if backward else exact[:1]),
                    }
                )
                save(finished=False)
    save()
    print_table(f"region ops, {described['device']}, {dtype}", rows)
    for what, why in left_out.items():
        print(f"left out: {what}: {why}")
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(f"{row['op']}, {row['size']}\n{row['pass']}", {})[row["backend"]] = row[kernel_time(row)]
    plot_bars(target / "region_kernel.png", f"Region ops, {described['device']}", "ms", groups)


if __name__ == "__main__":
    main()
