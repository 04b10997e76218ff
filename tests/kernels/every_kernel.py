"""Every Triton kernel and gradient against eager float64. test_kernels_triton.py runs this file.

With TRITON_INTERPRET=1 the kernels run in Triton's interpreter on the CPU, without it they run on a GPU. All memory
that the package allocates starts as NaN, so that a partial write cannot pass. The tests undo three differences of the
interpreter from a GPU: it truncates float32 to bfloat16 instead of rounding, it multiplies TF32 in full float32, and
its maximum keeps NaN, where a GPU takes the other number (conftest.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from test_compiled_graphs import LOSSES, REFINED, check_graphs
from torch import Tensor
from triton.runtime import interpreter

from cpn_fast import config_file, kernels
from cpn_fast.kernels import launch, pixel_triton, region_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
TF32, TF32_GRADIENT = 4e-3, 5e-2
"""Bounds of the error of float32 on a GPU, as a share of the exact result's RMS. A product near 0 may change its sign,
and with it the ReLU's gradient: an error of 3 % in ``test_every_block_of_the_tables``, on a GPU as with cut operands in
the interpreter."""
few = settings(
    max_examples=6,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _memory_starts_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            tensor = allocate(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))


@pytest.fixture(autouse=True)
def _bfloat16_is_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = interpreter._convert_float

    def rounded(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
        return values.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop the lowest 13 bits of float32 operands in products, as tensor cores do."""
    dot = interpreter.InterpreterBuilder.create_dot

    def cut(operand: Any) -> Any:
        bits = np.ascontiguousarray(operand.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), operand.dtype)

    def create_dot(self: object, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if a.data.dtype == np.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = cut(a), cut(b)
        return dot(self, a, b, d, precision, imprecise)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def rms_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).square().mean().sqrt())


def assert_close(name: str, found: Tensor, exact: Tensor, bound: float) -> None:
    """Bound the RMS of the error over the RMS of the float64 result."""
    assert found.isfinite().all(), f"{name} is not finite"
    scale = float(exact.double().square().mean().sqrt())
    assert rms_error(found, exact) <= bound * scale + 1e-9, (
        f"{name}: error {rms_error(found, exact):.2e} of {scale:.2e}"
    )


