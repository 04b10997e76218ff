"""The tiled losses against the plain formula: every variant, ties, and images with many, few and no classes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from cpn_fast import kernels

OPTIONS: dict[str, tuple[Any, ...]] = {
    "normalise": ("max", "min-max"),
    "background": ("before-lambda", "after-lambda"),
    "refined_background": ("own", "recomputed"),
    "cpcr_target": ("difference", "one-hot"),
    "detach_refined_pair": (False, True),
    "hard_share": (0.2, 1.0),
    "hard_over": ("image", "batch"),
}
VARIANTS = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]


def maps(counts: list[int], classes: int, h: int, w: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return raw and refined maps, lambdas (the first 0) and labels with ``counts`` present classes per image."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, len(counts), 1 + classes, h, w)
    cam = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
    refined = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
    visible = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    visible[0] = 0
    labels = torch.zeros(len(counts), classes, dtype=torch.float64)
    for row, count in zip(labels, counts, strict=True):
        row[torch.randperm(classes, generator=generator)[:count]] = 1
    return cam.requires_grad_(), refined.requires_grad_(), visible, labels


def results(data: tuple[Tensor, ...], size: tuple[int, int], backend: Any, **options: Any) -> list[Tensor]:
    """Return the three losses and the gradients of their weighted sum."""
    cam, refined, visible, labels = data
    losses = kernels.complementary_losses(cam, refined, visible, labels, size=size, backend=backend, **options)
    grads = torch.autograd.grad(losses.tcp + 2 * losses.tcp_refined + 3 * losses.cpcr, (cam, refined))
    return [torch.stack(losses).detach(), *grads]


def assert_same(data: tuple[Tensor, ...], size: tuple[int, int], **options: Any) -> None:
    pairs = zip(results(data, size, "tiled", **options), results(data, size, "eager", **options), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("counts", [[1, 2, 0], [5, 6, 1], [6, 6, 6]], ids=str)
def test_every_variant_equals_the_plain_formula(counts: list[int]) -> None:
    data = maps(counts, 6, 4, 5)
    for variant in VARIANTS:
        assert_same(data, (11, 13), **variant)


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    classes=st.integers(4, 9),
    small=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    variant=st.sampled_from(VARIANTS),
)
def test_any_shape_equals_the_plain_formula(
    counts: list[int], classes: int, small: tuple[int, int], size: tuple[int, int], variant: dict[str, Any]
) -> None:
    assert_same(maps(counts, classes, *small), size, **variant)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("count", [0, 1])
def test_one_image(classes: int, count: int) -> None:
    data = maps([count], classes, 3, 4)
    for variant in VARIANTS:
        assert_same(data, (7, 9), **variant)


def test_selection_really_happens_in_the_cases_above() -> None:
    data = maps([6], 6, 4, 5)
    plain = kernels.complementary_losses(*data, size=(11, 13), hard_share=1.0)
    hard = kernels.complementary_losses(*data, size=(11, 13), hard_share=0.2)
    assert plain.cpcr < hard.cpcr < 5 * plain.cpcr * 0.99


def test_with_few_classes_the_hardest_fifth_is_five_times_the_mean() -> None:
    data = maps([1, 2, 3], 20, 4, 5)
    plain = kernels.complementary_losses(*data, size=(10, 15), hard_share=1.0)
    hard = kernels.complementary_losses(*data, size=(10, 15), hard_share=0.2)
    torch.testing.assert_close(hard.cpcr, 5 * plain.cpcr)


def test_ties_share_their_gradient() -> None:
    """Small integers, upsampled by halves, are exact: extrema, strongest classes and errors tie everywhere."""
    cam, _, visible, labels = maps([3, 2], 3, 3, 3)
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randint(0, 3, cam.shape, generator=generator).double().requires_grad_() for _ in range(2)]
    same = whole[1].detach().clone()
    same[:, :, 2] = same[:, :, 1]
    for variant in VARIANTS:
        assert_same((whole[0], same.requires_grad_(), torch.full_like(visible, 0.5), labels), (5, 5), **variant)


def test_constant_and_negative_maps_are_finite_without_gradient() -> None:
    _, _, visible, labels = maps([2, 1], 3, 3, 4)
    for value in (-1.0, 0.0, 2.0):
        constant = torch.full((3, 2, 4, 3, 4), value, dtype=torch.float64, requires_grad=True)
        for backend in ("eager", "tiled"):
            _, d_cam, d_refined = results((constant, constant, visible, labels), (6, 8), backend)
            assert torch.all(d_cam == 0)
            assert torch.all(d_refined == 0)


FLAWS = (float("nan"), float("inf"), -float("inf"))


def with_flaw(maps: Tensor, at: tuple[int, ...], flaw: float) -> Tensor:
    changed = maps.detach().clone()
    changed[at] = flaw
    return changed.requires_grad_()


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    small=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    variant=st.sampled_from(VARIANTS),
    flaw=st.sampled_from(FLAWS),
    whole=st.booleans(),
    choose=st.data(),
)
def test_what_is_not_finite_reaches_losses_and_gradients_as_in_eager(
    counts: list[int], small: tuple[int, int], more: tuple[int, int], variant: dict[str, Any], flaw: float,
    whole: bool, choose: st.DataObject,
) -> None:  # fmt: skip
    """It may be in raw or refined maps, of present or absent classes or the background. The relu cuts off -inf."""
    cam, refined, visible, labels = maps(counts, 3, *small)
    at = tuple(choose.draw(st.integers(0, side - 1)) for side in cam.shape)
    at = at[:3] if whole else at
    size = (small[0] + more[0], small[1] + more[1])
    for data in ((with_flaw(cam, at, flaw), refined), (cam, with_flaw(refined, at, flaw))):
        exact = results((*data, visible, labels), size, "eager", **variant)
        found = results((*data, visible, labels), size, "tiled", **variant)
        assert torch.equal(found[0].isfinite(), exact[0].isfinite())
        for mine, reference in zip(found[1:], exact[1:], strict=True):
            if exact[0].isfinite().all() or not reference.isfinite().all():
                assert mine.isfinite().all() == reference.isfinite().all()


@settings(max_examples=40)
@given(
    count=st.integers(0, 3),
    share=st.sampled_from([0.25, 1.0]),
    flaw=st.sampled_from(FLAWS),
    whole=st.booleans(),
    choose=st.data(),
)
def test_what_is_not_finite_reaches_background_suppression_as_in_eager(
    count: int, share: float, flaw: float, whole: bool, choose: st.DataObject
) -> None:
    _, refined, _, labels = maps([count], 3, 3, 4)
    at = tuple(choose.draw(st.integers(0, side - 1)) for side in refined[0].shape)
    leaf = with_flaw(refined[0], at[:2] if whole else at, flaw)
    results = []
    for backend in ("tiled", "eager"):
        loss = kernels.background_suppression(leaf, labels, size=(7, 9), share=share, backend=backend)
        results.append([x.isfinite().all() for x in (loss, torch.autograd.grad(loss, leaf)[0])])
    assert results[0] == results[1]


def test_without_refined_maps_only_tcp_remains() -> None:
    cam, refined, visible, labels = maps([2, 1], 3, 3, 4)
    for backend in ("eager", "tiled"):
        losses = kernels.complementary_losses(cam, None, visible, labels, size=(6, 8), backend=backend)
        both = kernels.complementary_losses(cam, refined, visible, labels, size=(6, 8), backend=backend)
        assert losses.tcp == both.tcp
        assert losses.tcp_refined == losses.cpcr == 0
        (gradient,) = torch.autograd.grad(losses.tcp, cam)
        assert gradient[0].abs().sum() > 0
        assert torch.all(gradient[1:] == 0)


@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_gradcheck(backend: Any) -> None:
    cam, refined, visible, labels = maps([2], 2, 2, 3)

    def losses(image: Tensor, refined: Tensor) -> Tensor:
        """CPCR stops the gradient of the raw maps, so it gets constant ones."""
        whole = torch.cat([image, cam[1:].detach()])
        options: dict[str, Any] = {"size": (5, 4), "hard_share": 1.0, "backend": backend}
        tcp = kernels.complementary_losses(whole, None, visible + 0.4, labels, **options).tcp
        _, tcp_refined, cpcr = kernels.complementary_losses(cam.detach(), refined, visible + 0.4, labels, **options)
        return torch.stack([tcp, tcp_refined, cpcr])

    assert gradcheck(losses, (cam[:1].detach().clone().requires_grad_(), refined))


@pytest.mark.parametrize("counts", [[1, 2, 0], [3, 3]], ids=str)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_background_suppression_equals_the_plain_formula(counts: list[int], share: float) -> None:
    _, refined, _, labels = maps(counts, 3, 4, 5)
    for source in (refined[0], refined[0].abs(), refined[0].round()):
        leaf = source.detach().requires_grad_()
        found, expected = (
            kernels.background_suppression(leaf, labels, size=(7, 9), share=share, backend=backend)
            for backend in ("tiled", "eager")
        )
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, leaf), torch.autograd.grad(expected, leaf))


def test_background_suppression_is_the_mean_of_the_lowest_quarter() -> None:
    refined = torch.tensor([[[0.0, 0, 0, 0], [4, 1, 3, 2], [9, 9, 9, 9]]]).view(1, 3, 2, 2)
    loss = kernels.background_suppression(refined, torch.tensor([[1, 0]]), size=(2, 2))
    assert loss == 1


def test_half_maps_are_computed_in_float32_and_under_autocast() -> None:
    cam, refined, visible, labels = (tensor.float() for tensor in maps([2, 1], 3, 4, 4))
    expected = kernels.complementary_losses(
        cam.bfloat16(), refined.bfloat16(), visible, labels, size=(9, 9), backend="eager"
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.complementary_losses(cam.bfloat16(), refined.bfloat16(), visible, labels, size=(9, 9))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs)


def test_compiles_to_one_graph() -> None:
    data = tuple(tensor.detach().float() for tensor in maps([2, 1], 3, 4, 4))
    leaves = (data[0].requires_grad_(), data[1].requires_grad_(), *data[2:])

    def run(*tensors: Tensor) -> Tensor:
        losses = kernels.complementary_losses(*tensors, size=(9, 9))
        return losses.tcp + losses.cpcr + kernels.background_suppression(tensors[1][0], tensors[3], size=(9, 9))

    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(found, run(*leaves))
    torch.testing.assert_close(torch.autograd.grad(found, leaves[:2]), torch.autograd.grad(run(*leaves), leaves[:2]))


def test_registered_operators_pass_opcheck() -> None:
    cam, refined, visible, labels = (tensor.detach().float() for tensor in maps([2, 1], 3, 4, 4))
    options = ([9, 9], "min-max", "after-lambda", "recomputed", "one-hot", False, 0.2, "image", True, True)
    leaves = (cam.requires_grad_(), refined.requires_grad_(), visible, labels)
    torch.library.opcheck(torch.ops.cpn_fast.complementary_losses_tiled, (*leaves, *options))
    torch.library.opcheck(
        torch.ops.cpn_fast.background_suppression_tiled,
        (refined[0].detach().requires_grad_(), labels, [9, 9], 0.25, True),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cam": torch.zeros(2, 1, 3, 4, 4)}, "cam: expected"),
        ({"refined": torch.zeros(3, 1, 3, 4, 5)}, "refined: expected the shape of cam"),
        ({"visible": torch.zeros(2)}, "visible: expected"),
        ({"labels": torch.zeros(1, 3)}, "labels: expected"),
        ({"hard_share": 0.0}, "hard_share: expected a share"),
        ({"normalise": "minmax"}, "normalise: expected one of max, min-max"),
        ({"size": (0, 8)}, r"size: expected \(H, W\)"),
        ({"cam": torch.zeros(3, 1, 3, 4, 4, dtype=torch.int64)}, "cam: expected a floating dtype"),
        ({"refined": torch.zeros(3, 1, 3, 4, 4, dtype=torch.int64)}, "refined: expected a floating dtype"),
        ({"visible": torch.zeros(1, dtype=torch.bool)}, "visible: expected a floating dtype"),
        ({"labels": torch.zeros(1, 2, device="meta")}, "labels: expected on cpu like cam, found on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    cam = torch.zeros(3, 1, 3, 4, 4)
    arguments: dict[str, Any] = {"cam": cam, "refined": cam}
    arguments |= {"visible": torch.zeros(1), "labels": torch.zeros(1, 2), "size": (8, 8)}
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.complementary_losses(**(arguments | change))


def test_pooled_logits_take_maps_alone() -> None:
    with pytest.raises(ValueError, match=r"cam: expected \(N, C, h, w\)"):
        kernels.pooled_logits(torch.zeros(2, 3, 4), size=(8, 8))


@pytest.mark.gpu
def test_triton_replays_from_a_cuda_graph() -> None:
    cam, refined, visible, labels = (tensor.detach().float().cuda() for tensor in maps([4, 1], 5, 7, 6))
    leaves = (cam.requires_grad_(), refined.requires_grad_())

    def run() -> list[Tensor]:
        losses = kernels.complementary_losses(*leaves, visible, labels, size=(25, 23), backend="triton")
        suppressed = kernels.background_suppression(refined[0], labels, size=(25, 23), backend="triton")
        total = torch.stack([*losses, suppressed])
        return [total.detach(), *torch.autograd.grad(total.sum(), leaves)]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
