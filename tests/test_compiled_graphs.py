"""What ``torch.compile`` makes of the networks and losses: one graph each, and in it our operators.

``python -m pytest tests/interpreted_kernels.py`` (TRITON_INTERPRET=1) asks the same of the Triton operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from cpn_fast import config, kernels
from cpn_fast.config import Config
from cpn_fast.methods import METHODS, Method
from cpn_fast.pipelines.training import Batch

REFINED = ["pixel_correlation", "region_pooling", "region_correlation"]
LOSSES = ["complementary_losses", "background_suppression"]
# Method, changes of the config, operators in the network's graph and in that of the losses.
CASES = {
    "cam": ({"method": "cam", "model": {"pcm": False, "prcm": False}, "cam": {"map": "raw"}}, [], []),
    "seam": ({"method": "seam", "model": {"prcm": False}}, REFINED[:1], LOSSES[1:]),
    "seam_prcm": ({"method": "seam"}, REFINED, LOSSES[1:]),
    "cpn": ({}, REFINED, LOSSES),
    "cpn_grid": ({"patches": {"kind": "grid", "grid_sizes": [8]}}, REFINED, LOSSES),
}


class Graphs:
    """A backend of torch.compile that runs what it is given and remembers our operators in it."""

    def __init__(self) -> None:
        self.forward: list[set[str]] = []
        self.backward: list[set[str]] = []
        self.backend = aot_autograd(fw_compiler=self._into(self.forward), bw_compiler=self._into(self.backward))

    def _into(self, found: list[set[str]]) -> Callable[..., Any]:
        def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
            names = (str(node.target) for node in module.graph.nodes)
            found.append({name.split(".")[1] for name in names if name.startswith("cpn_fast.")})
            return module

        return compiler


def batch_of(settings: Config, side: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    cells = torch.arange(side) // 8
    return Batch(
        torch.randn(2, 3, side, side, generator=generator),
        (cells[:, None] * 4 + cells).int().expand(2, side, side).contiguous(),
        (torch.rand(2, len(settings.classes), generator=generator) < 0.6).float(),
        torch.arange(2),
    )


def step_graphs(method: Method, batch: Batch) -> tuple[Graphs, Graphs]:
    """Of the network and of the losses, as a compiled step has them; a graph break is an error."""
    network, losses = Graphs(), Graphs()
    views = method.views(batch, torch.Generator())
    forward = torch.compile(method.network.train(), backend=network.backend, fullgraph=True, dynamic=False)
    outputs = [forward(*inputs) for inputs in views.inputs]
    compute = torch.compile(method.losses, backend=losses.backend, fullgraph=method.capturable, dynamic=False)
    compute(outputs, views).total.backward()
    return network, losses


def check_graphs(settings: Config, network_ops: list[str], loss_ops: list[str], suffix: Callable[[str], str]) -> None:
    torch._dynamo.reset()
    method = METHODS[settings.method](settings)
    network, losses = step_graphs(method, batch_of(settings))
    assert len(network.forward) == len(method.views(batch_of(settings), torch.Generator()).inputs)
    expected = {f"{name}_{suffix(name)}" for name in network_ops if suffix(name)}
    for forward, backward in zip(network.forward, network.backward, strict=True):
        assert expected == forward
        # Operators' derivatives are operators of their own; the CAM of the refinement is a constant.
        assert {f"{name}_backward" for name in expected} == backward
    found = set().union(*losses.forward)
    assert found == {f"{name}_{suffix(name)}" for name in loss_ops}


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_step_holds_our_operators(name: str, tiny_config) -> None:
    changes, network_ops, loss_ops = CASES[name]
    settings = config.load(tiny_config(**changes))
    # On a CPU the region operators are eager's formulas, which are as fast there.
    check_graphs(settings, network_ops, loss_ops, lambda op: "" if op.startswith("region") else "tiled")


class Correlation(nn.Module):
    def forward(self, cam: Tensor, embedding: Tensor) -> Tensor:
        return kernels.pixel_correlation(cam, embedding)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_needs_no_operator_of_ours(strict: bool) -> None:
    cam, embedding = torch.rand(1, 3, 5, 6), torch.randn(1, 8, 5, 6)
    program = torch.export.export(Correlation(), (cam, embedding), strict=strict)
    assert not [node for node in program.graph.nodes if "cpn_fast" in str(node.target)]
    torch.testing.assert_close(program.module()(cam, embedding), kernels.pixel_correlation(cam, embedding))
    # And what was exported does not decide what is compiled.
    graphs = Graphs()
    torch.compile(Correlation(), backend=graphs.backend, fullgraph=True)(cam, embedding)
    assert graphs.forward == [{"pixel_correlation_tiled"}]
