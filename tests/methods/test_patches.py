from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpn_fast.config import Patches
from cpn_fast.methods.patches import Pair, complementary_pair


def make_pair(images, superpixels, config, seed=0, fill=None, patch_limit=50, place=(0, 1)) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return complementary_pair(images, superpixels, config, fill, generator, patch_limit=patch_limit, place=place)


def blocks(batch: int, height: int, width: int, labels: list[int]) -> torch.Tensor:
    """Return maps of vertical stripes with the given labels from left to right."""
    columns = torch.tensor(labels).repeat_interleave(math.ceil(width / len(labels)))[:width]
    return columns.int().expand(batch, height, width).contiguous()


sides = st.integers(1, 30)
configs = st.builds(
    Patches,
    kind=st.sampled_from(["superpixel", "grid"]),
    hide=st.floats(0, 1),
    sampling=st.sampled_from(["independent", "with-replacement"]),
    share=st.sampled_from(["pixels", "patches"]),
    grid_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
)


@settings(max_examples=150)
@given(st.integers(1, 3), sides, sides, configs, st.booleans(), st.integers(0, 2**31), st.data())
def test_pair_is_complementary(batch, height, width, config, filled, seed, data):
    source = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, height, width, generator=source).add(10)
    limit = data.draw(st.integers(1, 50))
    superpixels = torch.randint(limit, (batch, height, width), generator=source, dtype=torch.int32)
    fill = torch.tensor([-1.0, -2.0, -3.0]) if filled else None
    pair = make_pair(images, superpixels, config, seed, fill, limit)

    colour = torch.zeros(3, 1, 1) if fill is None else fill.view(3, 1, 1)
    shown = (pair.visible == images).all(1)
    assert torch.equal(pair.visible, torch.where(shown[:, None], images, colour))
    assert torch.equal(pair.complement, torch.where(shown[:, None], colour, images))
    assert pair.share.dtype == torch.float32
    assert (pair.share + share_of(~shown, superpixels, config, pair.share)).tolist() == pytest.approx([1] * batch)


def share_of(shown, superpixels, config, otherwise):
    """Count the shares of a mask. Another test counts grids by patches."""
    if config.share == "pixels":
        return shown.float().mean((1, 2))
    if config.kind == "grid":
        return 1 - otherwise
    return torch.tensor([
        sum(bool(mask[labels == label].all()) for label in labels.unique()) / len(labels.unique())
        for mask, labels in zip(shown, superpixels, strict=True)
    ])  # fmt: skip


@settings(max_examples=50)
@given(sides, sides, configs, st.integers(0, 2**31))
def test_a_patch_has_one_fate(height, width, config, seed):
    config = config.model_copy(update={"kind": "superpixel"})
    superpixels = torch.randint(7, (2, height, width), generator=torch.Generator().manual_seed(seed))
    shown = make_pair(torch.ones(2, 3, height, width), superpixels, config, seed).visible[:, 0] == 1
    for mask, labels in zip(shown, superpixels, strict=True):
        for label in labels.unique():
            assert mask[labels == label].unique().numel() == 1


@pytest.mark.parametrize("share", ["pixels", "patches"])
def test_padding_counts_nowhere(share):
    """The pair shows the same of an image and of this image in a larger padded crop."""
    images, superpixels = torch.rand(3, 3, 12, 20) + 1, blocks(3, 12, 20, [0, 3, 9, 4])
    padding = (2, 5, 30, 1)
    padded = torch.nn.functional.pad(images, padding), torch.nn.functional.pad(superpixels, padding, value=-1)
    for seed in range(10):
        expected = make_pair(images, superpixels, Patches(share=share), seed, torch.ones(3) * 5)
        found = make_pair(*padded, Patches(share=share), seed, torch.ones(3) * 5)
        assert torch.equal(found.visible, torch.nn.functional.pad(expected.visible, padding))
        assert torch.equal(found.complement, torch.nn.functional.pad(expected.complement, padding))
        assert torch.equal(found.share, expected.share)


