"""Any convolutional model of timm as a backbone (``model.backbone: timm:NAME``), with timm's names of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpn_fast.config import TIMM
from cpn_fast.models.backbone import Backbone, Features
from cpn_fast.runtime.errors import UserError

INSTALL = "pip install timm torchvision"


class TimmBackbone(Backbone):
    """The features of a timm model's last three stages. The last one includes all layers up to the pooling.

    ``stride`` is 8 or 16; timm dilates later stages. Layers up to output stride 4 and all batch normalisations stay
    frozen. The weights of timm's model ``NAME`` are ``timm.*`` here.

    Raises UserError without timm, for an unknown name, and for a model without this stride or without feature maps.
    """

    name: str
    """timm's name of the model."""
    inner: Tensor
    """float32 (2,): factors that scale low and middle to the rms of images (``measure``); saved with the weights."""

    def __init__(self, name: str, stride: int) -> None:
        super().__init__()
        self.name, self.timm = name, _create(name, stride)
        widen_depthwise(self.timm)
        self.whole = hasattr(self.timm, "forward_features")
        stages = self.timm.feature_info if self.whole else self.timm.feature_info.get_dicts()
        low, middle, last = (stage["num_chs"] for stage in stages[-3:])
        self.channels = (low, middle, self.timm.num_features if self.whole else last)
        settings = self.timm.pretrained_cfg
        self.mean, self.std = (tuple(255.0 * value for value in settings[key]) for key in ("mean", "std"))
        self.classifier = tuple(f"timm.{layer}.*" for layer in _classifiers(settings))
        self.frozen = tuple(f"timm.{leaf}" for leaf in _leaves_to_stride(self.timm, stages, 4))
        self.register_buffer("inner", torch.ones(2))
        self.train()

    def forward(self, images: Tensor) -> Features:
        low, middle, last = self._maps(images)
        # At output stride 16 the low features have a larger size than the others.
        low, middle = (F.interpolate(x, last.shape[2:], mode="bilinear", align_corners=True) for x in (low, middle))
        scale = self.inner.to(low.dtype)
        return Features(scale[0] * low, scale[1] * middle, last)

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if getattr(self.timm, "grad_checkpointing", False) != self.recomputes:
            self.timm.set_grad_checkpointing(self.recomputes)
        if not self.whole:
            low, middle, last = self.timm(images)[-3:]
            return low, middle, last
        last, (low, middle) = self.timm.forward_intermediates(images, indices=[-3, -2])
        return low, middle, last

    def pretrained(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if any(key.startswith("timm.") for key in tensors):  # from one of our runs
            return dict(tensors)
        if "_conv_stem.weight" in tensors:
            tensors = _from_efficientnet_pytorch(tensors)
        return {f"timm.{key}": tensor for key, tensor in tensors.items()}

    @property
    def measured(self) -> bool:
        return bool((self.inner != 1).any())

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Set ``inner`` so that low and middle have the rms of ``images``, normalised (N, 3, H, W)."""
        low, middle, _ = self._maps(images)
        size = images.square().mean().sqrt()
        self.inner.copy_(torch.stack([size / x.float().square().mean().sqrt().clamp(min=1e-12) for x in (low, middle)]))


def pretrained_by_timm(name: str) -> dict[str, Tensor]:
    """Return timm's weights of a model; timm downloads them once. Raises UserError if it cannot."""
    timm = _imported()
    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except Exception as error:  # no network, no weights, a broken cache: many types
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"model.weights: timm has no weights of {name} to give ({type(error).__name__}: {reason}). Name a file of "
            "weights, or download them on a machine with a network"
        ) from None


def _create(name: str, stride: int) -> Any:
    timm = _imported()
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0].rstrip('0123456789')}*")[:8])
        raise UserError(
            f"model.backbone: timm {timm.__version__} has no model {name!r}; found near it: {near or 'none'}"
        )
    options = {"output_stride": stride}
    try:
        try:
            model = timm.create_model(name, num_classes=0, global_pool="", **options)
        except TypeError:  # some families, like MobileNetV3, take a stride only without their last layers
            model = timm.create_model(name, features_only=True, **options)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"model.backbone: timm cannot build {name} at model.stride {stride} ({type(error).__name__}: {error}). "
            "Convolutional models such as resnet50, regnety_016, convnext_tiny or tf_efficientnet_lite2 can be built"
        ) from None
    if len(model.feature_info) < 3:
        raise UserError(f"model.backbone: timm's {name} has fewer than three feature maps; choose another model")
    return model


class _Widened(nn.Conv2d):
    """Comes before a class of convolutions in a subclass: computes in fp32 on a CPU in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).bfloat16()


def widen_depthwise(model: nn.Module) -> None:
    """Let depthwise convolutions compute in fp32 on a CPU in bf16, in place.

    In bf16 torch's backward pass of most of them takes about twice as long there (bench/depthwise.py).
    """
    classes: dict[type, type] = {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            plain = type(module)
            if plain not in classes:
                classes[plain] = type(plain.__name__, (_Widened, plain), {})
            module.__class__ = classes[plain]


def _imported() -> Any:
    try:
        import timm
    except Exception as error:  # a torchvision that does not fit torch raises anything
        raise UserError(f"model.backbone: {TIMM} needs timm ({type(error).__name__}: {error}). {INSTALL}") from None
    return timm


def _classifiers(settings: Mapping[str, Any]) -> tuple[str, ...]:
    layers = settings.get("classifier") or ()
    return (layers,) if isinstance(layers, str) else tuple(layers)


def _leaves_to_stride(model: nn.Module, stages: Sequence[Mapping[str, Any]], stride: int) -> list[str]:
    """Return the modules with weights, from the input to the last stage with an output stride up to ``stride``."""
    ends = [stage["module"].replace(".", "_") for stage in stages if stage["reduction"] <= stride]
    leaves = [name for name, module in model.named_modules() if [*module.parameters(recurse=False)]]
    # Without its last layers a model's stages may be called blocks_1 instead of blocks.1.
    flat = [f"{name.replace('.', '_')}_" for name in leaves]
    inside = [n for n, name in enumerate(flat) if any(name.startswith(f"{end}_") for end in ends)]
    return leaves[: max(inside) + 1] if inside else []


_EXPANDED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"} | {
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def _from_efficientnet_pytorch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of the package efficientnet_pytorch (and its lite models) to timm's names of the same network.

    That package numbers all blocks; timm numbers stages and their blocks. A stage starts where the number of channels
    changes.
    """
    renamed: dict[str, Tensor] = {}
    stages: list[list[int]] = []  # the numbers of each stage's blocks
    widths = {
        int(key.split(".")[1]): len(tensor) for key, tensor in tensors.items() if key.endswith("_project_conv.weight")
    }
    for number in sorted(widths):
        if number - 1 in widths and widths[number - 1] == widths[number]:
            stages[-1].append(number)
        else:
            stages.append([number])
    positions = {number: f"{s}.{i}" for s, stage in enumerate(stages) for i, number in enumerate(stage)}
    for key, tensor in tensors.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
        if block is None:
            layer, _, field = key.partition(".")
            renamed[f"{_OUTSIDE.get(layer, layer)}.{field}"] = tensor
            continue
        index, layer, field = block.groups()
        names = _EXPANDED if f"_blocks.{index}._expand_conv.weight" in tensors else _PLAIN
        renamed[f"blocks.{positions.get(int(index), index)}.{names.get(layer, layer)}.{field}"] = tensor
    return renamed