def results(op: Callable[..., Tensor], arguments: list[Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Return output and gradients."""
    leaves = [t.detach().to(dtype).clone().requires_grad_() for t in arguments]
    out = op(*leaves, backend=backend)
    gradient = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def assert_matches(op: Callable[..., Tensor], arguments: list[Tensor]) -> None:
    """Bound the error of output and gradients by 4 times plain PyTorch's in the same dtype, plus one rounding."""
    dtype = arguments[0].dtype
    found_plain_exact = zip(
        results(op, arguments, dtype, "triton"),
        results(op, arguments, dtype, "eager"),
        results(op, arguments, torch.float64, "eager"),
        strict=True,
    )
    for index, (found, plain, exact) in enumerate(found_plain_exact):
        name = f"gradient {index}" if index else "output"
        assert found.isfinite().all(), f"{name} is not finite"
        rounding = allowed_error(dtype, torch.finfo(dtype).eps, TF32_GRADIENT if index else TF32)
        allowed = 4 * rms_error(plain, exact) + rounding * max(1e-2, float(exact.square().mean().sqrt()))
        assert rms_error(found, exact) <= allowed, f"{name}: error {rms_error(found, exact):.2e}, allowed {allowed:.2e}"


def allowed_error(dtype: torch.dtype, usual: float, in_tf32: float) -> float:
    """Return ``in_tf32`` for products of float32 on a GPU, else ``usual``. The interpreter has full float32."""
    return in_tf32 if dtype == torch.float32 and not launch.INTERPRETED else usual


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


shapes = {
    "n": st.integers(1, 2), "c": st.integers(1, 24), "d": st.integers(1, 100), "h": st.integers(1, 13),
    "w": st.integers(1, 13), "dtype": st.sampled_from(DTYPES), "channels_last": st.booleans(),
}  # fmt: skip


def tensors(n: int, c: int, d: int, h: int, w: int, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    cam, keys, features = random(n, c, h, w).to(dtype), random(n, c, d, seed=1).to(dtype), random(n, d, h, w).to(dtype)
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    return [cam, keys, features]


@few
@given(**shapes)
def test_pixel_correlation(**shape: Any) -> None:
    cam, _, embedding = tensors(**shape)
    assert_matches(kernels.pixel_correlation, [cam, embedding])


def test_an_epsilon_of_0_reaches_only_what_has_no_length() -> None:
    """The pixels of the padding have no length either."""
    cam, embedding = random(1, 3, 5, 7).float(), random(1, 8, 5, 7).float()
    assert_matches(functools.partial(kernels.pixel_correlation, eps=0.0), [cam, embedding])


@few
@given(**shapes)
def test_region_pooling(**shape: Any) -> None:
    cam, _, features = tensors(**shape)
    assert_matches(kernels.region_pooling, [cam, features])


@few
@given(**shapes)
def test_region_correlation(**shape: Any) -> None:
    assert_matches(correlation, tensors(**shape))


def correlation(*leaves: Tensor, backend: Any) -> Tensor:
    return kernels.region_correlation(*leaves, scale=0.2, backend=backend)


@pytest.mark.parametrize("depth", [192, 193])
def test_chunks_of_channels(depth: int) -> None:
    cam, _, embedding = tensors(1, 21, depth, 5, 13, torch.float32, True)
    assert_matches(kernels.pixel_correlation, [cam, embedding])


def blocks(table: launch.Table) -> set[tuple[int, int, bool]]:
    """Return the distinct blocks of a table. Warps and stages do not matter to the interpreter."""
    return {(entry.targets, entry.sources, entry.resident) for entry in table.values()}


@pytest.mark.parametrize(
    ("table", "block"),
    [(name, block) for name in ("FORWARD", "BACKWARD") for block in sorted(blocks(getattr(pixel_triton, name)))],
    ids=str,
)
def test_every_block_of_the_tables(table: str, block: tuple[int, int, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    entries = getattr(pixel_triton, table)
    monkeypatch.setattr(pixel_triton, table, dict.fromkeys(entries, launch.Blocks(*block, 4, 2)))
    pixel_triton._options.cache_clear()
    cam, _, embedding = tensors(1, 3, 67, 5, 13, torch.float32, False)
    assert_matches(kernels.pixel_correlation, [cam, embedding])
    pixel_triton._options.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["cam", "embedding", "gradient"])
def test_a_nan_reaches_all_that_eager_gives_it(dtype: torch.dtype, where: str) -> None:
    cam, _, embedding = tensors(2, 3, 20, 3, 5, dtype, False)
    gradient = torch.ones_like(cam)
    {"cam": cam, "embedding": embedding, "gradient": gradient}[where][1, 2, 1, 1] = float("nan")
    found, expected = (
        [t.isnan() for t in (out, *torch.autograd.grad(out, leaves, gradient))]
        for leaves in [(cam.requires_grad_(), embedding.requires_grad_())]
        for out in (kernels.pixel_correlation(*leaves, backend=backend) for backend in ("triton", "eager"))
    )
    for mine, reference in zip(found, expected, strict=True):
        assert (mine | ~reference).all()
        assert mine[0].any() == reference[0].any()  # and the other image is unchanged


def test_groups_of_classes() -> None:
    cam, keys, features = tensors(1, 140, 20, 3, 5, torch.float32, False)
    assert_matches(kernels.pixel_correlation, [cam, features])
    assert_matches(kernels.region_pooling, [cam, features])
    assert_matches(correlation, [cam, keys, features])


def test_more_features_than_one_program_joins() -> None:
    cam, _, features = tensors(1, 2, 300, 3, 5, torch.float32, False)
    assert_matches(kernels.region_pooling, [cam, features])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 4e-3), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("op", [kernels.pixel_correlation, kernels.region_pooling, correlation])
def test_error_against_float64_by_dtype(
    op: Callable[..., Tensor], dtype: torch.dtype, bound: float, tf32: None
) -> None:
    cam, keys, features = tensors(2, 5, 24, 9, 11, dtype, False)
    arguments = [cam, keys, features] if op is correlation else [cam, features]
    found_exact = zip(
        results(op, arguments, dtype, "triton"), results(op, arguments, torch.float64, "eager"), strict=True
    )
    for index, (found, exact) in enumerate(found_exact):
        assert_close(f"gradient {index}" if index else "output", found, exact, bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_without_embedding(dtype: torch.dtype) -> None:
    cam, _, embedding = tensors(2, 3, 8, 4, 5, dtype, False)
    embedding[0] = 0
    embedding[1, :, 2, 2] = 0
    assert_matches(kernels.pixel_correlation, [cam, embedding])


def test_constant_cam_and_strided_gradient() -> None:
    cam, _, embedding = tensors(1, 2, 8, 4, 5, torch.float32, False)
    leaf = embedding.requires_grad_()
    (found,) = torch.autograd.grad(kernels.pixel_correlation(cam, leaf, backend="triton").sum(), leaf)
    (exact,) = torch.autograd.grad(kernels.pixel_correlation(cam.double(), leaf.double(), backend="eager").sum(), leaf)
    assert_close("gradient", found, exact.double(), allowed_error(torch.float32, 1e-5, TF32_GRADIENT))


def test_more_channels_than_fit_and_float64_are_refused() -> None:
    cam = torch.zeros(1, 2, 3, 3, device=DEVICE)
    with pytest.raises(ValueError, match="takes an embedding of up to 256 channels, found 300: use 'tiled'"):
        kernels.pixel_correlation(cam, cam.new_zeros(1, 300, 3, 3), backend="triton")
    with pytest.raises(ValueError, match=r"found torch\.float64: use 'tiled'"):
        kernels.region_pooling(cam.double(), cam.double(), backend="triton")


def maps(counts: list[int], classes: int, h: int, w: int) -> list[Tensor]:
    shape = (3, len(counts), 1 + classes, h, w)
    labels = torch.zeros(len(counts), classes)
    for row, count in zip(labels, counts, strict=True):
        row[torch.randperm(classes, generator=torch.Generator().manual_seed(count))[:count]] = 1
    visible = torch.linspace(0, 0.7, len(counts)).to(DEVICE)
    return [(random(*shape) + 0.3).float(), (random(*shape, seed=1) + 0.5).float(), visible, labels.to(DEVICE)]


def losses(data: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    dtype = torch.float64 if backend == "eager" else torch.float32
    cam, refined, visible, labels = (tensor.detach().to(dtype) for tensor in data)
    cam.requires_grad_()
    refined.requires_grad_()
    found = kernels.complementary_losses(cam, refined, visible, labels, backend=backend, **options)  # type: ignore[arg-type]
    grads = torch.autograd.grad(found.tcp + 2 * found.tcp_refined + 3 * found.cpcr, (cam, refined))
    return [torch.stack(found).detach(), *grads]


@pytest.mark.parametrize(
    ("counts", "options"),
    [
        ([1, 0], {}),
        ([3, 1], {"normalise": "max", "background": "before-lambda"}),
        ([3, 2], {"refined_background": "own", "cpcr_target": "difference", "detach_refined_pair": True}),
        ([3, 3], {"hard_over": "batch", "refined_background": "own"}),
        ([3, 0], {"hard_over": "batch", "hard_share": 0.6, "cpcr_target": "difference"}),
        ([2, 3], {"hard_share": 1.0, "normalise": "max"}),
    ],
    ids=str,
)
def test_losses(counts: list[int], options: dict[str, Any]) -> None:
    data = maps(counts, 3, 5, 4)
    found = losses(data, "triton", size=(14, 11), **options)
    exact = losses(data, "eager", size=(14, 11), **options)
    for name, mine, reference in zip(("losses", "cam", "refined"), found, exact, strict=True):
        assert_close(name, mine, reference, 1e-5)


def test_losses_over_several_blocks_of_the_small_map() -> None:
    data = maps([1], 1, 18, 17)
    for found, exact in zip(losses(data, "triton", size=(40, 19)), losses(data, "eager", size=(40, 19)), strict=True):
        assert_close("losses", found, exact, 1e-5)


@few
@given(st.sampled_from([(1, 1), (1, 5), (5, 1), (3, 2)]), st.integers(1, 18), st.integers(1, 18))
@example((1, 5), 17, 3)
@example((5, 1), 3, 17)
def test_losses_of_other_shapes(size: tuple[int, int], h: int, w: int) -> None:
    """Images of one row or column, and of fewer pixels than the small map, of which some count nowhere."""
    data = maps([2, 1], 2, h, w)
    for name, found, exact in zip(
        ("losses", "cam", "refined"),
        losses(data, "triton", size=size),
        losses(data, "eager", size=size),
        strict=True,
    ):
        assert_close(name, found, exact, 1e-4)
    _, refined, _, labels = data
    cases: tuple[tuple[Any, torch.dtype], ...] = (("triton", torch.float32), ("eager", torch.float64))
    found, exact = (
        kernels.background_suppression(refined[0].to(dtype), labels, size=size, share=1.0, backend=backend)
        for backend, dtype in cases
    )
    assert_close("suppression", found, exact, 1e-5)


def test_losses_where_everything_ties() -> None:
    """Integers upsampled by halves are exact in every backend."""
    cam, refined, visible, labels = maps([2, 1], 2, 3, 3)
    refined = refined.round()
    refined[:, :, 2] = refined[:, :, 1]
    data = [cam.round(), refined, torch.full_like(visible, 0.5), labels]
    options = {"size": (5, 5), "hard_share": 1.0}
    for found, exact in zip(losses(data, "triton", **options), losses(data, "eager", **options), strict=True):
        assert_close("losses", found, exact, 1e-5)


FLAWS = (float("nan"), float("inf"), -float("inf"))


NAN, INF = FLAWS[:2]
PIXEL, LAST, WHOLE = (1, 1), (2, 3), (slice(None), slice(None))


@pytest.mark.parametrize(
    ("place", "channel", "branch", "at", "flaw", "options"),
    [
        ("cam", "present", 0, PIXEL, NAN, {}),
        ("cam", "present", 1, WHOLE, -INF, {"cpcr_target": "difference"}),
        ("cam", "present", 2, PIXEL, -INF, {}),
        ("cam", "absent", 2, PIXEL, NAN, {"cpcr_target": "difference"}),
        ("cam", "absent", 0, LAST, -INF, {}),
        ("cam", "background", 0, PIXEL, NAN, {}),
        ("refined", "present", 0, PIXEL, NAN, {"normalise": "max"}),
        ("refined", "present", 1, PIXEL, NAN, {}),
        ("refined", "present", 2, LAST, INF, {"hard_over": "batch"}),
        ("refined", "absent", 1, PIXEL, INF, {}),
        ("refined", "background", 1, WHOLE, NAN, {"refined_background": "own", "hard_over": "batch"}),
    ],
    ids=str,
)
def test_what_is_not_finite_reaches_losses_and_gradients_as_in_eager(
    place: str, channel: str, branch: int, at: tuple[Any, ...], flaw: float, options: dict[str, Any]
) -> None:
    """A GPU's maximum drops NaN. Here the interpreter's does too."""
    data = maps([1], 2, 3, 4)
    present = int(data[3][0].argmax()) + 1
    i_channel = {"present": present, "absent": 3 - present, "background": 0}[channel]
    i_place = ("cam", "refined").index(place)
    place_of_flaw = (branch, 0, i_channel, *at)
    data[i_place][place_of_flaw] = flaw
    exact = losses(data, "eager", size=(6, 7), **options)
    found = losses(data, "triton", size=(6, 7), **options)
    assert torch.equal(found[0].isfinite(), exact[0].isfinite())
    for mine, reference in zip(found[1:], exact[1:], strict=True):
        if exact[0].isfinite().all() or not reference.isfinite().all():
            assert mine.isfinite().all() == reference.isfinite().all()


@pytest.mark.parametrize("flaw", FLAWS)
def test_what_is_not_finite_reaches_background_suppression_as_in_eager(flaw: float) -> None:
    _, refined, _, labels = maps([1], 2, 3, 4)
    for channel, at in ((0, PIXEL), (1, PIXEL), (2, LAST)):
        leaf = refined[0].clone()
        place = (0, channel, *at)
        leaf[place] = flaw
        leaf.requires_grad_()
        finite = []
        for backend in ("triton", "eager"):
            loss = kernels.background_suppression(leaf, labels, size=(6, 7), backend=backend)
            finite.append([x.isfinite().all() for x in (loss, torch.autograd.grad(loss, leaf)[0])])
        assert finite[0] == finite[1]


@few
@given(
    c=st.integers(1, 20), h=st.integers(1, 20), w=st.integers(1, 20), share=st.floats(0.1, 0.9),
    flaw=st.sampled_from(FLAWS), seed=st.integers(0, 99),
)  # fmt: skip
@pytest.mark.parametrize("op", ["pooling", "correlation"])
def test_regions_are_finite_where_eager_is(
    op: str, c: int, h: int, w: int, share: float, flaw: float, seed: int
) -> None:
    """Maps and queries are mostly -inf (whole blocks of pixels, whole rows), or a few values are not finite."""
    cam, keys, features = tensors(1, c, 8, h, w, torch.float32, False)
    cam, features = cam.clone(), features.clone()
    cam.view(-1)[: int(share * cam.numel())] = -float("inf")
    if op == "correlation":
        cam, features = tensors(1, c, 8, h, w, torch.float32, False)[0], features.abs()
        keys = keys.clone()
        keys[:, ::2, 0] = -1e30  # its products with large queries are -inf
        features.view(8, -1)[0, : int(share * h * w)] = 1e30
    else:
        features.view(-1)[seed % features.numel()] = flaw
    function, arguments = (
        (kernels.region_pooling, [cam, features]) if op == "pooling" else (correlation, [cam, keys, features])
    )
    found = results(function, arguments, torch.float32, "triton")
    exact = results(function, arguments, torch.float32, "eager")
    for index, (mine, reference) in enumerate(zip(found, exact, strict=True)):
        assert torch.equal(mine.isfinite(), reference.isfinite())
        if index == 0 or op == "pooling":  # a key's gradient is a sum of 1e30 and -1e30
            sound = reference.isfinite()
            rtol, atol = (allowed_error(torch.float32, bound, TF32) for bound in (1e-3, 1e-4))
            torch.testing.assert_close(mine[sound], reference[sound], rtol=rtol, atol=atol)


def test_float16_shares_of_more_pixels_than_float16_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel has the whole share. A share times the number of pixels would be infinite."""
    if launch.INTERPRETED:
        monkeypatch.setattr(region_triton, "BP", 1 << 14)  # a program's time is of its calls
    pixels = 70_000
    cam, features = torch.zeros(1, 1, 1, pixels, device=DEVICE).half(), random(1, 1, 1, pixels).half()
    cam[..., 5] = 60
    for index, (found, exact) in enumerate(
        zip(
            results(kernels.region_pooling, [cam, features], torch.float16, "triton"),
            results(kernels.region_pooling, [cam, features], torch.float64, "eager"),
            strict=True,
        )
    ):
        assert_close(
            f"result {index}", found, exact, 1e-3
        ) if index != 1 else None  # the CAM's gradient is a difference
        assert found.isfinite().all()


def peaks(op: Callable[..., Tensor], length: float) -> list[Tensor]:
    """Return a float32 CAM and float16 operands. Image 0 has a pixel without neighbours, or regions of two pixels.

    These need the largest numbers. A large ``length`` makes an operand's gradient large.
    """
    cam, keys, features = random(2, 3, 16, 16), random(2, 3, 8, seed=1), random(2, 8, 16, 16).abs()
    if op is correlation:
        features[0, :, 2, 3:5] += 16 * keys[0, 1, :, None]
        return [cam.float(), (keys / length).half(), (features * length).half()]
    if op is kernels.region_pooling:
        cam[0, :, 2, 3:5] += 20
    features[0, :, 2, 3] *= -1
    return [cam.float(), (features / length).half()]


half_ops = pytest.mark.parametrize("op", [kernels.pixel_correlation, kernels.region_pooling, correlation])


@half_ops
@pytest.mark.parametrize(("size", "length"), [(1e-6, 256), (1, 1), (2000, 1)])
def test_float16_gradients_of_any_size(op: Callable[..., Tensor], size: float, length: float) -> None:
    leaves = [leaf.requires_grad_() for leaf in peaks(op, length)]
    out = op(*leaves, backend="triton")
    gradient = (size * torch.cos(torch.arange(out.numel(), dtype=torch.float64))).view(out.shape).to(out)
    gradient[1] /= 8  # images have their own scales
    found = torch.autograd.grad(out, leaves, gradient)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad(op(*wide, backend="eager"), wide, gradient.double())
    for index, (mine, reference) in enumerate(zip(found, exact, strict=True)):
        rounding = 0 if mine.dtype == torch.float32 else 2**-25  # of the smallest numbers
        for n in range(2):
            error, scale = rms_error(mine[n], reference[n]), float(reference[n].square().mean().sqrt())
            name = f"gradient {index} of image {n}"
            assert error <= 4e-3 * scale + rounding, f"{name}: error {error:.2e} of {scale:.2e}"


@half_ops
@pytest.mark.parametrize("flaw", FLAWS)
def test_float16_gradients_that_are_zero_or_not_finite(op: Callable[..., Tensor], flaw: float) -> None:
    leaves = [leaf.requires_grad_() for leaf in peaks(op, 1)]
    gradients = []
    for backend in ("triton", "eager"):
        out = op(*leaves, backend=backend)
        gradient = torch.zeros_like(out)
        gradient[1].view(-1)[7] = flaw
        gradients.append(torch.autograd.grad(out, leaves, gradient))
    found, expected = gradients
    for mine, reference in zip(found, expected, strict=True):
        assert (mine[0] == 0).all()
        assert not reference.isfinite().all()
        assert (~mine.isfinite() | reference.isfinite()).all()


@pytest.mark.parametrize("zeros", [0.0, 0.6, 0.97])
def test_counts_of_errors_are_exact_however_many_share_a_bin(zeros: float) -> None:
    values = random(2, 16, 32).abs().float()
    values[random(2, 16, 32, seed=1) < torch.special.ndtri(torch.tensor(zeros, dtype=torch.float64))] = 0
    maps = torch.cat([torch.zeros_like(values)[:, None], values[:, None]], dim=1)
    labels = torch.ones(2, 1, device=DEVICE)
    for share in (0.3, 0.98):
        found, exact = (
            kernels.background_suppression(maps, labels, size=(16, 32), share=share, backend=backend)
            for backend in ("triton", "eager")
        )
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
        repeated = kernels.background_suppression(maps, labels, size=(16, 32), share=share, backend="triton")
        assert torch.equal(repeated, found)


def test_tcp_alone_without_gradients() -> None:
    cam, _, visible, labels = maps([2], 2, 3, 4)
    found = kernels.complementary_losses(cam, None, visible, labels, size=(6, 7), backend="triton")
    exact = kernels.complementary_losses(cam.double(), None, visible, labels, size=(6, 7), backend="eager")
    assert_close("tcp", found.tcp, exact.tcp, 1e-6)
    assert found.tcp_refined == found.cpcr == 0


@pytest.mark.parametrize("counts", [[2, 0], [3, 3]], ids=str)
def test_background_suppression(counts: list[int]) -> None:
    _, refined, _, labels = maps(counts, 3, 4, 5)
    cases: tuple[tuple[Any, torch.dtype], ...] = (("triton", torch.float32), ("eager", torch.float64))
    for source in (refined[0].abs(), refined[1].round()):
        leaf = source.detach().requires_grad_()
        found, exact = (
            kernels.background_suppression(leaf.to(dtype), labels, size=(7, 9), backend=backend)
            for backend, dtype in cases
        )
        assert_close("loss", found.detach(), exact.detach(), 1e-6)
        mine, reference = (torch.autograd.grad(loss, leaf)[0] for loss in (found, exact))
        assert_close("gradient", mine, reference.double(), 1e-5)


@pytest.mark.parametrize(
    ("size", "options", "masked"),
    [
        ((2, 13, 17), {"count": 4, "compactness": 10, "iterations": 2}, True),
        ((1, 9, 8), {"count": 12, "compactness": 0.5, "iterations": 2}, False),  # many small parts that join in rounds
        ((1, 1, 40), {"count": 3, "compactness": 10_000, "iterations": 1}, False),
        ((1, 40, 60), {"count": 2, "compactness": 10, "iterations": 1}, False),  # more than one program for a cell
    ],
    ids=str,
)
def test_superpixels_have_the_same_bits(size: tuple[int, ...], options: dict[str, Any], masked: bool) -> None:
    batch, height, width = size
    generator = torch.Generator().manual_seed(sum(size))
    images = torch.randint(0, 256, (height, batch, 3, width), generator=generator, dtype=torch.uint8)
    images = images.to(DEVICE).permute(1, 2, 0, 3)
    mask = None
    if masked:
        mask = torch.ones(size, dtype=torch.bool, device=DEVICE)
        mask[0, :5] = mask[0, :, 12:] = False
        mask[1] = torch.rand(height, width, generator=generator) < 0.7
    found, expected = (kernels.slic(images, **options, mask=mask, backend=name) for name in ("triton", "eager"))
    assert torch.equal(found, expected)


def test_registered_operators_pass_opcheck() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for dtype in (torch.float32, torch.float16):
        cam, keys, features = (t.flatten(2).requires_grad_() for t in tensors(1, 3, 8, 2, 3, dtype, False))
        torch.library.opcheck(torch.ops.cpn_fast.pixel_correlation_triton, (cam, features, 1e-5), test_utils=checks)
        torch.library.opcheck(torch.ops.cpn_fast.region_pooling_triton, (cam, features), test_utils=checks)
        correlated = (cam, keys, features, 0.3)
        torch.library.opcheck(torch.ops.cpn_fast.region_correlation_triton, correlated, test_utils=checks)
    raw, refined, visible, labels = maps([1], 1, 2, 2)
    options = ([3, 3], "max", "after-lambda", "recomputed", "one-hot", False, 1.0, "image", True, True)
    leaves = (raw.requires_grad_(), refined.requires_grad_(), visible, labels)
    torch.library.opcheck(torch.ops.cpn_fast.complementary_losses_triton, (*leaves, *options), test_utils=checks)
    scores = refined[0].detach().requires_grad_()
    images = torch.arange(18, dtype=torch.uint8, device=DEVICE).view(1, 3, 2, 3)
    torch.library.opcheck(torch.ops.cpn_fast.slic_triton, (images, None, 1, 10.0, 1), test_utils=checks)
    arguments = (scores, labels, [3, 3], 0.25, True)
    torch.library.opcheck(torch.ops.cpn_fast.background_suppression_triton, arguments, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_to_one_graph(dtype: torch.dtype) -> None:
    cam, keys, features = tensors(1, 3, 8, 3, 3, dtype, True)

    def model(features: Tensor) -> Tensor:
        refined = kernels.pixel_correlation(cam, features, backend="triton")
        refined = refined + kernels.region_correlation(cam, keys, features, scale=0.2, backend="triton")
        return refined.sum() + kernels.region_pooling(cam, features, backend="triton").sum()

    leaf = features.requires_grad_()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(leaf)
    expected = model(leaf)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaf), torch.autograd.grad(expected, leaf))


def test_a_compiled_step_holds_the_triton_operators(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU ``backend=None`` means these operators too."""
    monkeypatch.setattr(kernels, "_fitting", lambda modules, *tensors: kernels.Choice("triton", None))
    # One class and no selection of the largest errors: the interpreter runs what the graphs hold.
    small = tiny_config(classes=["thing"], loss={"hard_share": 1.0})
    check_graphs(config_file.load(small), REFINED, LOSSES, lambda operation: "triton", DEVICE)
