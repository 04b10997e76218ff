from __future__ import annotations

import pytest
import torch
from torch import nn

from cpn_fast.models.dropout import SharedDropout2d


def dropped(layer: nn.Dropout2d, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return layer(x)


@pytest.mark.parametrize(("views", "world", "images"), [(1, 2, 3), (3, 2, 2), (3, 4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_processes_drop_what_one_would(views: int, world: int, images: int, dtype: torch.dtype) -> None:
    x = torch.randn(views * world * images, 40, 3, 2, dtype=dtype)
    expected = dropped(nn.Dropout2d(0.3), x).unflatten(0, (views, world, images))
    assert torch.equal(dropped(SharedDropout2d(0.3), x), expected.flatten(0, 2))
    for number in range(world):
        layer = SharedDropout2d(0.3)
        layer.number, layer.world, layer.images = number, world, images
        own = x.unflatten(0, (views, world, images))[:, number].flatten(0, 1)
        assert torch.equal(dropped(layer, own), expected[:, number].flatten(0, 1))
        assert torch.equal(layer.eval()(own), own)
