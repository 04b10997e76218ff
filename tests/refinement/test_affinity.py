from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cpn_fast.config_file import parse
from cpn_fast.data.masks import IGNORE
from cpn_fast.methods.affinity import Affinity
from cpn_fast.methods.method import Views
from cpn_fast.pipelines.batch import Batch
from cpn_fast.refinement import affinity, walk

RADIUS = 5
STEP_ERROR = 6e-7  # of scores up to 1, as `random_walk` states
KINDS = ("background", "foreground", "different")
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def listed_pairs(radius: int, height: int, width: int) -> list[tuple[int, int]]:
    """Return (i, j) of every pair, cell by cell as the released code describes them."""
    steps = [(0, x) for x in range(1, radius)]
    steps += [(y, x) for y in range(1, radius) for x in range(1 - radius, radius) if x * x + y * y < radius * radius]
    found = []
    for dy, dx in steps:
        for y in range(height - (radius - 1)):
            for x in range(radius - 1, width - (radius - 1)):
                found.append((y * width + x, (y + dy) * width + x + dx))
    return found


def plain_affinities(features: torch.Tensor, radius: int) -> torch.Tensor:
    """Return affinities (..., pairs) of features (..., C, h, w) from a table of all pairs, as released."""
    near, far = torch.tensor(listed_pairs(radius, *features.shape[-2:]), dtype=torch.long).view(-1, 2).unbind(1)
    flat = features.flatten(-2)
    return torch.exp(-(flat[..., near] - flat[..., far]).abs().mean(-2))


def dense_transition(features: torch.Tensor, radius: int, beta: float) -> torch.Tensor:
    """Return the released matrix: symmetric, ones on the diagonal, to the power beta, columns divided by their sum."""
    _, height, width = features.shape
    matrix = torch.eye(height * width, dtype=features.dtype)
    for (i, j), a in zip(listed_pairs(radius, height, width), plain_affinities(features, radius), strict=True):
        matrix[i, j] = matrix[j, i] = a
    matrix = matrix**beta
    return matrix / matrix.sum(0, keepdim=True)


def _numbers(ends: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[int, int]]:
    near, far = (cells.flatten().tolist() for cells in ends)
    return list(zip(near, far, strict=True))


def test_the_released_counts() -> None:
    assert len(affinity.directions(RADIUS)) == 34
    ends = [near.numel() for near, _ in affinity.pairs(torch.zeros(56, 56), RADIUS)]
    assert sum(ends) == 84_864


@settings(max_examples=50)
@given(SIZES, st.integers(1, 6))
def test_pairs_are_those_of_the_released_code(size, radius) -> None:
    radius = affinity.fitting_radius(radius, *size)
    cells = torch.arange(math.prod(size)).view(size)
    found = [pair for ends in affinity.pairs(cells, radius) for pair in _numbers(ends)]
    assert found == listed_pairs(radius, *size)
    assert len(set(found)) == len(found)


def test_small_maps_shrink_the_radius() -> None:
    assert [affinity.fitting_radius(5, edge, 100) for edge in (1, 2, 3, 9, 10, 11)] == [0, 0, 1, 4, 4, 5]


