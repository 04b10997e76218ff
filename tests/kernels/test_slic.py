"""Our SLIC: properties of its definition, and the kernels on machines that can run them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpn_fast.kernels import slic, slic_eager

OPTIONS = {"count": 20, "compactness": 10.0, "iterations": 4}


def smooth(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return photo-like images: slowly changing colours with noise."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(batch):
        coarse = rng.random((height // 12 + 2, width // 12 + 2, 3), np.float32)
        image = 230 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        images.append(np.atleast_3d(image).reshape(height, width, 3) + rng.normal(10, 4, (height, width, 3)))
    return torch.from_numpy(np.stack(images).clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2)


def example(kind: str, height: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        return torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)
    if kind == "constant":
        return torch.randint(0, 256, (1, 3, 1, 1), generator=generator, dtype=torch.uint8).repeat(1, 1, height, width)
    return smooth(1, height, width, seed)


def assert_regions(labels: Tensor, count: int, shown: Tensor | None = None) -> None:
    """Labels run from 0 without gaps by first pixels, at most ``count``, and each is one 4-connected region."""
    assert labels.dtype == torch.int32
    for image, visible in zip(labels, labels >= 0 if shown is None else shown, strict=True):
        assert torch.equal(image >= 0, visible)
        found = image[visible].tolist()
        assert list(dict.fromkeys(found)) == list(range(len(set(found))))
        assert len(set(found)) <= count
        for label in set(found):
            assert cv2.connectedComponents((image == label).numpy().astype(np.uint8), connectivity=4)[0] == 2


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
kinds = st.sampled_from(["noise", "smooth", "constant"])


@settings(max_examples=40, derandomize=True)
@given(
    sizes, st.sampled_from([1, 2, 7, 30, 200, 3000]), kinds, st.sampled_from([0.01, 10.0, 500.0]), st.integers(0, 99)
)
def test_labels_are_a_partition_into_regions(size, count, kind, compactness, seed):
    images = example(kind, *size, seed)
    labels = slic(images, count=count, compactness=compactness, iterations=3)
    assert labels.shape == (1, *size)
    assert_regions(labels, count, torch.ones_like(labels, dtype=torch.bool))
    if count == 1:
        assert not labels.any()
    if count >= size[0] * size[1]:
        assert torch.equal(labels.flatten(), torch.arange(labels.numel()))


@settings(max_examples=25, derandomize=True)
@given(sizes, st.sampled_from([1, 5, 30]), kinds, st.data())
def test_what_a_mask_leaves_out_does_not_matter(size, count, kind, data):
    """The mask is a rectangle, as of a padded crop. Around it labels are -1, and colours do not matter."""
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, size[0])] * 2)))
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, size[1])] * 2)))
    shown = torch.zeros(1, *size, dtype=torch.bool)
    shown[:, top:bottom, left:right] = True
    images = example(kind, *size, 1)
    labels = slic(images, count=count, compactness=10, iterations=3, mask=shown)
    assert_regions(labels, count, shown)
    others = images.where(shown[:, None], example("noise", *size, 2))
    assert torch.equal(slic(others, count=count, compactness=10, iterations=3, mask=shown), labels)


def test_a_mask_of_many_pieces_never_gives_too_large_labels():
    shown = (torch.arange(8)[:, None] + torch.arange(9) + torch.zeros(1, 1, 1)) % 2 == 0
    labels = slic(example("noise", 8, 9, 0), count=5, compactness=10, iterations=2, mask=shown)
    assert torch.equal(labels >= 0, shown)
    assert labels.max() == 4


@pytest.mark.parametrize("count", [20, 200, 1000])
def test_nearly_as_many_as_asked_for(count):
    for images in (smooth(1, 150, 200), example("constant", 150, 200, 0)):
        assert 0.9 * count <= slic(images, count=count, compactness=10, iterations=10).max() + 1 <= count


def test_superpixels_follow_edges():
    images = torch.zeros(1, 3, 90, 120, dtype=torch.uint8)
    images[0, :, 17:71, 25:83] = torch.tensor([255, 160, 0], dtype=torch.uint8)[:, None, None]
    labels = slic(images, count=30, compactness=10, iterations=10)[0]
    inside = torch.bincount(labels[17:71, 25:83].flatten(), minlength=int(labels.max()) + 1)
    purity = inside / torch.bincount(labels.flatten())
    assert ((purity < 0.02) | (purity > 0.98)).all()


@pytest.mark.parametrize("turn", [(2,), (3,), (2, 3)])
def test_a_flipped_image_has_the_flipped_regions(turn):
    """Exceptions are pixels at the same distance from two centres, where the first centre wins."""
    images = smooth(1, 96, 96)
    one = slic(images, **OPTIONS | {"count": 36})[0].flatten()
    other = slic(images.flip(turn), **OPTIONS | {"count": 36}).flip([axis - 1 for axis in turn])[0].flatten()
    together = torch.bincount(one * 100 + other, minlength=3700)
    assert together.view(-1, 100).amax(1).sum() >= 0.97 * len(one)
    assert together.view(-1, 100).amax(0).sum() >= 0.97 * len(one)


def test_a_batch_is_its_images_and_memory_format_does_not_matter():
    images = smooth(3, 40, 50)
    labels = slic(images, **OPTIONS)
    assert torch.equal(labels, torch.cat([slic(image[None], **OPTIONS) for image in images]))
    assert torch.equal(labels, slic(images.contiguous(), **OPTIONS))
    assert torch.equal(labels, slic(images.repeat(1, 1, 2, 2)[:, :, :40, :50], **OPTIONS))
    assert slic(images[:0], **OPTIONS).shape == (0, 40, 50)


def test_floats_are_rounded_to_bytes():
    images = smooth(1, 30, 40)
    floats = images.double() + torch.linspace(-0.49, 0.49, 30)[:, None]
    assert torch.equal(slic(floats, **OPTIONS), slic(images, **OPTIONS))
    wide = images.float().where(images < 250, 1e9).where(images > 5, -7.0).requires_grad_()
    cut = images.where(images < 250, 255).where(images > 5, 0)
    assert torch.equal(slic(wide, **OPTIONS), slic(cut, **OPTIONS))


def test_colours_are_cielab():
    """4,096 scaled and rounded colours differ from scikit-image's by less than 0.2."""
    rgb2lab = pytest.importorskip("skimage.color").rgb2lab
    levels = torch.arange(0, 256, 17, dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels).T[None, :, :, None]
    found = slic_eager.lab(colours)[:, 0, :, 0].double()
    exact = torch.from_numpy(rgb2lab(colours[0].permute(1, 2, 0).numpy()))[:, 0].T
    for channel, scale, shift in zip(
        range(3), slic_eager.SCALES, (0, slic_eager.SHIFT_A, slic_eager.SHIFT_B), strict=True
    ):
        assert ((found[channel] - shift) / scale - exact[channel]).abs().max() < 0.2
    assert found.min() >= 0
    assert (found.amax(1) < torch.tensor([1 << 10, 1 << 11, 1 << 11])).all()


