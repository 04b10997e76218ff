from __future__ import annotations

import pytest
import torch

from cpn_fast.config import Model
from cpn_fast.config_file import parse
from cpn_fast.kernels import pixel_correlation
from cpn_fast.models import build_backbone
from cpn_fast.models.network import Network, build_network, normalised_cam, printed_correlation
from cpn_fast.training.step import make_optimizer


def network(**options) -> Network:
    torch.manual_seed(0)
    model = Model(backbone="narrow", **options)
    return Network(build_backbone(model), 3, model)


def released(**model):
    tree = {"name": "x", "data": {"root": "."}, "train": {"epochs": 1}, "model": model}
    return parse(tree, "test")


def test_resnet38d_network_has_the_released_counts() -> None:
    with torch.device("meta"):
        net = build_network(released()).train()
    assert sum(p.numel() for p in net.parameters()) == 105_395_648
    assert len(net.state_dict()) == 233
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 104_526_976
    heads = {name: tuple(p.shape) for name, p in net.named_parameters() if not name.startswith("backbone.")}
    assert heads == {
        "fc8.weight": (21, 4096, 1, 1),
        "f8_3.weight": (64, 512, 1, 1),
        "f8_4.weight": (128, 1024, 1, 1),
        "f9.weight": (192, 195, 1, 1),
        "f10.weight": (192, 195, 1, 1),
    }
    groups = make_optimizer(net, released().train, torch.device("cpu")).param_groups
    assert [(len(g["params"]), g["base_lr"]) for g in groups] == [(35, 0.01), (5, 0.1)]
    assert sum(p.numel() for p in groups[0]["params"]) == 104_202_240


def test_refined_map_trains_the_refinement_heads_alone() -> None:
    net = network()
    cams = net(torch.randn(2, 3, 40, 48))
    assert cams.raw.shape == cams.refined.shape == (2, 4, 5, 6)
    cams.refined.square().sum().backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {
        f"{head}.weight" for head in ("f8_3", "f8_4", "f9", "f10")
    }
    net.zero_grad()
    net(torch.randn(2, 3, 40, 48)).raw.square().sum().backward()
    got = {name for name, p in net.named_parameters() if p.grad is not None}
    assert "fc8.weight" in got
    assert not any(name.startswith(("f8", "f9", "f10")) for name in got)


def test_input_of_the_refinement_keeps_each_pixels_best_class() -> None:
    cam = torch.randn(2, 5, 6, 7)
    out = normalised_cam(cam)
    foreground = out[:, 1:]
    assert ((foreground > 0).sum(dim=1) <= 1).all()
    torch.testing.assert_close(out[:, 0], 1 - foreground.amax(dim=1))
    assert foreground.amax(dim=(2, 3)).max() <= 1
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])
    masked = normalised_cam(cam, labels)[:, 1:]
    assert masked[labels == 0].abs().max() == 0
    assert masked[1, 2].max() > 0.99


def test_a_map_without_activation_is_background() -> None:
    out = normalised_cam(-torch.rand(1, 3, 4, 4))
    assert (out[:, 0] == 1).all()
    assert (out[:, 1:] == 0).all()


def test_printed_correlation_with_released_options_is_the_kernel() -> None:
    cam, embedding = torch.rand(2, 4, 5, 7), torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(
        printed_correlation(cam, embedding, norm="l2", total="column"),
        pixel_correlation(cam, embedding, backend="eager"),
    )


def test_printed_norm_and_sum_follow_equations_9_and_10() -> None:
    cam, embedding = torch.rand(1, 2, 2, 2).double(), torch.randn(1, 3, 2, 2).double()
    g = embedding.flatten(2)[0]
    expected = torch.zeros(2, 4, dtype=torch.float64)
    total = torch.tensor(1e-5, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            product = torch.dot(g[:, i], g[:, j])
            affinity = product.relu() / ((g[:, i].abs().sum() ** 2 + 1e-5) * (g[:, j].abs().sum() ** 2 + 1e-5))
            expected[:, j] += cam.flatten(2)[0, :, i] * affinity
            total = total + affinity
    printed = printed_correlation(cam, embedding, norm="l1-squared", total="all")
    # The tolerance is for the op's float32, and for eps next to small sums.
    torch.testing.assert_close(printed.flatten(2)[0].double(), expected / total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("scale", ["classes", "one"])
@pytest.mark.parametrize("layout", ["reread", "transposed"])
def test_the_region_term_is_eq_11_with_the_options_asked_for(layout: str, scale: str, relu: bool) -> None:
    net = network(pcm=False, prcm_keys=layout, prcm_scale=scale, prcm_relu=relu)
    cam, context = torch.rand(2, 4, 3, 5), torch.randn(2, 195, 3, 5)
    queries = net.f9(context).flatten(2)
    regions = torch.einsum("ncp,ndp->ncd", cam.flatten(2).softmax(2), context.flatten(2))
    keys = regions @ net.f10.weight[:, :, 0, 0].T  # (2, 4, 192): the transposed layout
    if relu:
        keys, queries = torch.relu(keys), torch.relu(queries)
    if layout == "reread":
        keys = keys.transpose(1, 2).contiguous().view(2, 4, 192)
    similarity = (keys @ queries * (4**-0.5 if scale == "classes" else 1.0)).softmax(2)
    expected = cam * similarity.view_as(cam)
    torch.testing.assert_close(net._region_term(cam, context, net.f9(context)), expected, rtol=1e-4, atol=1e-6)


def test_options_switch_parts() -> None:
    images = torch.randn(1, 3, 32, 32)
    plain = network(pcm=False, prcm=False)
    assert plain(images).refined is None
    assert {name.split(".")[0] for name in plain.state_dict()} == {"backbone", "fc8"}
    assert "f10.weight" not in network(prcm=False).state_dict()
    both, one = network().eval()(images), network(prcm=False).eval()(images)
    assert not torch.equal(both.refined, one.refined)
    with pytest.raises(ValueError, match="labels"):
        network(mask_absent=True)(images)
    masked = network(mask_absent=True).eval()(images, torch.tensor([[1.0, 0, 0]]))
    assert masked.refined[:, 2:].abs().max() == 0
