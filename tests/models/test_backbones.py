from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cpn_fast.config import Model
from cpn_fast.models import Backbone, build_backbone
from cpn_fast.models.mobilenet_v2 import Folded, dilated_depthwise
from cpn_fast.models.narrow import StandardisedConv2d

NAMES = ("resnet38d", "mobilenet_v2", "narrow")
PARAMETERS = {"resnet38d": (105_070_912, 104_202_240), "mobilenet_v2": (2_223_872, 2_175_184)}


def on_meta(name: str) -> Backbone:
    with torch.device("meta"):
        return build_backbone(Model(backbone=name))


def with_used_statistics(backbone: Backbone) -> Backbone:
    """Set batch normalisation that is not an identity, as in pretrained weights."""
    generator = torch.Generator().manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for tensor, low, high in (
                (module.weight, 0.5, 2.0),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.1, 1.0),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return backbone


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_trainable_parameters(name: str) -> None:
    parameters = list(on_meta(name).parameters())
    total, convolutions_that_train = PARAMETERS[name]
    assert sum(p.numel() for p in parameters) == total
    assert sum(p.numel() for p in parameters if p.requires_grad) == convolutions_that_train


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_dilated_depthwise_is_the_dilated_convolution(batch: int, height: int, width: int, dilation: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 3, height, width, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    expected = nn.functional.conv2d(x, weight, bias, padding=dilation, dilation=dilation, groups=3)
    found = dilated_depthwise(x, weight, bias, dilation)
    assert torch.allclose(found, expected, atol=1e-12)
    factor = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * factor).sum(), (x, weight)),
        torch.autograd.grad((expected * factor).sum(), (x, weight)),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-12)


def test_autocast_to_bf16_keeps_mobilenet_s_features() -> None:
    """On a CPU its dilated layers then take the path of the test above."""
    torch.manual_seed(0)
    backbone = with_used_statistics(build_backbone(Model(backbone="mobilenet_v2")))
    images = torch.randn(2, 3, 65, 97).contiguous(memory_format=torch.channels_last)
    expected = backbone(images).last
    with torch.autocast("cpu", torch.bfloat16):
        found = backbone(images).last
    assert found.shape == expected.shape
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_narrow_is_small_and_trains_whole() -> None:
    parameters = list(build_backbone(Model(backbone="narrow")).parameters())
    assert 200_000 < sum(p.numel() for p in parameters) < 1_000_000
    assert all(p.requires_grad for p in parameters)


def test_narrow_standardises_its_filters() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    convolution = StandardisedConv2d(3, 8, 3)
    expected = convolution(images)
    with torch.no_grad():
        convolution.weight.mul_(3).add_(5)
    torch.testing.assert_close(convolution(images), expected, rtol=1e-3, atol=1e-3)