def test_tall_and_large_images_do_not_overflow():
    tall = torch.arange(40_000, dtype=torch.int32)[:, None].expand(40_000, 100).div(7, rounding_mode="floor") % 256
    labels = slic(tall.to(torch.uint8).expand(1, 3, -1, -1), count=200, compactness=10_000, iterations=1)
    assert 150 <= labels.max() + 1 <= 200
    assert torch.equal(labels[0, :, 0], labels[0, :, -1])
    assert (labels[0, 1:, 0] - labels[0, :-1, 0]).min() >= 0
    white = torch.full((1, 3, 1, 100_000), 255, dtype=torch.uint8)
    assert slic(white, count=1, compactness=10_000, iterations=2).sum() == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 199, 200, 997, 1000, 32_000])
@pytest.mark.parametrize("size", [(448, 448), (375, 500), (1, 1000), (40_000, 100), (3, 3)])
def test_cells_are_nearly_as_many_as_asked_for_and_nearly_square(size, count):
    height, width = size
    grid = slic_eager.Grid.of(*size, count)
    asked = min(count, height * width)
    assert 1 <= grid.rows <= height
    assert 1 <= grid.columns <= width
    assert grid.cells <= asked
    if min(size) > 100:
        assert grid.cells >= 0.85 * asked
        if count >= 7:
            assert 0.5 < (height / grid.rows) / (width / grid.columns) < 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": torch.zeros(1, 4, 5, 5)}, ValueError, r"images: expected \(B, 3, H, W\)"),
        ({"images": torch.zeros(1, 3, 0, 5)}, ValueError, "images"),
        ({"images": torch.zeros(1, 3, 5, 5, dtype=torch.int32)}, TypeError, "uint8 or a floating dtype"),
        ({"images": torch.empty(1, 3, 1 << 20, 1, device="meta")}, ValueError, "2\\^20"),
        ({"mask": torch.ones(1, 5, 6, dtype=torch.bool)}, ValueError, "mask"),
        ({"mask": torch.ones(1, 5, 5)}, TypeError, "mask: expected bool"),
        ({"count": 0}, ValueError, "count: expected 1 to 32,000, found 0"),
        ({"iterations": 0}, ValueError, "iterations"),
        ({"compactness": float("nan")}, ValueError, "compactness"),
        ({"compactness": 20_000}, ValueError, "compactness"),
        ({"backend": "tiled"}, ValueError, "backend: expected one of eager"),
        ({"backend": "triton"}, ValueError, "needs tensors on CUDA"),
    ],
)
def test_other_arguments_are_refused(change, error, words):
    images = torch.zeros(1, 3, 5, 5)
    with pytest.raises(error, match=words):
        slic(**{"images": images, **OPTIONS, **change})