@pytest.mark.parametrize("kind", ["superpixel", "grid"])
@pytest.mark.parametrize("share", ["pixels", "patches"])
@pytest.mark.parametrize("hide", [0, 1])
def test_extremes_of_independent_hiding(kind, share, hide):
    config = Patches(kind=kind, share=share, hide=hide, sampling="independent", grid_sizes=(5, 8))
    images = torch.rand(4, 3, 33, 21) + 1
    pair = make_pair(images, blocks(4, 33, 21, [0, 3, 9]), config)
    assert pair.share.tolist() == [1 - hide] * 4
    assert torch.equal(pair.complement if hide else pair.visible, images)
    assert not (pair.visible if hide else pair.complement).any()


def test_no_draws_hide_nothing_and_all_draws_hide_63_percent():
    superpixels = torch.arange(1000, dtype=torch.int32).view(1, 20, 50).expand(20, -1, -1)
    images = torch.ones(20, 3, 20, 50)
    assert (make_pair(images, superpixels, Patches(hide=0), patch_limit=1000).share == 1).all()
    shares = make_pair(images, superpixels, Patches(hide=1), patch_limit=1000).share
    assert shares.mean().item() == pytest.approx(math.exp(-1), abs=0.01)


@pytest.mark.parametrize(("sampling", "hidden"), [("with-replacement", 0.3935), ("independent", 0.5)])
@pytest.mark.parametrize("spread", [1, 40], ids=["all labels present", "one in forty present"])
def test_mean_hidden_share_at_one_half(sampling, hidden, spread):
    superpixels = (torch.arange(200) * spread).view(1, 10, 20).expand(300, -1, -1)
    config = Patches(hide=0.5, sampling=sampling, share="patches")
    pair = make_pair(torch.ones(300, 3, 10, 20), superpixels, config, patch_limit=8000)
    # Released: 100 draws from 200 hide 1 - (1 - 1/200)^100 = 39.4 %; std of the mean of 300 images is below 0.003.
    assert 1 - pair.share.mean().item() == pytest.approx(hidden, abs=0.01)


def test_draws_are_bounded_by_the_patches_present():
    """An image has three of 50 possible patches: floor(0.5 * 3) is one draw, which hides exactly one of them."""
    config = Patches(hide=0.5, share="patches")
    for seed in range(20):
        pair = make_pair(torch.ones(2, 3, 6, 9), blocks(2, 6, 9, [48, 7, 30]), config, seed)
        assert pair.share.tolist() == pytest.approx([2 / 3] * 2)


def test_every_patch_is_drawn_equally_often():
    labels = torch.tensor([0, 5, 6, 49])
    pair = make_pair(torch.ones(4000, 3, 1, 4), labels.expand(4000, 1, 4), Patches(hide=0.25))
    hidden = (pair.visible[:, 0, 0] == 0).float().mean(0)
    assert hidden.tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_images_of_a_batch_are_hidden_independently():
    pair = make_pair(torch.ones(16, 3, 8, 50), blocks(16, 8, 50, list(range(50))), Patches())
    assert len({tuple(row.tolist()) for row in pair.visible[:, 0, 0]}) == 16


def test_share_by_pixels_and_by_patches_differ():
    superpixels = torch.zeros(1, 10, 10, dtype=torch.int32)
    superpixels[:, :, 9] = 1
    images = torch.ones(1, 3, 10, 10)
    pixels = make_pair(images, superpixels, Patches(share="pixels")).share.item()
    patches = make_pair(images, superpixels, Patches(share="patches")).share.item()
    assert patches == 0.5
    assert pixels == pytest.approx(0.1) or pixels == pytest.approx(0.9)


@pytest.mark.parametrize(("height", "width", "size"), [(7, 10, 4), (56, 56, 56), (1, 13, 5), (9, 9, 100)])
def test_grid_cells(height, width, size):
    """Cells start at the top left corner, are hidden or shown as a whole, and count equally even if cut off."""
    config = Patches(kind="grid", grid_sizes=(size,), share="patches")
    pair = make_pair(torch.ones(8, 3, height, width), None, config)
    for mask, share in zip(pair.visible[:, 0] == 1, pair.share, strict=True):
        cells = [mask[y : y + size, x : x + size] for y in range(0, height, size) for x in range(0, width, size)]
        assert all(cell.unique().numel() == 1 for cell in cells)
        assert share.item() == pytest.approx(sum(bool(cell[0, 0]) for cell in cells) / len(cells))