def test_narrow_learns_from_random_weights() -> None:
    """Vertical and horizontal stripes of the same colours are distinguished after a few steps."""
    torch.manual_seed(0)
    stripes = torch.sin(torch.arange(32) * 0.8).expand(3, 32, 32)
    images = torch.stack([stripes, stripes.transpose(1, 2)]).repeat(8, 1, 1, 1) + 0.5 * torch.randn(16, 3, 32, 32)
    labels = torch.arange(16) % 2
    backbone, head = build_backbone(Model(backbone="narrow")), nn.Linear(96, 2)
    optimiser = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.05, momentum=0.9)
    for _ in range(30):
        loss = nn.functional.cross_entropy(head(backbone(images).last.mean((2, 3))), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05


def test_resnet38d_has_the_released_layers_and_names() -> None:
    backbone = on_meta("resnet38d")
    modules = list(backbone.modules())
    assert sum(isinstance(module, nn.Conv2d) for module in modules) == 43
    assert sum(isinstance(module, nn.BatchNorm2d) for module in modules) == 37
    state = backbone.state_dict()
    assert len(state) == 228  # 233 of the released CPN without its five heads
    for key, shape in {
        "conv1a.weight": (64, 3, 3, 3),
        "b2.conv_branch1.weight": (128, 64, 1, 1),
        "b2_1.conv_branch2a.weight": (128, 128, 3, 3),
        "b4_5.bn_branch2b1.running_var": (512,),
        "b5.conv_branch2b1.weight": (1024, 512, 3, 3),
        "b6.bn_branch2b2.weight": (1024,),
        "b7.conv_branch2b2.weight": (4096, 2048, 1, 1),
        "bn7.num_batches_tracked": (),
    }.items():
        assert tuple(state[key].shape) == shape


def test_resnet38d_dilates_and_drops_as_released() -> None:
    modules = dict(on_meta("resnet38d").named_modules())
    dilated = {
        name: module.dilation[0]
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1)
    }
    assert dilated == {
        "b5.conv_branch2b1": 2,
        "b5_1.conv_branch2a": 2,
        "b5_1.conv_branch2b1": 2,
        "b5_2.conv_branch2a": 2,
        "b5_2.conv_branch2b1": 2,
        "b6.conv_branch2b1": 4,
        "b7.conv_branch2b1": 4,
    }
    dropped = {name: module.p for name, module in modules.items() if isinstance(module, nn.Dropout2d)}
    assert dropped == {"b6.dropout_2b1": 0.3, "b6.dropout_2b2": 0.3, "b7.dropout_2b1": 0.5, "b7.dropout_2b2": 0.5}


def test_resnet38d_inner_features_are_the_activated_inputs_of_b5_and_b6() -> None:
    torch.manual_seed(0)
    backbone = with_used_statistics(build_backbone(Model(backbone="resnet38d"))).eval()
    inputs: dict[str, Tensor] = {}
    for name in ("b5", "b6"):
        backbone.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0])
        )
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 24, 17))
        for feature, name in ((features.low, "b5"), (features.middle, "b6")):
            expected = torch.relu(backbone.get_submodule(f"{name}.bn_branch2a")(inputs[name]))
            torch.testing.assert_close(feature, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(448, 448), (375, 500), (225, 33), (1, 9)])
def test_features_have_three_ceil_halvings_and_the_stated_channels(name: str, size: tuple[int, int]) -> None:
    backbone = on_meta(name)
    features = backbone(torch.empty(2, 3, *size, device="meta"))
    h, w = (math.ceil(side / 8) for side in size)
    assert [tuple(feature.shape) for feature in features] == [(2, c, h, w) for c in backbone.channels]


def test_narrow_s_inner_features_are_about_as_large_as_the_image_beside_them() -> None:
    torch.manual_seed(0)
    images = 2 * torch.rand(2, 3, 64, 96) - 1
    with torch.no_grad():
        features = build_backbone(Model(backbone="narrow"))(images)
    for inner in (features.low, features.middle):
        assert 0.25 < inner.square().mean().sqrt() / images.square().mean().sqrt() < 2


