"""Every operation and backend works where torch's operators do: torch.func, forward mode, graphs, odd tensors.

With TRITON_INTERPRET=1 (tests/kernels/every_kernel.py) the same tests run the Triton backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.testing import assert_close

from cpn_fast import kernels

try:
    from cpn_fast.kernels.launch import INTERPRETED
except ImportError:
    INTERPRETED = False

BACKENDS: tuple[Any, ...] = ("triton",) if INTERPRETED else ("eager", "tiled", None)
DTYPE = torch.float32 if INTERPRETED else torch.float64
close = functools.partial(assert_close, rtol=1e-3, atol=1e-4) if INTERPRETED else assert_close
N, C, D, H, W = (1, 2, 4, 3, 5) if INTERPRETED else (2, 3, 4, 3, 5)  # a class fewer halves the interpreter's time
SIZE = (5, 7)
Op = Callable[..., Tensor]


def pixel(cam: Tensor, embedding: Tensor, backend: Any) -> Tensor:
    return kernels.pixel_correlation(cam, embedding, backend=backend)


def pooling(cam: Tensor, features: Tensor, backend: Any) -> Tensor:
    return kernels.region_pooling(cam, features, backend=backend)


def correlation(cam: Tensor, keys: Tensor, queries: Tensor, backend: Any) -> Tensor:
    return kernels.region_correlation(cam, keys, queries, scale=0.4, backend=backend)


def losses(cam: Tensor, refined: Tensor, backend: Any) -> Tensor:
    """Return the losses of maps with images as the first axis, as in the other operations."""
    labels = (torch.arange(C - 1) < 2).to(cam.device, cam.dtype).expand(len(cam), -1)
    visible = torch.full((len(cam),), 0.3, dtype=cam.dtype, device=cam.device)
    found = kernels.complementary_losses(
        cam.transpose(0, 1), refined.transpose(0, 1), visible, labels, size=SIZE, backend=backend,
        hard_share=1.0 if INTERPRETED else 0.2,  # selection is slow in the interpreter; every_kernel.py tests it
    )  # fmt: skip
    return torch.stack(found)


def suppression(refined: Tensor, backend: Any) -> Tensor:
    labels = torch.ones(len(refined), C - 1, dtype=refined.dtype, device=refined.device)
    return kernels.background_suppression(refined, labels, size=SIZE, backend=backend)


def logits(cam: Tensor, backend: Any) -> Tensor:
    return kernels.pooled_logits(cam, size=SIZE)


SHAPES: dict[Op, tuple[tuple[int, ...], ...]] = {
    pixel: ((N, C, H, W), (N, D, H, W)),
    pooling: ((N, C, H, W), (N, D, H, W)),
    correlation: ((N, C, H, W), (N, C, D), (N, D, H, W)),
    losses: ((N, 3, C, H, W), (N, 3, C, H, W)),
    suppression: ((N, C, H, W),),
    logits: ((N, C, H, W),),
}
ONCE = {
    pixel: "pixel_correlation",
    pooling: "region_pooling",
    correlation: "region_correlation",
    losses: "complementary_losses",
    suppression: "background_suppression",
}
"""Names of operations that are differentiable only once, except in eager."""


def chosen(op: Op, backend: Any) -> str:
    """Return the backend that None means on a CPU."""
    return backend or ("eager" if op in (pooling, correlation) else "tiled")


every_op = pytest.mark.parametrize("op", SHAPES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def inputs(op: Op, seed: int = 0, dtype: torch.dtype = DTYPE) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES[op])


def gradients(op: Op, arguments: tuple[Tensor, ...], backend: Any) -> list[Tensor | None]:
    """Return gradients of the sum of sines for the arguments that require one, and None for the others."""
    leaves = [a for a in arguments if a.requires_grad]
    found = iter(torch.autograd.grad(op(*arguments, backend).sin().sum(), leaves))
    return [next(found) if a.requires_grad else None for a in arguments]


def exact(op: Op, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """Return eager's gradients in float64."""
    leaves = tuple(a.detach().double().requires_grad_() for a in arguments)
    return [g.to(DTYPE) for g in gradients(op, leaves, "eager") if g is not None]