def test_meta_tensors_and_compiled_functions():
    shape = slic(torch.empty(2, 3, 6, 7, device="meta"), **OPTIONS)
    assert (shape.device.type, shape.dtype, shape.shape) == ("meta", torch.int32, (2, 6, 7))
    images = smooth(1, 20, 30)
    compiled = torch.compile(lambda x: slic(x, **OPTIONS) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(images), slic(images, **OPTIONS) + 1)


def test_operator():
    arguments = smooth(2, 12, 15), torch.ones(2, 12, 15, dtype=torch.bool), 6, 10.0, 2
    torch.library.opcheck(torch.ops.cpn_fast.slic_eager.default, arguments)
    torch.library.opcheck(torch.ops.cpn_fast.slic_eager.default, (arguments[0], None, *arguments[2:]))


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_give_the_same_bits_also_in_a_graph(masked):
    images = smooth(4, 224, 300).cuda()
    shown = None
    if masked:
        shown = torch.zeros(4, 224, 300, dtype=torch.bool, device="cuda")
        shown[:, 20:200, 30:] = True
    options = {"count": 100, "compactness": 10.0, "iterations": 10, "mask": shown}
    expected = slic(images, **options, backend="eager")
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert_same = slic(images, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = slic(images, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(assert_same, expected)
    for _ in range(3):
        captured.fill_(-5)
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_kernels_on_awkward_images():
    for images, count in (
        (example("constant", 300, 300, 0), 1),
        (example("noise", 97, 131, 0), 50),
        (example("noise", 1, 1000, 0), 30),
        (example("noise", 20, 20, 0), 1000),
        (smooth(1, 3000, 100), 200),
    ):
        for compactness in (0.5, 10.0, 10_000.0):
            options = {"count": count, "compactness": compactness, "iterations": 3}
            assert torch.equal(slic(images.cuda(), **options).cpu(), slic(images, **options))