@settings(max_examples=15)
@given(SIZES, st.integers(0, 2**31))
def test_affinities_and_their_gradient_are_the_formula(size, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    radius = affinity.fitting_radius(4, *size)
    features = torch.randn(2, 3, *size, generator=generator).requires_grad_()
    found = affinity.pair_affinities(features, radius)
    plain = plain_affinities(features, radius)
    torch.testing.assert_close(found.flatten(1), plain)
    weights = torch.randn(plain.shape, generator=generator)
    (own,) = torch.autograd.grad((found.flatten(1) * weights).sum(), features, retain_graph=True)
    (theirs,) = torch.autograd.grad((plain * weights).sum(), features)
    torch.testing.assert_close(own, theirs)


@settings(max_examples=25)
@given(SIZES, st.integers(0, 2**31), st.sampled_from([[0, 1, 2, IGNORE], [0, 1], [1, IGNORE], [IGNORE]]))
def test_the_loss_is_the_released_one(size, seed, values) -> None:
    rng = np.random.default_rng(seed)
    radius = affinity.fitting_radius(3, *size)
    labels = torch.from_numpy(rng.choice(values, (2, *size)))
    features = torch.from_numpy(rng.normal(size=(2, 4, *size)).astype(np.float32)).requires_grad_()
    affinities = plain_affinities(features, radius)
    sums, counts = {kind: torch.zeros(()) for kind in KINDS}, dict.fromkeys(KINDS, 1e-5)
    for own, row in zip(labels.flatten(1).tolist(), affinities, strict=True):
        for (i, j), a in zip(listed_pairs(radius, *size), row, strict=True):
            if IGNORE in (own[i], own[j]):
                continue
            kind = "different" if own[i] != own[j] else "foreground" if own[i] else "background"
            sums[kind] = sums[kind] - torch.log(1 + 1e-5 - a if kind == "different" else a + 1e-5)
            counts[kind] += 1
    parts = {kind: sums[kind] / counts[kind] for kind in KINDS}
    expected = parts["background"] / 4 + parts["foreground"] / 4 + parts["different"] / 2
    found = affinity.affinity_losses(affinity.pair_affinities(features, radius), labels, radius)
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-6)
    for kind, value in parts.items():
        torch.testing.assert_close(getattr(found, kind), value, rtol=1e-4, atol=1e-6)
    (own,) = torch.autograd.grad(found.total, features, allow_unused=True, materialize_grads=True)
    zero = 0 * features.sum()  # so that a loss without pairs has a gradient too
    (theirs,) = torch.autograd.grad(expected + zero, features)
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)


