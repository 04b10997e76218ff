"""``torch.compile`` turns the networks and losses into one graph each, with our operators in it.

``python -m pytest tests/kernels/every_kernel.py`` (TRITON_INTERPRET=1) checks the same for Triton operators.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from cpn_fast import config_file, kernels
from cpn_fast.config import Config
from cpn_fast.methods.affinity import Affinity
from cpn_fast.methods.known import METHODS
from cpn_fast.methods.method import Method
from cpn_fast.methods.segmentation import Segmentation
from cpn_fast.pipelines.batch import Batch
from cpn_fast.runtime.distributed import Rank
from cpn_fast.training.step import Step, make_optimizer

CPU = torch.device("cpu")
REFINED = ["pixel_correlation", "region_pooling", "region_correlation"]
LOSSES = ["complementary_losses", "background_suppression"]
# Method, changes of the config, operators in the network's graph and in the losses' graph.
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "cam": ({"method": "cam", "model": {"pcm": False, "prcm": False}, "cam": {"map": "raw"}}, [], []),
    "seam": ({"method": "seam", "model": {"prcm": False}}, REFINED[:1], LOSSES[1:]),
    "seam_prcm": ({"method": "seam"}, REFINED, LOSSES[1:]),
    "cpn": ({}, REFINED, LOSSES),
    "cpn_grid": ({"patches": {"kind": "grid", "grid_sizes": [8]}}, REFINED, LOSSES),
}


class Graphs:
    """A backend of torch.compile that runs graphs unchanged and records our operators in them."""

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


def batch_of(settings: Config, side: int = 32, device: torch.device = CPU) -> Batch:
    generator = torch.Generator().manual_seed(0)
    cells = torch.arange(side) // 8
    return Batch(
        torch.randn(2, 3, side, side, generator=generator).to(device),
        (cells[:, None] * 4 + cells).int().expand(2, side, side).contiguous().to(device),
        (torch.rand(2, len(settings.classes), generator=generator) < 0.6).float().to(device),
        torch.arange(2, device=device),
    )


def step_graphs(method: Method, batch: Batch) -> tuple[Graphs, Graphs]:
    """Return the graphs of the network and of the losses in a compiled step. A graph break is an error."""
    network, losses = Graphs(), Graphs()
    device = batch.images.device
    views = method.views(batch, torch.Generator(device))
    method.network.to(device).train()
    forward = torch.compile(method.network, backend=network.backend, fullgraph=True, dynamic=False)
    outputs = [forward(*inputs) for inputs in views.inputs]
    compute = torch.compile(method.losses, backend=losses.backend, fullgraph=True, dynamic=False)
    compute(outputs, views).total.backward()
    return network, losses


def check_graphs(
    settings: Config,
    network_ops: list[str],
    loss_ops: list[str],
    suffix: Callable[[str], str],
    device: torch.device = CPU,
) -> None:
    torch._dynamo.reset()
    method, batch = METHODS[settings.method](settings), batch_of(settings, device=device)
    network, losses = step_graphs(method, batch)
    assert len(network.forward) == len(method.views(batch, torch.Generator(device)).inputs)
    expected = {f"{name}_{suffix(name)}" for name in network_ops if suffix(name)}
    for forward, backward in zip(network.forward, network.backward, strict=True):
        assert expected == forward
        # An operator's derivative is another operator; the CAM of the refinement is a constant.
        assert {f"{name}_backward" for name in expected} == backward
    found = set().union(*losses.forward)
    assert found == {f"{name}_{suffix(name)}" for name in loss_ops}


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_step_holds_our_operators(name: str, tiny_config) -> None:
    changes, network_ops, loss_ops = CASES[name]
    settings = config_file.load(tiny_config(**changes))
    # On a CPU the region operators are eager's formulas, which are as fast.
    check_graphs(settings, network_ops, loss_ops, lambda op: "" if op.startswith("region") else "tiled")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_step_on_a_gpu_holds_the_triton_operators(name: str, tiny_config) -> None:
    changes, network_ops, loss_ops = CASES[name]
    settings = config_file.load(tiny_config(**changes))
    with torch.autocast("cuda", torch.bfloat16):
        check_graphs(settings, network_ops, loss_ops, lambda op: "triton", torch.device("cuda"))


@pytest.mark.parametrize("kind", ["affinity", "segmentation"])
def test_the_later_trainings_are_one_graph_each(kind: str, tiny_config, tmp_path: Path) -> None:
    """They have no operator of ours, and torch.compile leaves nothing to Python."""
    torch._dynamo.reset()
    settings = config_file.load(tiny_config())
    method: Method = Affinity(settings) if kind == "affinity" else Segmentation(settings, tmp_path)
    batch = batch_of(settings, side=64)
    network, losses = step_graphs(method, batch._replace(pixel_map=batch.pixel_map % (1 + len(settings.classes))))
    for graphs in (network, losses):
        assert (len(graphs.forward), len(graphs.backward)) == (1, 1)


def test_a_step_compiles_network_and_losses_as_they_are_tested_here(tiny_config, monkeypatch) -> None:
    """``Step`` asks torch.compile for static shapes, and calls the compiled network and losses."""
    torch._dynamo.reset()
    graphs, real = Graphs(), torch.compile
    given: list[dict[str, Any]] = []

    def compiled(function: Any, **options: Any) -> Any:
        given.append(options)
        return real(function, backend=graphs.backend, fullgraph=True, dynamic=options["dynamic"])

    monkeypatch.setattr(torch, "compile", compiled)  # nn.Module.compile also calls it
    settings = config_file.load(tiny_config(train={"compile": True}))
    method = METHODS["cpn"](settings)
    method.network.train()
    optimizer = make_optimizer(method.network, settings.train, CPU)
    step = Step(method, optimizer, torch.Generator(), settings.train, Rank(0, 1, 0), CPU)
    figures = step([batch_of(settings)])
    assert figures.values.isfinite().all()
    assert [options["dynamic"] for options in given] == [False, False]
    assert graphs.forward == [{"pixel_correlation_tiled"}, {f"{name}_tiled" for name in LOSSES}]


def test_what_an_operation_takes_and_why() -> None:
    cpu = kernels.backends(CPU, torch.float32)
    assert {name: choice.backend for name, choice in cpu.items()} == {
        **dict.fromkeys(["pixel_correlation", *LOSSES], "tiled"),
        **dict.fromkeys([*REFINED[1:], "slic"], "eager"),
    }
    assert all("CUDA" in (choice.reason or "") for choice in cpu.values())
    with FakeTensorMode():
        cuda = torch.device("cuda")
        assert {choice.backend for choice in kernels.backends(cuda, torch.bfloat16).values()} == {"triton"}
        plain = kernels.backends(cuda, torch.float32)
        assert "TF32" in (plain["pixel_correlation"].reason or "")
        assert plain["complementary_losses"] == plain["slic"] == ("triton", None)
        images = torch.empty(1, 3, 8, 8, device="cuda")  # float32: its products are not TF32
        assert kernels._fitting(kernels._SLIC, images).backend == "triton"
        assert "256" in (kernels.backends(cuda, torch.bfloat16, channels=300)["pixel_correlation"].reason or "")
        assert "float64" in (kernels.backends(cuda, torch.float64)["region_pooling"].reason or "")


class Correlation(nn.Module):
    def forward(self, cam: Tensor, embedding: Tensor) -> Tensor:
        return kernels.pixel_correlation(cam, embedding)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_needs_no_operator_of_ours(strict: bool) -> None:
    cam, embedding = torch.rand(1, 3, 5, 6), torch.randn(1, 8, 5, 6)
    program = torch.export.export(Correlation(), (cam, embedding), strict=strict)
    assert not [node for node in program.graph.nodes if "cpn_fast" in str(node.target)]
    torch.testing.assert_close(program.module()(cam, embedding), kernels.pixel_correlation(cam, embedding))
    # And an export does not change a later compilation.
    graphs = Graphs()
    torch.compile(Correlation(), backend=graphs.backend, fullgraph=True)(cam, embedding)
    assert graphs.forward == [{"pixel_correlation_tiled"}]