@every_op
@every_backend
def test_jvp_is_the_slope_by_finite_differences(op: Op, backend: Any) -> None:
    points, directions = inputs(op), inputs(op, 1)
    if op is losses:  # differences do not see stopped gradients, so reverse mode
        rows = torch.autograd.functional.jacobian(lambda *a: op(*a, "eager"), tuple(p.double() for p in points))
        slope = sum((row * d.double()).flatten(1).sum(dim=1) for row, d in zip(rows, directions, strict=True))
    else:
        slope = (moved(op, points, directions, 1e-6) - moved(op, points, directions, -1e-6)) / 2e-6
    value, tangent, *_ = torch.func.jvp(lambda *a: op(*a, backend), points, directions)
    close(value, moved(op, points, directions, 0).to(DTYPE))
    assert_close(tangent.double(), slope, rtol=1e-2 if INTERPRETED else 1e-4, atol=1e-3 if INTERPRETED else 1e-6)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, d) for p, d in zip(points, directions, strict=True)]
        assert_close(forward_ad.unpack_dual(op(*duals, backend)).tangent, tangent)


def moved(op: Op, points: tuple[Tensor, ...], directions: tuple[Tensor, ...], step: float) -> Tensor:
    return op(*(p.double() + step * d.double() for p, d in zip(points, directions, strict=True)), "eager")


@every_op
@every_backend
def test_grad_and_vjp_of_torch_func(op: Op, backend: Any) -> None:
    points = inputs(op)
    places = tuple(range(len(points)))
    expected = exact(op, points)
    for found, reference in zip(
        torch.func.grad(lambda *a: op(*a, backend).sin().sum(), argnums=places)(*points), expected, strict=True
    ):
        close(found, reference)
    value, pull, *_ = torch.func.vjp(lambda *a: op(*a, backend), *points)
    for found, reference in zip(pull(value.cos()), expected, strict=True):
        close(found, reference)


@every_op
@every_backend
def test_vmap_is_a_loop(op: Op, backend: Any) -> None:
    stacked = [torch.stack(pair) for pair in zip(inputs(op), inputs(op, 1), strict=True)]
    found = torch.func.vmap(lambda *a: op(*a, backend))(*stacked)
    close(found, torch.stack([op(*inputs(op, seed), backend) for seed in (0, 1)]))


@every_op
@every_backend
def test_functional_call_with_its_gradient(op: Op, backend: Any) -> None:
    first, *rest = inputs(op)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones((), dtype=DTYPE))

        def forward(self, tensor: Tensor) -> Tensor:
            return op(self.factor * tensor, *rest, backend)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(Scaled(), parameters, (first,)).sin().sum()

    factor = torch.tensor(1.5, dtype=DTYPE, requires_grad=True)
    (plain,) = torch.autograd.grad(loss({"factor": factor}), factor)
    close(torch.func.grad(loss)({"factor": factor})["factor"], plain)


@every_op
@every_backend
def test_batched_gradients_are_right_or_say_what_to_do(op: Op, backend: Any) -> None:
    points = tuple(p.requires_grad_() for p in inputs(op))
    out = op(*points, backend)
    directions = torch.stack([out.detach().sin(), out.detach().cos()])
    expected = [torch.autograd.grad(out, points, direction, retain_graph=True) for direction in directions]
    found, said = None, ""
    try:
        found = torch.autograd.grad(out, points, directions, is_grads_batched=True)
    except RuntimeError as error:
        said = str(error)
    if found is None:
        assert chosen(op, backend) != "eager"
        assert f"{ONCE[op]}: backend {chosen(op, backend)!r} has no batched gradients: use 'eager'" in said
    else:
        for each, of_each in zip(found, zip(*expected, strict=True), strict=True):
            close(each, torch.stack(of_each))


@every_op
@every_backend
def test_the_default_dtype_does_not_matter(op: Op, backend: Any) -> None:
    points = tuple(p.requires_grad_() for p in inputs(op, dtype=torch.float32))
    expected = [op(*points, backend), *gradients(op, points, backend)]
    try:
        torch.set_default_dtype(torch.float16)
        found = [op(*points, backend), *gradients(op, points, backend)]
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, reference in zip(found, expected, strict=True):
        assert mine is not None
        assert_close(mine, reference, rtol=0, atol=0)


@every_op
@every_backend
def test_a_second_derivative_is_right_or_says_what_to_do(op: Op, backend: Any) -> None:
    def first(backend: Any, *arguments: Tensor) -> Tensor:
        grads = torch.autograd.grad(op(*arguments, backend).sin().sum(), arguments, create_graph=True)
        return sum(g.square().sum() for g in grads)  # type: ignore[return-value]

    leaves = tuple(a.requires_grad_() for a in inputs(op))
    norm = first(backend, *leaves)
    if op is logits or chosen(op, backend) == "eager":
        expected = torch.autograd.grad(first("eager", *leaves), leaves)
        for found, reference in zip(torch.autograd.grad(norm, leaves), expected, strict=True):
            close(found, reference)
    elif op in ONCE:
        with pytest.raises(RuntimeError, match=f"{ONCE[op]}: backend .* is differentiable once: use 'eager'"):
            torch.autograd.grad(norm, leaves)