def test_every_grid_size_is_drawn():
    config = Patches(kind="grid", grid_sizes=(2, 8), hide=0.5)
    rows = (make_pair(torch.ones(200, 3, 1, 16), None, config).visible[:, 0, 0] == 1).tolist()
    coarse = sum(len(set(row[:8])) == len(set(row[8:])) == 1 for row in rows)
    # In one row of 64, cells of 2 look like cells of 8.
    assert 70 < coarse < 130


def test_grids_ignore_the_way_of_sampling():
    images = torch.rand(3, 3, 20, 20)
    one, other = (
        make_pair(images, None, Patches(kind="grid", grid_sizes=(5,), sampling=sampling))
        for sampling in ("independent", "with-replacement")
    )
    assert torch.equal(one.visible, other.visible)


@pytest.mark.parametrize("kind", ["superpixel", "grid"])
def test_same_generator_state_gives_same_pair_and_global_state_is_untouched(kind):
    images, superpixels = torch.rand(3, 3, 20, 20), blocks(3, 20, 20, list(range(20)))
    config = Patches(kind=kind, grid_sizes=(2, 3))
    state = torch.get_rng_state()
    first = make_pair(images, superpixels, config, seed=5)
    torch.manual_seed(1)
    again = make_pair(images, superpixels, config, seed=5)
    torch.set_rng_state(state)
    assert torch.equal(first.visible, again.visible)
    assert torch.equal(first.share, again.share)
    assert not torch.equal(first.visible, make_pair(images, superpixels, config, seed=6).visible)
    make_pair(images, superpixels, config, seed=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_keeps_dtype_and_memory_layout():
    images = torch.rand(2, 3, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    pair = make_pair(images, blocks(2, 16, 16, [0, 1]), Patches(), fill=torch.zeros(3))
    for image in pair[:2]:
        assert image.dtype == torch.bfloat16
        assert image.is_contiguous(memory_format=torch.channels_last)


def test_needs_superpixels_unless_grid():
    with pytest.raises(ValueError, match="superpixels is None"):
        make_pair(torch.ones(1, 3, 4, 4), None, Patches())


@pytest.mark.parametrize("kind", ["superpixel", "grid"])
def test_shapes_and_steps_depend_on_no_value(kind):
    """Tensors of the meta device have no values: a read on the host would raise."""
    images, superpixels = torch.empty(2, 3, 9, 7, device="meta"), torch.empty(2, 9, 7, device="meta").int()
    pair = make_pair(images, superpixels, Patches(kind=kind))
    assert [part.shape for part in pair] == [(2, 3, 9, 7), (2, 3, 9, 7), (2,)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["superpixel", "grid"])
def test_never_waits_for_the_gpu(kind):
    images, superpixels = torch.rand(2, 3, 32, 32).cuda(), blocks(2, 32, 32, [0, 1, 2]).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        complementary_pair(images, superpixels, Patches(kind=kind), None, generator, patch_limit=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@settings(max_examples=60)
@given(st.sampled_from([2, 4]), st.integers(1, 3), sides, sides, configs, st.integers(0, 2**31))
def test_the_parts_of_a_batch_become_the_pairs_of_the_whole(world, count, height, width, config, seed):
    source = torch.Generator().manual_seed(seed)
    images = torch.randn(world * count, 3, height, width, generator=source)
    superpixels = torch.randint(-1, 50, (world * count, height, width), generator=source)
    whole = make_pair(images, superpixels, config, seed)
    for number, (own, labels) in enumerate(zip(images.chunk(world), superpixels.chunk(world), strict=True)):
        part = make_pair(own, labels, config, seed, place=(number, world))
        for a, b in zip(part, whole, strict=True):
            torch.testing.assert_close(a, b.chunk(world)[number], equal_nan=True)
