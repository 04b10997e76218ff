from __future__ import annotations

import torch

from cpn_fast.methods.method import weighted


def test_a_part_of_weight_0_reaches_neither_the_total_nor_its_gradient() -> None:
    one, other = (torch.tensor(x, requires_grad=True) for x in (1.0, 4.0))
    parts = {"one": one * 3, "other": (other - 4).sqrt() / (other - 4)}  # NaN, with a gradient of NaN
    losses = weighted(parts, {"one": 2.0, "other": 0.0}, torch.zeros(1, 2))
    losses.total.backward()
    assert losses.total == 6
    assert one.grad == 6
    assert other.grad is None
    assert losses.parts["other"].isnan()