@every_op
@every_backend
def test_meta_tensors_have_the_shape_and_the_backward_pass(op: Op, backend: Any) -> None:
    expected = op(*inputs(op), backend)
    for enabled in (False, True):
        leaves = tuple(a.to("meta").requires_grad_() for a in inputs(op))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = op(*leaves, backend)
            assert (found.device.type, found.shape, found.dtype) == ("meta", expected.shape, expected.dtype)
            grads = torch.autograd.grad(found.sum(), leaves)
        assert [(g.shape, g.dtype) for g in grads] == [(leaf.shape, leaf.dtype) for leaf in leaves]


@every_op
@every_backend
def test_an_empty_batch_has_empty_results_and_gradients(op: Op, backend: Any) -> None:
    full = op(*inputs(op), backend)
    leaves = tuple(a[:0].requires_grad_() for a in inputs(op))
    found = op(*leaves, backend)
    assert found.shape == ((0, *full.shape[1:]) if op in (pixel, pooling, correlation, logits) else full.shape)
    assert [g.shape for g in torch.autograd.grad(found.sum(), leaves)] == [leaf.shape for leaf in leaves]


@every_op
@every_backend
def test_strides_do_not_matter(op: Op, backend: Any) -> None:
    plain = inputs(op)
    turned = [a.transpose(0, -1).contiguous().transpose(0, -1) for a in plain]
    shifted = [torch.cat([a.flatten()[:1], a.flatten()])[1:].view(a.shape) for a in plain]
    gaps = [torch.stack([a, a], dim=-1)[..., 0] for a in plain]
    for changed in (turned,) if INTERPRETED and op is losses else (turned, shifted, gaps):
        for found, reference in zip(
            gradients(op, tuple(a.requires_grad_() for a in changed), backend), exact(op, plain), strict=True
        ):
            assert found is not None
            close(found, reference)


@every_op
@every_backend
def test_expanded_inputs_and_gradients(op: Op, backend: Any) -> None:
    rows = tuple(a[:1, ..., :1].requires_grad_() for a in inputs(op))

    def run(backend: Any, *rows: Tensor) -> tuple[Tensor, ...]:
        shapes = ((2, *shape[1:]) for shape in SHAPES[op])
        out = op(*(a.expand(shape) for a, shape in zip(rows, shapes, strict=True)), backend)
        return torch.autograd.grad(out, rows, torch.ones((), dtype=out.dtype).expand(out.shape))

    expected = run("eager", *(a.detach().double().requires_grad_() for a in rows))
    for found, reference in zip(run(backend, *rows), expected, strict=True):
        close(found, reference.to(DTYPE))


@every_op
@every_backend
def test_any_subset_of_inputs_may_require_a_gradient(op: Op, backend: Any) -> None:
    plain = inputs(op)
    expected = exact(op, plain)
    for subset in range(1, 2 ** len(plain)):
        wanted = [bool(subset >> i & 1) for i in range(len(plain))]
        leaves = tuple(a.clone().requires_grad_(want) for a, want in zip(plain, wanted, strict=True))
        found = gradients(op, leaves, backend)
        for gradient, reference, want in zip(found, expected, wanted, strict=True):
            assert (gradient is not None) == want
            if gradient is not None:
                close(gradient, reference)


@every_op
@every_backend
def test_no_gradient_is_wanted(op: Op, backend: Any) -> None:
    expected = op(*inputs(op), backend)
    assert not expected.requires_grad
    with torch.no_grad():
        close(op(*(a.requires_grad_() for a in inputs(op)), backend), expected)
    with torch.inference_mode():
        close(op(*inputs(op), backend), expected)


@every_op
@every_backend
def test_a_compiled_graph_holds_the_operator_and_its_backward(op: Op, backend: Any) -> None:
    if op not in ONCE:
        pytest.skip("is not an operator")
    graphs: list[set[str]] = []

    def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
        names = (str(node.target).split(".") for node in module.graph.nodes)
        graphs.append({name[1] for name in names if name[0] == "cpn_fast"})
        return module

    leaves = tuple(a.requires_grad_() for a in inputs(op))
    torch._dynamo.reset()
    run = torch.compile(op, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=compiler))
    found = torch.autograd.grad(run(*leaves, backend).sin().sum(), leaves)
    operator = f"{ONCE[op]}_{chosen(op, backend)}"
    backward = set() if op in (losses, suppression) else {f"{operator}_backward"}  # the compiler fuses their backward
    assert graphs == ([set(), set()] if chosen(op, backend) == "eager" else [{operator}, backward])
    for gradient, reference in zip(found, exact(op, leaves), strict=True):
        close(gradient, reference)
