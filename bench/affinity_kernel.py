"""Pixel correlation (PCM): eager, compiled eager, FlexAttention, tiled and Triton at training and inference sizes.

The passes are forward, and forward + backward with a constant CAM as in training. Times are of a call as a program
makes it and, on a GPU, of the device alone. TFLOP/s use the device's time if there is one. They count the useful work,
2 P^2 (D + C) forward and 2 P^2 (2 D + 2 C) backward per image of P pixels, not the work that a backend really does. "of
matmul" is the share of the dense rate measured in the same run. Errors are RMS of the difference from float64 over
float64's RMS, of the output (forward rows) and of the embedding's gradient (forward + backward rows), on at most 2
images of 28 x 28. On a GPU inputs are bfloat16 and everything runs. On a CPU they are float32, and only sizes run that
fit into a few minutes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import (
    arguments,
    folder,
    kernel_columns,
    kernel_time,
    machine,
    matmul_rate,
    peak_extra_bytes,
    plot_bars,
    print_table,
    write_json,
)
from torch import Tensor

from cpn_fast.kernels import eager, pixel_correlation

EPS = 1e-5
DEPTH, CLASSES = 192, 21
Op = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    name: str
    batch: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width


TRAINING = Size("training 12 x 56 x 56", 12, 56, 56)
INFERENCE = [
    Size(f"500 x 375 at {scale}", 2, h, w)
    for scale, h, w in ((0.5, 24, 32), (1.0, 47, 63), (1.5, 71, 94), (2.0, 94, 125))
]
FULL_HD = Size("1080p", 1, 135, 240)
ON_CPU = [Size("training 4 x 56 x 56", 4, 56, 56), INFERENCE[1], Size("95 x 125", 1, 95, 125)]


def flex(cam: Tensor, embedding: Tensor) -> Tensor:
    """FlexAttention with score_mod log(relu(s)), clamped because the logarithm's gradient at 0 is NaN."""
    from torch.nn.attention.flex_attention import flex_attention

    g = eager.unit_columns(embedding.flatten(2), EPS).mT.unsqueeze(1)
    value = torch.nn.functional.pad(cam.flatten(2).mT, (0, 32 - cam.shape[1])).unsqueeze(1).to(g.dtype)

    def log_relu(score: Tensor, *_: Tensor) -> Tensor:
        return torch.log(score.clamp_min(1e-12))

    out = flex_attention(g, g, value, score_mod=log_relu, scale=1.0)
    return out.squeeze(1).mT[:, : cam.shape[1]].reshape(cam.shape).to(cam.dtype)


def backends(device: torch.device) -> tuple[dict[str, Op], dict[str, str]]:
    """Return the backends that run here, and the reasons why others do not."""
    plain = functools.partial(pixel_correlation, backend="eager")
    ops: dict[str, Op] = {
        "compiled eager": torch.compile(plain, dynamic=False),
        "flex attention": torch.compile(flex, dynamic=False),
        "eager": plain,
        "tiled": functools.partial(pixel_correlation, backend="tiled"),
    }
    if device.type == "cuda":  # ours is first: if time runs out, it is there
        return {"triton": functools.partial(pixel_correlation, backend="triton"), **ops}, {}
    return ops, {
        "triton": "needs a GPU",
        "flex attention, forward + backward": "has no backward on a CPU",
        "12 x 56 x 56, 1080p and the other scales": "take more than a few minutes on a CPU",
    }


def data(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return a CAM in [0, 1], an embedding with similar neighbouring pixels, and an output gradient."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (size.batch, CLASSES, size.height, size.width)
    cam, gradient = (torch.rand(shape, device=device, generator=generator) for _ in range(2))
    coarse = torch.randn(size.batch, DEPTH, 8, 8, device=device, generator=generator)
    embedding = torch.nn.functional.interpolate(coarse, size=(size.height, size.width), mode="bilinear")
    return cam.to(dtype), embedding.to(dtype), gradient.to(dtype)


def step(op: Op, cam: Tensor, embedding: Tensor, gradient: Tensor) -> Tensor:
    """Run forward + backward, and return the embedding's gradient."""
    (d_embedding,) = torch.autograd.grad(op(cam, embedding), embedding, gradient)
    return d_embedding


def error(op: Op, device: torch.device, dtype: torch.dtype, backward: bool) -> float:
    cam, embedding, gradient = data(Size("", 2, 28, 28), device, dtype)
    results = []
    for run, wide in ((op, False), (functools.partial(pixel_correlation, backend="eager"), True)):
        tensors = [t.double() if wide else t for t in (cam, embedding, gradient)]
        leaf = tensors[1].detach().requires_grad_(backward)
        results.append(step(run, tensors[0], leaf, tensors[2]) if backward else run(tensors[0], leaf))
    result, exact = results
    return float((result.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def measure(
    name: str, op: Op, size: Size, device: torch.device, dtype: torch.dtype, backward: bool, rate: float
) -> dict[str, Any]:
    cam, embedding, gradient = data(size, device, dtype)
    embedding.requires_grad_(backward)
    if backward:
        run: Callable[[], object] = functools.partial(step, op, cam, embedding, gradient)
    else:
        run = functools.partial(op, cam, embedding)
    flops = 2 * size.batch * size.pixels**2 * (DEPTH + CLASSES) * (3 if backward else 1)
    row: dict[str, Any] = {"size": size.name, "pass": "forward + backward" if backward else "forward", "backend": name}
    try:
        row |= kernel_columns(run, device, budget=1 if device.type == "cuda" else 4)
        row["extra MiB"] = peak_extra_bytes(run, device) / 2**20
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return row | {"call ms": None}
    per_second = flops / (row[kernel_time(row)] / 1e3)
    return row | {
        "TFLOP/s": per_second / 1e12,
        "of matmul": per_second / rate,
        "error": error(op, device, dtype, backward),
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    device = options.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = [TRAINING, FULL_HD, *INFERENCE] if device.type == "cuda" else ON_CPU
    torch._dynamo.config.recompile_limit = 64  # every size, pass and dtype has its own graph
    ops, left_out = backends(device)
    rate = matmul_rate(device, dtype)
    described, target = machine(device), folder(options.out, device)
    rows: list[dict[str, Any]] = []
    save = functools.partial(
        write_json, target / "affinity_kernel.json", described, rows, matmul_tflops=rate / 1e12, left_out=left_out
    )
    for size, backward, (name, op) in itertools.product(sizes, (False, True), ops.items()):
        if backward and name == "flex attention" and device.type == "cpu":
            continue
        try:
            rows.append(measure(name, op, size, device, dtype, backward, rate))
        except Exception as problem:
            if name != "flex attention":
                raise
            # the peer's bug, not ours: its head sizes and backends differ between versions
            left_out[f"{name}, {size.name}, {'backward' if backward else 'forward'}"] = f"failed: {problem}"[:300]
        save(finished=False)
    save()
    print_table(f"pixel_correlation, {described['device']}, {dtype}, matmul {rate / 1e12:.3g} TFLOP/s", rows)
    for what, why in left_out.items():
        print(f"left out: {what}: {why}")
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["call ms"] is not None:
            groups.setdefault(f"{row['size']}\n{row['pass']}", {})[row["backend"]] = row[kernel_time(row)]
    unit = "ms of a call" if device.type == "cpu" else "ms of the device, or of a call that cannot be captured"
    plot_bars(target / "affinity_kernel.png", f"Pixel correlation, {described['device']}", unit, groups)


if __name__ == "__main__":
    main()
