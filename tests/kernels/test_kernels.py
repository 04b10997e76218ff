"""Pixel correlation, region pooling and region correlation: tiled against eager, and promises of every backend."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.nn import functional as F

from cpn_fast import kernels

BACKENDS = ("eager", "tiled")
Op = Callable[..., Tensor]


def pixel(cam: Tensor, keys: Tensor, features: Tensor, backend: Any) -> Tensor:
    return kernels.pixel_correlation(cam, features, backend=backend)


def pooling(cam: Tensor, keys: Tensor, features: Tensor, backend: Any) -> Tensor:
    return kernels.region_pooling(cam, features, backend=backend)


def correlation(cam: Tensor, keys: Tensor, features: Tensor, backend: Any) -> Tensor:
    return kernels.region_correlation(cam, keys, features, scale=0.4, backend=backend)


OPS = (pixel, pooling, correlation)


def inputs(n: int, c: int, d: int, h: int, w: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + 2 * c + 3 * d + 5 * h + 7 * w)
    shapes = ((n, c, h, w), (n, c, d), (n, d, h, w))
    cam, keys, features = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(tensor.to(dtype).requires_grad_() for tensor in (cam, keys, features))  # type: ignore[return-value]


def results(op: Op, arguments: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    """Return the output and the gradients of all arguments that it depends on."""
    out = op(*arguments, backend)
    gradient = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, arguments, gradient, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the RMS of the error over the RMS of the reference."""
    difference = found.detach().double() - expected.detach().double()
    return float(difference.square().mean().sqrt() / expected.detach().double().square().mean().sqrt().clamp_min(1e-30))


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=15)
@given(
    n=st.integers(1, 3), c=st.integers(1, 6), d=st.integers(1, 9), h=st.integers(1, 40), w=st.integers(1, 40)
)  # fmt: skip
def test_tiled_equals_eager(op: Op, n: int, c: int, d: int, h: int, w: int) -> None:
    arguments = inputs(n, c, d, h, w)
    for found, expected in zip(results(op, arguments, "tiled"), results(op, arguments, "eager"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(op: Op, backend: str) -> None:
    arguments = inputs(2, 3, 4, 3, 5)
    assert gradcheck(lambda *a: op(*a, backend), arguments)


def test_pixel_correlation_is_the_printed_formula() -> None:
    cam, _, embedding = inputs(1, 2, 3, 2, 2)
    g = embedding[0].flatten(1) / (embedding[0].flatten(1).norm(dim=0) + 1e-5)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for j in range(4):
        column = torch.stack([(g[:, i] @ g[:, j]).clamp_min(0) for i in range(4)])
        expected[:, j] = (cam[0].flatten(1) * column / (column.sum() + 1e-5)).sum(dim=1)
    torch.testing.assert_close(kernels.pixel_correlation(cam, embedding)[0].flatten(1), expected)


def test_regions_are_the_printed_formulas() -> None:
    cam, keys, features = inputs(2, 3, 4, 3, 2)
    share = cam.flatten(2).softmax(dim=2)
    torch.testing.assert_close(
        kernels.region_pooling(cam, features), torch.einsum("ncp,ndp->ncd", share, features.flatten(2))
    )
    fit = torch.einsum("nce,nep->ncp", keys, features.flatten(2)).mul(0.3).softmax(dim=2)
    expected = (cam.flatten(2) * fit).view_as(cam)
    torch.testing.assert_close(kernels.region_correlation(cam, keys, features, scale=0.3), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pixel_without_embedding_gets_nothing_and_no_nan(backend: Any) -> None:
    cam, _, embedding = inputs(1, 2, 4, 3, 3)
    embedding = embedding.detach().clone()
    embedding[0, :, 1, 2] = 0
    embedding.requires_grad_()
    out = kernels.pixel_correlation(cam, embedding, backend=backend)
    out.sum().backward()
    assert torch.all(out[0, :, 1, 2] == 0)
    assert embedding.grad is not None
    assert torch.all(torch.isfinite(embedding.grad))


@pytest.mark.parametrize("op", OPS)
def test_constant_cam_gets_no_gradient(op: Op) -> None:
    cam, keys, features = inputs(1, 2, 3, 4, 4)
    out = op(cam.detach(), keys, features, "tiled")
    (found,) = torch.autograd.grad(out.sum(), features)
    (expected,) = torch.autograd.grad(op(cam, keys, features, "eager").sum(), features)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-2), (torch.float16, 2e-2)])
