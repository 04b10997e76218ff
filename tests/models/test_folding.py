from __future__ import annotations

import copy

import pytest
import torch
from test_backbones import with_used_statistics
from torch import Tensor, nn

from cpn_fast.config_file import parse
from cpn_fast.methods.segmentation import Segmentation
from cpn_fast.models.folding import fold
from cpn_fast.models.network import build_network


def config(backbone: str):
    data = {"root": "."}
    return parse(
        {"name": "x", "classes": ["a", "b"], "data": data, "model": {"backbone": backbone}, "train": {"steps": 1}}, ""
    )


def outputs(network: nn.Module) -> list[Tensor]:
    images = torch.randn(2, 3, 33, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = network(images)
    return [found] if isinstance(found, Tensor) else list(found)


@pytest.mark.parametrize(("backbone", "left"), [("resnet38d", 17), ("mobilenet_v2", 0), ("narrow", 0)])
def test_folded_networks_give_the_same(backbone: str, left: int, tmp_path) -> None:
    settings = config(backbone)
    cams = build_network(settings)
    deeplab = Segmentation(settings, tmp_path).network if backbone == "mobilenet_v2" else None
    for network in filter(None, (cams, deeplab)):
        torch.manual_seed(0)
        with_used_statistics(network)
        network.double().eval()
        expected = outputs(copy.deepcopy(network))
        folded = fold(network)
        assert folded is network
        assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left
        for found, before in zip(outputs(folded), expected, strict=True):
            torch.testing.assert_close(found, before, rtol=1e-10, atol=1e-10 * float(before.abs().max()))
