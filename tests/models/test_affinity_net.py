from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cpn_fast.config import Model
from cpn_fast.models.affinity_net import build_affinity_net


def test_the_released_names_shapes_and_parameter_count() -> None:
    with torch.device("meta"):
        network = build_affinity_net(Model(backbone="resnet38d"))
    heads = {name: tuple(p.shape) for name, p in network.named_parameters() if not name.startswith("backbone.")}
    assert heads == {
        "f8_3.weight": (64, 512, 1, 1),
        "f8_4.weight": (128, 1024, 1, 1),
        "f8_5.weight": (256, 4096, 1, 1),
        "f9.weight": (448, 448, 1, 1),
    }
    assert sum(p.numel() for p in network.parameters()) == 106_484_032


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "narrow"])
def test_features_of_other_backbones_at_stride_8(backbone) -> None:
    network = build_affinity_net(Model(backbone=backbone, stride=16 if backbone == "mobilenet_v2" else 8))
    images = torch.randn(2, 3, 57, 73)
    found = network(images)
    assert found.shape == (2, 448, 8, 10)
    low, middle, last = network.backbone(images)
    parts = [F.elu(head(x)) for head, x in ((network.f8_3, low), (network.f8_4, middle), (network.f8_5, last))]
    torch.testing.assert_close(found, F.elu(network.f9(torch.cat(parts, 1))))


def test_the_backbone_is_trained_too() -> None:
    network = build_affinity_net(Model(backbone="narrow"))
    network(torch.randn(1, 3, 33, 33)).square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for p in network.get_submodule("backbone.last").parameters()
        if p.ndim > 1
    )