def test_error_against_float64_by_dtype(op: Op, dtype: torch.dtype, bound: float) -> None:
    rounded = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in inputs(2, 5, 24, 9, 11))
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in rounded)
    expected = results(op, exact, "eager")
    for backend in BACKENDS:
        for found, reference in zip(results(op, rounded, backend), expected, strict=True):
            assert found.isfinite().all()
            assert relative_error(found, reference) < bound, backend


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_callers_dtypes_and_float32_sums(op: Op, backend: str) -> None:
    arguments = inputs(1, 3, 8, 6, 7, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = op(*arguments, backend)
        grads = torch.autograd.grad(found.float().sum(), arguments, allow_unused=True)
    expected = op(*arguments, "eager")
    assert relative_error(found, expected) < 2e-2
    assert all(grad.dtype == torch.float32 for grad in grads if grad is not None)


@pytest.mark.parametrize("op", OPS)
def test_channels_last_inputs_give_the_same(op: Op) -> None:
    cam, keys, features = inputs(2, 3, 5, 4, 6)
    last = features.detach().to(memory_format=torch.channels_last).requires_grad_()
    expected = results(op, (cam, keys, features), "tiled")
    for found, reference in zip(results(op, (cam, keys, last), "tiled"), expected, strict=True):
        torch.testing.assert_close(found, reference)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(op: Op, backend: str) -> None:
    arguments = inputs(1, 2, 3, 4, 5, torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for found, expected in zip(results(compiled, arguments, backend), results(op, arguments, backend), strict=True):
        torch.testing.assert_close(found, expected)


def test_registered_operators_pass_opcheck() -> None:
    cam, keys, features = (t.detach().flatten(2).requires_grad_() for t in inputs(2, 3, 4, 3, 5, torch.float32))
    torch.library.opcheck(torch.ops.cpn_fast.pixel_correlation_tiled, (cam, features, 1e-5))
    torch.library.opcheck(torch.ops.cpn_fast.region_pooling_tiled, (cam, features))
    torch.library.opcheck(torch.ops.cpn_fast.region_correlation_tiled, (cam, keys, features, 0.3))


@settings(max_examples=20)
@given(h=st.integers(1, 9), w=st.integers(1, 9), height=st.integers(1, 40), width=st.integers(1, 40))
def test_pooled_logits_are_the_mean_of_the_upsampled_map(h: int, w: int, height: int, width: int) -> None:
    cam = torch.randn(2, 3, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h * w))
    expected = F.interpolate(cam, size=(height, width), mode="bilinear", align_corners=True).mean(dim=(2, 3))
    torch.testing.assert_close(kernels.pooled_logits(cam, size=(height, width)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cam": torch.zeros(1, 2, 3)}, "cam: expected four dimensions"),
        ({"embedding": torch.zeros(1, 2, 3, 5)}, "expected N, H and W of cam"),
        ({"embedding": torch.zeros(1, 0, 3, 4)}, "only the first may be 0"),
        ({"backend": "cuda"}, "expected one of"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"cam": torch.zeros(1, 2, 3, 4), "embedding": torch.zeros(1, 2, 3, 4)} | change
    with pytest.raises(ValueError, match=message):
        kernels.pixel_correlation(**arguments)  # type: ignore[arg-type]


def test_integer_maps_and_wrong_keys_are_refused() -> None:
    cam = torch.zeros(1, 2, 3, 4)
    with pytest.raises(TypeError, match="features: expected a floating dtype"):
        kernels.region_pooling(cam, torch.zeros(1, 2, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"keys: expected \(N, C, E\)"):
        kernels.region_correlation(cam, torch.zeros(1, 4, 2), torch.zeros(1, 4, 3, 4), scale=1.0)
    with pytest.raises(TypeError, match="scale: expected a number"):
        kernels.region_correlation(cam, torch.zeros(1, 4, 2), torch.zeros(1, 2, 3, 4), scale=torch.ones(()))  # type: ignore[arg-type]


OPERATIONS: Any = kernels  # calls with arguments of other types
MAPS = torch.zeros(1, 2, 3, 4)
LOSSES = (torch.zeros(3, 1, 2, 3, 4), None, torch.zeros(1), torch.zeros(1, 1))
IMAGES = torch.zeros(1, 3, 4, 4)
SLIC = {"count": 4, "compactness": 10.0, "iterations": 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: OPERATIONS.pixel_correlation(MAPS, MAPS.to(torch.float8_e4m3fn)),
            "embedding: expected a floating dtype",
        ),
        (lambda: OPERATIONS.region_pooling(MAPS.to(torch.float8_e4m3fn), MAPS), "cam: expected a floating dtype"),
        (lambda: OPERATIONS.pooled_logits(MAPS.to(torch.float8_e5m2), size=(3, 4)), "cam: expected a floating dtype"),
        (lambda: OPERATIONS.pixel_correlation(MAPS, MAPS, eps="a"), "eps: expected a number, found 'a'"),
        (lambda: OPERATIONS.pixel_correlation(MAPS, MAPS, eps=-1e-5), "eps: expected 0 or more, found -1e-05"),
        (
            lambda: OPERATIONS.pixel_correlation(MAPS, MAPS, eps=float("nan")),
            "eps: expected a finite number, found nan",
        ),
        (lambda: OPERATIONS.region_correlation(MAPS, MAPS[:, :, 0, :2], MAPS, scale=None), "scale: expected a number"),
        (
            lambda: OPERATIONS.complementary_losses(*LOSSES, size=11),
            r"size: expected \(H, W\), two whole numbers, found 11",
        ),
        (lambda: OPERATIONS.complementary_losses(*LOSSES, size=(11.0, 3)), r"size: .*, found \(11.0, 3\)"),
        (
            lambda: OPERATIONS.complementary_losses(*LOSSES, size=(11, 3), hard_share="x"),
            "hard_share: expected a number",
        ),
        (lambda: OPERATIONS.background_suppression(MAPS, torch.zeros(1, 1), size=(3,)), r"size: .* found \(3,\)"),
        (lambda: OPERATIONS.slic(IMAGES, **{**SLIC, "count": 4.0}), "count: expected a whole number, found 4.0"),
        (
            lambda: OPERATIONS.slic(IMAGES, **{**SLIC, "iterations": None}),
            "iterations: expected a whole number, found None",
        ),
        (lambda: OPERATIONS.slic(IMAGES, **{**SLIC, "compactness": "x"}), "compactness: expected a number, found 'x'"),
    ],
)
def test_an_argument_of_another_kind_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_triton_on_the_cpu_is_refused_with_the_way_out() -> None:
    pytest.importorskip("triton")
    from cpn_fast.kernels.launch import INTERPRETED

    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 lets it run")
    cam = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="needs tensors on CUDA, found cpu: use 'tiled'"):
        kernels.pixel_correlation(cam, cam, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_triton_replays_from_a_cuda_graph(op: Op) -> None:
    arguments = tuple(t.detach().cuda().requires_grad_() for t in inputs(2, 5, 48, 13, 17, torch.bfloat16))
    gradient = torch.ones_like(op(*arguments, "triton"))

    def run() -> list[Tensor]:
        out = op(*arguments, "triton")
        grads = torch.autograd.grad(out, arguments, gradient, allow_unused=True)
        return [out.detach(), *(grad for grad in grads if grad is not None)]

    expected = run()  # this call compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "dtypes", "precision", "expected"),
    [
        ((3, 192), (torch.float32, torch.bfloat16), "ieee", "triton"),
        ((3, 192), (torch.float32, torch.float32), "tf32", "triton"),
        ((3, 192), (torch.float32, torch.float32), "ieee", "tiled"),
        ((3, 192), (torch.float64, torch.bfloat16), "tf32", "tiled"),
        ((3, 192), (torch.float32, torch.float64), "tf32", "tiled"),
        ((3, 257), (torch.float32, torch.bfloat16), "tf32", "tiled"),
    ],
)
def test_the_best_backend_on_cuda_is_triton_where_it_fits_and_keeps_the_precision_asked_for(
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    precision: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(1, c, 2, 2, dtype=t, device="cuda") for c, t in zip(shape, dtypes, strict=True)]
    modules = kernels._PIXEL
    assert kernels._choose(modules, None, *tensors) is modules[expected]
    assert kernels._choose(modules, None, *(t.new_empty(t.shape, device="cpu") for t in tensors)) is modules["tiled"]
