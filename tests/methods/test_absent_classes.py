"""Classes that no image shows: with ``init``'s ``loss.hard_share``, eq. 15 and SEAM's ECR are the same without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cpn_fast.commands.init import hard_share
from cpn_fast.kernels import complementary_losses
from cpn_fast.methods.seam import equivariance_losses


def cpcr(maps: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return eq. 15 with ``init``'s share, and its gradient. ``maps``: (N, 1 + C, h, w) of the whole image."""
    raw = torch.stack([maps, maps.roll(1, 3), maps.roll(1, 2)])
    refined = raw.flip(4).requires_grad_()
    visible = torch.full_like(labels[:, 0], 0.4)
    share = hard_share(labels.shape[1])
    loss = complementary_losses(raw, refined, visible, labels, size=(20, 15), hard_share=share).cpcr
    return loss, torch.autograd.grad(loss, refined)[0]


def ecr(maps: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return ECR with ``init``'s share, and its gradient."""
    refined = maps.flip(3).requires_grad_()
    _, loss = equivariance_losses(
        [maps, maps[..., ::2, ::2]],
        [refined, refined[..., ::2, ::2]],
        labels,
        sizes=[(20, 15), (10, 8)],
        how="min-max",
        hard_share=hard_share(labels.shape[1]),
    )
    return loss, torch.autograd.grad(loss, refined)[0]


@pytest.mark.parametrize("loss", [cpcr, ecr])
@pytest.mark.parametrize("classes", [4, 5, 8, 19])
def test_adding_absent_classes_changes_nothing(loss: Any, classes: int) -> None:
    maps = torch.rand(3, 21, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(classes))
    labels = torch.zeros(3, 20, dtype=torch.float64)
    for row, tags in zip(labels, ([0], [1, 3], [0, 2, 3]), strict=True):
        row[tags] = 1
    few, few_gradient = loss(maps[:, : 1 + classes].clone(), labels[:, :classes])
    all_, all_gradient = loss(maps, labels)
    torch.testing.assert_close(few, all_, rtol=1e-3, atol=0)  # the share has four digits
    at = (..., slice(0, 1 + classes), slice(None), slice(None))
    torch.testing.assert_close(few_gradient, all_gradient[at], rtol=1e-3, atol=1e-9)
