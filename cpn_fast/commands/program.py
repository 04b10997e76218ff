"""A trained network as a program of ``torch.export`` (.pt2) or as ONNX (.onnx), which run without cpn_fast."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpn_fast.kernels import pooled_logits
from cpn_fast.models.backbone import Headed
from cpn_fast.models.network import Network
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import create

EXPORTS = (".pt2", ".onnx")
"""Endings of the files that ``Model.export`` writes."""


def write_program(
    path: Path, graph: nn.Module, other_inputs: Sequence[Tensor], *, side: int, outputs: Sequence[str]
) -> None:
    """Trace ``graph`` with images of ``side`` x ``side`` and the other inputs, and write it. See ``Model.export``.

    ``outputs`` are names for ONNX. Raises UserError if the file cannot be written.
    """
    if path.suffix not in EXPORTS:
        raise UserError(f"{path}: expected a name that ends in {' or '.join(EXPORTS)}")
    if path.suffix == ".onnx" and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise UserError(f"{path}: ONNX needs packages that are not installed: pip install onnx onnxscript")
    device = next(graph.parameters()).device
    free = torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(
            graph.eval().to(device),
            (torch.zeros(2, 3, side, side, device=device), *other_inputs),
            dynamic_shapes=({0: free, 2: free, 3: free}, *({0: free} for _ in other_inputs)),
        )
        create(path, _onnx(program, outputs) if path.suffix == ".onnx" else _saved(program))


class _Normalised(nn.Module):
    """A network with its normalisation: it takes RGB from 0 to 255."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Headed) -> None:
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(network, name)).view(3, 1, 1))

    def normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class CamGraph(_Normalised):
    """The module that ``Model.export`` writes for a ``CamModel``."""

    def __init__(self, network: Network, kind: Literal["refined", "raw"]) -> None:
        super().__init__(network)
        self.kind = kind

    def forward(self, images: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W), RGB from 0 to 255, tags (N, C), 0 or 1 -> probabilities (N, C), maps (N, C, H, W)."""
        size = images.shape[2], images.shape[3]
        cams = self.network(self.normalised(images), tags)
        probabilities = pooled_logits(cams.raw[:, 1:], size=size).sigmoid()
        maps = cams.refined if self.kind == "refined" else F.relu(cams.raw)
        maps = maps[:, 1:] * tags[:, :, None, None]
        return probabilities, F.interpolate(maps, size, mode="bilinear", align_corners=True)


class SegmenterGraph(_Normalised):
    """The module that ``Model.export`` writes for a ``Segmenter``."""

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), RGB from 0 to 255 -> probabilities of background and classes (N, 1 + C, H, W)."""
        logits = self.network(self.normalised(images))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True).softmax(1)


def _saved(program: torch.export.ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _onnx(program: torch.export.ExportedProgram, outputs: Sequence[str]) -> bytes:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of a missing torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        onnx_program = torch.onnx.export(program, dynamo=True, output_names=outputs, verbose=False)
    assert onnx_program is not None
    return onnx_program.model_proto.SerializeToString()