def test_labels_are_what_both_alphas_are_sure_of() -> None:
    low = np.array([[0, 0, 3, 3, 2]], np.uint8)
    high = np.array([[0, 3, 3, 0, 3]], np.uint8)
    assert affinity.combined_labels(low, high).tolist() == [[0, IGNORE, 3, 0, 2]]


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_cell_labels_are_the_released_ones_for_one_class_and_certain_scores(height, width, seed) -> None:
    """The released code pools the scores of each alpha and combines the winners. Certain scores are one-hot."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((2, 5, 5)).repeat(8, 1).repeat(8, 2)[:, :height, :width] + rng.normal(
        0, 0.3, (2, height, width)
    )
    low = np.where(coarse.min(0) > 0.5, 7, 0).astype(np.uint8)  # the high alpha sees a class wherever the low one does
    high = np.where(coarse.max(0) > 0.5, 7, 0).astype(np.uint8)
    size = -(-height // 8), -(-width // 8)
    pooled = []
    for labels in (low, high):
        shares = torch.from_numpy(np.stack([labels == 0, labels == 7]).astype(np.float32))
        shares = F.pad(shares, (0, size[1] * 8 - width, 0, size[0] * 8 - height))
        pooled.append(F.avg_pool2d(shares, 8).argmax(0).numpy().astype(np.uint8) * 7)
    found = affinity.cell_labels(torch.from_numpy(affinity.combined_labels(low, high))[None])
    whole = height // 8, width // 8  # smaller cells at the edge are uncertain more often
    expected = affinity.combined_labels(*pooled)
    assert found.shape == (1, *size)
    assert found[0, : whole[0], : whole[1]].tolist() == expected[: whole[0], : whole[1]].tolist()
    assert set(found.unique().tolist()) <= {0, 7, IGNORE}


def test_a_map_without_the_last_partial_cells_has_the_labels_of_the_others() -> None:
    """ConvNeXt rounds the number of cells down: 8 x 8 of an image of 65 x 65 pixels."""
    tree = {"name": "x", "data": {"root": "."}, "model": {"backbone": "narrow"}, "train": {"steps": 1}}
    method = Affinity(parse(tree, "test"))
    features, labels = torch.rand(2, 448, 8, 8), torch.randint(0, 3, (2, 65, 65), dtype=torch.int32)
    batch = Batch(torch.zeros(2, 3, 65, 65), labels, torch.zeros(2, 20), torch.arange(2))
    found, of_whole_cells = (
        method.losses([features], Views([(batch.images,)], batch._replace(pixel_map=pixels))).total
        for pixels in (labels, labels[:, :64, :64])
    )
    assert torch.equal(found, of_whole_cells)


def test_padding_has_no_label() -> None:
    labels = torch.full((1, 16, 16), 4)
    labels[:, :, 8:] = -1
    assert affinity.cell_labels(labels).tolist() == [[[4, IGNORE], [4, IGNORE]]]


@settings(max_examples=15)
@given(SIZES, st.integers(0, 2**31), st.integers(0, 6), st.sampled_from([1.0, 8.0]))
def test_the_walk_is_the_dense_power(size, seed, logt, beta) -> None:
    generator = torch.Generator().manual_seed(seed)
    radius = affinity.fitting_radius(RADIUS, *size)
    features = torch.randn(2, 4, *size, generator=generator)
    scores = torch.rand(2, 3, *size, generator=generator)
    found = walk.random_walk(affinity.pair_affinities(features, radius), scores, radius=radius, beta=beta, logt=logt)
    for own_features, own_scores, own in zip(features, scores, found, strict=True):
        power = dense_transition(own_features.double(), radius, beta)
        for _ in range(logt):
            power = power @ power
        expected = own_scores.flatten(1).double() @ power
        torch.testing.assert_close(own.flatten(1).double(), expected, rtol=0, atol=STEP_ERROR * (1 + 2**logt))


def test_a_step_is_a_mean_over_neighbours() -> None:
    affinities = affinity.pair_affinities(torch.randn(3, 8, 12, 17), RADIUS)
    matrix = walk.transition(affinities, (12, 17), radius=RADIUS, beta=8)
    torch.testing.assert_close(matrix.to_dense().sum(1), torch.ones(3 * 12 * 17))
    constant = torch.ones(3, 2, 12, 17)
    walked = walk.random_walk(affinities, constant, radius=RADIUS, beta=8, logt=5)
    torch.testing.assert_close(walked, constant, rtol=0, atol=STEP_ERROR * 2**5)


def test_images_of_a_batch_do_not_mix() -> None:
    features, scores = torch.randn(3, 8, 11, 13), torch.rand(3, 2, 11, 13)
    affinities = affinity.pair_affinities(features, RADIUS)
    together = walk.random_walk(affinities, scores, radius=RADIUS, beta=8, logt=4)
    for index in range(3):
        own = slice(index, index + 1)
        alone = walk.random_walk(affinities[own], scores[own], radius=RADIUS, beta=8, logt=4)
        torch.testing.assert_close(together[own], alone)


def test_scores_stay_within_regions_and_fill_them() -> None:
    """Of two regions with different features, scores spread from a corner over its region, not into the other."""
    features = torch.zeros(1, 4, 20, 24)
    features[..., 12:] = 5.0
    scores = torch.zeros(1, 2, 20, 24)
    scores[:, 0] = 0.1
    scores[0, 1, 4:10, 2:8] = 1.0
    walked = walk.random_walk(affinity.pair_affinities(features, RADIUS), scores, radius=RADIUS, beta=8, logt=6).argmax(
        1
    )[0]
    assert walked[:15, 4:12].all()
    assert not walked[:, 12:].any()


def test_a_full_hd_image_walks_without_its_dense_matrix() -> None:
    """For 135 x 240 cells the dense matrix alone would take 4.2 GB."""
    affinities = torch.rand(1, 34, 131, 232)
    walked = walk.random_walk(affinities, torch.rand(1, 2, 135, 240), radius=RADIUS, beta=8, logt=1)
    assert walked.shape == (1, 2, 135, 240)
    assert walked.isfinite().all()