@pytest.mark.parametrize("name", ["mobilenet_v2", "narrow"])
def test_features_stay_channels_last_and_equal_the_contiguous_ones(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(Model(backbone=name)).eval()
    images = torch.randn(2, 3, 33, 65)
    with torch.no_grad():
        plain = backbone(images)
        to_last: Any = backbone.to  # its stub does not know memory_format
        last = to_last(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    for a, b in zip(plain, last, strict=True):
        assert b.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_train_and_eval_return_the_backbone_and_keep_what_is_frozen(name: str) -> None:
    backbone = on_meta(name)
    assert backbone.eval() is backbone
    backbone.requires_grad_(True)
    assert backbone.train() is backbone
    assert backbone.training
    for key, module in backbone.named_modules():
        frozen = any(key == stem or key.startswith(f"{stem}.") for stem in backbone.frozen)
        if isinstance(module, nn.BatchNorm2d):
            assert not module.training
            assert not any(p.requires_grad for p in module.parameters())
        elif isinstance(module, nn.Conv2d):
            assert module.training
            assert module.weight.requires_grad == (not frozen)


def test_training_a_backbone_inside_another_module_keeps_batch_statistics() -> None:
    backbone = build_backbone(Model(backbone="mobilenet_v2"))
    outer = nn.Sequential(backbone).train()
    before = copy.deepcopy(backbone.state_dict())
    outer[0](torch.randn(2, 3, 33, 33) + 5).last.sum().backward()
    after = backbone.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert backbone.get_parameter("features.4.conv.0.0.weight").grad is not None
    assert backbone.get_parameter("features.3.conv.0.0.weight").grad is None


@pytest.mark.parametrize(
    ("name", "block"), [("resnet38d", "b5_1"), ("mobilenet_v2", "features.12"), ("narrow", "last")]
)
def test_forward_hooks_fire(name: str, block: str) -> None:
    backbone = on_meta(name)
    seen = []
    backbone.get_submodule(block).register_forward_hook(lambda *_: seen.append(block))
    backbone(torch.empty(1, 3, 16, 16, device="meta"))
    assert seen == [block]


def test_every_fourth_feature_of_mobilenet_equals_the_undilated_network() -> None:
    torch.manual_seed(0)
    backbone = with_used_statistics(build_backbone(Model(backbone="mobilenet_v2"))).eval()
    original = copy.deepcopy(backbone)
    for module in original.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation, module.padding = (1, 1), (1, 1)
    for index in (7, 14):  # where only the published network has stride 2
        vars(original.get_submodule(f"features.{index}.conv.1.0"))["stride"] = (2, 2)
    images = torch.randn(1, 3, backbone.fit(100), backbone.fit(60))
    with torch.no_grad():
        last, expected = backbone(images).last, original(images).last
    assert expected.shape[2:] == (4, 3)
    assert expected.std() > 0.01
    torch.testing.assert_close(last[:, :, ::4, ::4], expected, rtol=1e-4, atol=1e-5)


def test_folded_batch_normalisation_has_the_same_outputs_and_gradients() -> None:
    torch.manual_seed(0)
    backbone = with_used_statistics(build_backbone(Model(backbone="mobilenet_v2"))).double()
    images = torch.randn(2, 3, 33, 33, dtype=torch.double)
    results = []
    for forward in (Folded.forward, nn.Sequential.forward):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Folded, "forward", forward)
            backbone.zero_grad()
            last = backbone(images).last
            last.square().sum().backward()
        results.append([last.detach(), *(p.grad.clone() for p in backbone.parameters() if p.grad is not None)])
    assert len(results[0]) == 1 + 52 - 9  # the output, and every convolution except the frozen ones
    for folded, plain in zip(*results, strict=True):
        torch.testing.assert_close(folded, plain)


@pytest.mark.parametrize("size", [1, 33, 48, 49, 50, 224, 225, 375, 500])
def test_mobilenet_fits_the_nearest_32k_plus_1(size: int) -> None:
    fitted = on_meta("mobilenet_v2").fit(size)
    assert fitted % 32 == 1
    assert fitted >= 33
    assert abs(fitted - size) <= 16 or size < 33


@pytest.mark.parametrize("name", ["resnet38d", "narrow"])
def test_other_backbones_take_any_size(name: str) -> None:
    assert on_meta(name).fit(375) == 375


@pytest.mark.parametrize("name", NAMES)
def test_blocks_computed_again_give_the_same_gradients(name: str) -> None:
    """It holds with ResNet38d's dropout, and less is kept for the backward pass."""

    def gradients(recomputes: bool) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(0)
        backbone = with_used_statistics(build_backbone(Model(backbone=name))).train()
        backbone.recomputes = recomputes
        images, kept = torch.randn(2, 3, 33, 33), {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = backbone(images)
        sum(feature.square().mean() for feature in features).backward()
        return {key: p.grad for key, p in backbone.named_parameters() if p.grad is not None}, sum(kept.values())

    (plain, all_kept), (again, inputs_kept) = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert inputs_kept < 0.8 * all_kept
