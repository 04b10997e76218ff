"""Depthwise convolutions of training on a CPU in bf16, forward and backward: torch's, ours and the ratio.

MobileNetV2 splits a dilated convolution into plain ones. timm's depthwise convolutions compute in fp32. The layers have
the sizes of 8 images of 225 px at stride 16. The last rows are whole backbones; they need timm.

    python bench/depthwise.py [--out FOLDER]
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from timing import arguments, call_times, folder, machine, milliseconds, print_table, write_json
from torch import Tensor, nn

from cpn_fast.config import Model
from cpn_fast.models import build_backbone, timm_backbone
from cpn_fast.models.backbone import Features
from cpn_fast.models.mobilenet_v2 import dilated_depthwise
from cpn_fast.runtime.precision import computes

BATCH, SIDE = 8, 225
LAYERS = (  # name, channels, kernel, dilation, height and width, whether MobileNetV2 splits it
    ("MobileNetV2's last", 960, 3, 2, 15, True),
    ("EfficientNet-Lite2's last 5x5", 1248, 5, 2, 15, False),
    ("EfficientNet-Lite2's 5x5 before it", 720, 5, 1, 15, False),
    ("EfficientNet-Lite2's plain 3x3", 528, 3, 1, 15, False),
)
BACKBONES = ("tf_efficientnet_lite0", "tf_efficientnet_lite2", "mobilenetv3_large_100")
Ways = dict[str, Callable[[Tensor], Any]]


def step(network: Callable[[Tensor], Any], images: Tensor) -> None:
    """Run a layer or a backbone forward and backward."""
    with torch.autocast("cpu", torch.bfloat16):
        out = network(images)
    (out.last if isinstance(out, Features) else out).float().sum().backward()


def ways_of_layer(channels: int, kernel: int, dilation: int, split: bool) -> Ways:
    """Return torch's layer and ours: ``split`` is MobileNetV2's way, otherwise timm's."""
    padding = dilation * (kernel // 2)
    torchs, ours = (
        nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation, groups=channels, bias=False)
        for _ in range(2)
    )
    if split:
        return {"torch, bf16": torchs, "ours, split": lambda x: dilated_depthwise(x, torchs.weight, None, dilation)}
    timm_backbone.widen_depthwise(ours)
    return {"torch, bf16": torchs, "ours, fp32": ours}


def ways_of_backbone(name: str) -> Ways:
    options = Model(backbone=f"timm:{name}", stride=16)
    with mock.patch.object(timm_backbone, "widen_depthwise"):
        torchs = build_backbone(options)
    ours = build_backbone(options)
    for network in (torchs, ours):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {"torch, bf16": torchs, "ours, fp32": ours}


def main() -> None:
    options = arguments(__doc__).parse_args()
    device = torch.device("cpu")
    if not computes("bf16", device):
        sys.exit("This CPU does not compute bf16, so training on it uses fp32: there is nothing to compare")
    described, target = machine(device), folder(options.out, device)
    rows: list[dict[str, Any]] = []

    def measure(what: str, images: Tensor, ways: Ways) -> None:
        images = images.contiguous(memory_format=torch.channels_last)
        times = {
            way: milliseconds("call", call_times(functools.partial(step, run, images), device))
            for way, run in ways.items()
        }
        torchs, ours = (columns["call ms"] for columns in times.values())
        for way, columns in times.items():
            rows.append({"what": what, "way": way, **columns, "times faster": torchs / ours if "ours" in way else None})
        write_json(target / "depthwise.json", described, rows)

    for name, channels, kernel, dilation, side, split in LAYERS:
        images = torch.randn(BATCH, channels, side, side).bfloat16().requires_grad_()
        measure(
            f"{name}: {channels} channels, {kernel}x{kernel}, dilation {dilation}",
            images,
            ways_of_layer(channels, kernel, dilation, split),
        )
    if importlib.util.find_spec("timm") is not None:
        for name in BACKBONES:
            measure(f"timm's {name}", torch.randn(BATCH, 3, SIDE, SIDE), ways_of_backbone(name))
    print_table("Depthwise convolutions on a CPU in bf16, forward and backward", rows)


if __name__ == "__main__":
    main()
