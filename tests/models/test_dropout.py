from __future__ import annotations

import pytest
import torch
from torch import nn

from cpn_fast.models.dropout import SharedDropout, SharedDropout2d


def dropped(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return layer(x)


@pytest.mark.parametrize(("kind", "torchs"), [(SharedDropout, nn.Dropout), (SharedDropout2d, nn.Dropout2d)])
@pytest.mark.parametrize(("views", "world", "images"), [(1, 2, 3), (3, 2, 2), (3, 4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_processes_drop_what_one_would(
    kind: type[SharedDropout], torchs: type[nn.Module], views: int, world: int, images: int, dtype: torch.dtype
) -> None:
    x = torch.randn(views * world * images, 40, 3, 2, dtype=dtype)
    expected = dropped(torchs(0.3), x).unflatten(0, (views, world, images))
    assert torch.equal(dropped(kind(0.3), x), expected.flatten(0, 2))
    for number in range(world):
        layer = kind(0.3)
        layer.number, layer.world, layer.images = number, world, images
        own = x.unflatten(0, (views, world, images))[:, number].flatten(0, 1)
        assert torch.equal(dropped(layer, own), expected[:, number].flatten(0, 1))
        assert torch.equal(layer.eval()(own), own)
