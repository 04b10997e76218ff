from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from cpn_fast.config import Config
from cpn_fast.config_file import parse
from cpn_fast.methods.seam import Seam, equivariance_losses
from cpn_fast.models.network import Cams
from cpn_fast.pipelines.batch import Batch


def settings(**changes: dict) -> Config:
    tree = {
        "name": "x",
        "classes": ["a", "b", "c", "d", "e"],
        "method": "seam",
        "data": {"root": "nowhere"},
        "model": {"backbone": "narrow", "prcm": False},
        "train": {"steps": 1},
        **changes,
    }
    return parse(tree, "test")


def batch(labels: list[list[int]], side: int = 40) -> Batch:
    count = len(labels)
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    return Batch(images, None, torch.tensor(labels, dtype=torch.float32), torch.arange(count))


def plain(raw, refined, labels, sizes, share):
    """Compute released SEAM as described, with every channel at full resolution."""

    def prepared(maps, size):
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=True).clamp(min=0)
        flat = maps.flatten(2)
        low, high = flat.min(2).values[..., None, None], flat.max(2).values[..., None, None]
        stretched = (maps - low - 1e-5).clamp(min=0) / (high - low + 1e-5)
        return F.interpolate(stretched, size=sizes[1], mode="bilinear", align_corners=True) * present

    present = torch.cat([torch.ones_like(labels[:, :1]), labels], 1)[..., None, None]
    cam1, cam2 = (prepared(maps, size) for maps, size in zip(raw, sizes, strict=True))
    rv1, rv2 = (prepared(maps, size) for maps, size in zip(refined, sizes, strict=True))
    er = (cam1[:, 1:] - cam2[:, 1:]).abs().sum() / cam1[:, 1:].numel()

    def target(cam):
        best = cam[:, 1:].max(1, keepdim=True).values
        return torch.cat([1 - best, cam[:, 1:] * (cam[:, 1:] == best)], 1).detach()

    ecr = 0
    for wanted, given in ((target(cam2), rv1), (target(cam1), rv2)):
        for image in (wanted - given).abs():
            largest = image.flatten().sort(descending=True).values[: int(share * image.numel())]
            ecr = ecr + largest.mean() / len(labels)
    return er, ecr


@pytest.mark.parametrize("labels", [[[1, 0, 0, 0, 0], [0, 1, 1, 0, 0]], [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]])
@pytest.mark.parametrize("share", [0.2, 0.05])
@pytest.mark.parametrize("compiled", [False, True])  # compiled code does what a GPU does: it enlarges all maps
def test_losses_and_gradients_are_those_of_the_plain_formula(labels, share, compiled) -> None:
    torch.manual_seed(len(labels[0]))
    raw = [torch.randn(2, 6, *shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 6), (3, 2))]
    refined = [torch.rand(2, 6, *shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 6), (3, 2))]
    sizes, tags = [(50, 43), (15, 13)], torch.tensor(labels, dtype=torch.float64)
    compute = equivariance_losses
    if compiled:
        compute = torch.compile(compute, backend="aot_eager", fullgraph=True, dynamic=False)
    ours = compute(raw, refined, tags, sizes=sizes, how="min-max", hard_share=share)
    theirs = plain(raw, refined, tags, sizes, share)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)
        maps = [*raw, *refined]
        for name, a, b in zip(
            ("raw", "raw small", "refined", "refined small"),
            torch.autograd.grad(mine, maps, retain_graph=True, allow_unused=True),
            torch.autograd.grad(expected, maps, retain_graph=True, allow_unused=True),
            strict=True,
        ):
            if b is None:
                assert a is None or not a.any(), name
            else:
                torch.testing.assert_close(a, b, msg=partial("{}: {}".format, name))


def test_er_trains_both_scales_and_ecr_the_refined_maps_alone() -> None:
    torch.manual_seed(0)
    raw = [torch.randn(1, 3, side, side, requires_grad=True) for side in (8, 4)]
    refined = [torch.rand(1, 3, side, side, requires_grad=True) for side in (8, 4)]
    er, ecr = equivariance_losses(
        raw, refined, torch.tensor([[1.0, 0]]), sizes=[(32, 32), (16, 16)], how="min-max", hard_share=0.2
    )
    assert all(g is not None and g.abs().sum() > 0 for g in torch.autograd.grad(er, raw, retain_graph=True))
    assert all(g is None for g in torch.autograd.grad(er, refined, retain_graph=True, allow_unused=True))
    assert all(g is not None and g.abs().sum() > 0 for g in torch.autograd.grad(ecr, refined, retain_graph=True))
    assert all(g is None for g in torch.autograd.grad(ecr, raw, allow_unused=True))


def test_second_view_is_the_image_scaled_down_to_what_the_backbone_takes() -> None:
    given = batch([[1, 0, 0, 0, 0]])
    (images, _), (small, _) = Seam(settings(seam={"scale": 0.5})).views(given, torch.Generator()).inputs
    assert torch.equal(images, given.images)
    expected = F.interpolate(given.images, (20, 20), mode="bilinear", align_corners=True)
    torch.testing.assert_close(small, expected)
    mobile = settings(model={"backbone": "mobilenet_v2", "prcm": False}, seam={"scale": 0.5})
    assert Seam(mobile).views(batch([[1, 0, 0, 0, 0]], 129), torch.Generator()).inputs[1][0].shape[2:] == (65, 65)


def test_total_is_the_weighted_sum_and_weights_switch_terms_off() -> None:
    given = batch([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    outputs = [Cams(torch.randn(2, 6, side, side), torch.rand(2, 6, side, side)) for side in (5, 2)]

    def losses(**changes: dict):
        method = Seam(settings(**changes))
        return method.losses(outputs, method.views(given, torch.Generator()))

    full = losses()
    assert set(full.parts) == {"classification", "background_suppression", "er", "ecr"}
    torch.testing.assert_close(full.total, torch.stack(list(full.parts.values())).sum())
    assert full.logits is not None
    assert full.logits.shape == (2, 5)
    weighted = losses(seam={"er": 0, "ecr": 3}, loss={"background_suppression": 0})
    torch.testing.assert_close(weighted.total, full.parts["classification"] + 3 * full.parts["ecr"])
