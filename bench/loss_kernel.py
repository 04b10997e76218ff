"""The losses from small CAMs: eager at full resolution, compiled eager, tiled and Triton, with and without backward.

The losses are the released variant (both TCP terms, CPCR with OHEM, background suppression) on 20 classes. Images have
1.56 classes on average, as in VOC. In another batch every image has 4, so that the hardest errors must be selected.
Errors are against eager in float64: of the loss, and RMS over RMS of the refined maps' gradient.
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

from cpn_fast.kernels import background_suppression, complementary_losses

CLASSES = 20
VOC = (1, 2, 1, 1, 3, 1, 2, 1, 1, 2, 1, 1, 3, 1, 2, 2)  # present classes of successive images: 25 in 16


def data(counts: list[int], side: int, device: torch.device) -> list[Tensor]:
    """Return smooth random maps, lambdas and labels."""
    generator = torch.Generator().manual_seed(0)
    shape = (3 * len(counts), 1 + CLASSES, max(2, side // 4), max(2, side // 4))
    maps = []
    for _ in range(2):
        coarse = torch.randn(shape, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
        maps.append(fine.view(3, len(counts), 1 + CLASSES, side, side).to(device))
    labels = torch.zeros(len(counts), CLASSES)
    for row, count in zip(labels, counts, strict=True):
        row[torch.randperm(CLASSES, generator=generator)[:count]] = 1
    visible = torch.rand(len(counts), generator=generator)
    return [maps[0].requires_grad_(), maps[1].abs().requires_grad_(), visible.to(device), labels.to(device)]


def loss(cam: Tensor, refined: Tensor, visible: Tensor, labels: Tensor, *, size: int, backend: Any) -> Tensor:
    terms = complementary_losses(cam, refined, visible, labels, size=(size, size), backend=backend)
    suppression = background_suppression(refined[0], labels, size=(size, size), backend=backend)
    return terms.tcp + terms.tcp_refined + terms.cpcr + suppression


def step(run: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss and the refined maps' gradient. The raw maps' gradient is computed too."""
    value = run(*tensors)
    return value.detach(), torch.autograd.grad(value, tensors[:2])[1]


def errors(result: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    difference = (result[1].double() - exact[1]).square().mean().sqrt() / exact[1].square().mean().sqrt()
    return float((result[0].double() - exact[0]).abs() / exact[0].abs()), float(difference)


def main() -> None:
    options = arguments(__doc__).parse_args()
    device = options.device
    if device.type == "cuda":
        names = ["triton", "eager", "compiled eager", "tiled"]  # if time runs out, ours is there
        cases = [("12 x 56 -> 448", list(VOC[:12]), 56, 448), ("12 x 56 -> 448, 4 classes", [4] * 12, 56, 448)]
        left_out = {}
    else:
        names = ["eager", "tiled"]
        cases = [
            ("4 x 29 -> 225", list(VOC[:4]), 29, 225),
            ("4 x 29 -> 225, 4 classes", [4] * 4, 29, 225),
            ("2 x 56 -> 448", list(VOC[:2]), 56, 448),
        ]
        left_out = {"triton": "needs a GPU", "compiled eager, batch 12": "take more than a few minutes on a CPU"}
    described, target = machine(device), folder(options.out, device)
    rows: list[dict[str, Any]] = []
    save = functools.partial(write_json, target / "loss_kernel.json", described, rows, left_out=left_out)
    for title, counts, side, size in cases:
        tensors = data(counts, side, device)
        reference = functools.partial(loss, size=size, backend="eager")
        small = [tensors[0][:, :2], tensors[1][:, :2], tensors[2][:2], tensors[3][:2]]
        small = [t.detach().requires_grad_(i < 2) for i, t in enumerate(small)]
        exact = step(reference, [t.detach().double().requires_grad_(i < 2) for i, t in enumerate(small)])
        for name, backward in itertools.product(names, (False, True)):
            run: Callable[..., Tensor] = functools.partial(loss, size=size, backend=name.removeprefix("compiled "))
            if name.startswith("compiled"):
                run = torch.compile(run, dynamic=False)
            call: Callable[[], object] = functools.partial(step, run, tensors)
            if not backward:
                call = functools.partial(run, *(tensor.detach() for tensor in tensors))
            times = kernel_columns(call, device, budget=1 if device.type == "cuda" else 6)
            of_loss, of_gradient = errors(step(run, small), exact)
            rows.append(
                {
                    "case": title,
                    "pass": "forward + backward" if backward else "forward",
                    "backend": name,
                    **times,
                    "extra MiB": peak_extra_bytes(call, device) / 2**20,
                    "loss error": of_loss,
                    "gradient error": of_gradient,
                }
            )
            save(finished=False)
    save()
    print_table(f"losses, {described['device']}", rows)
    for what, why in left_out.items():
        print(f"left out: {what}: {why}")
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(f"{row['case']}\n{row['pass']}", {})[row["backend"]] = row[kernel_time(row)]
    plot_bars(target / "loss_kernel.png", f"Losses, {described['device']}", "ms", groups)


if __name__ == "__main__":
    main()
