from __future__ import annotations

import functools
import struct
import tempfile
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from cpn_fast.config import Model
from cpn_fast.models import build_backbone, weights
from cpn_fast.models.resnet38d import Block
from cpn_fast.models.weights import convert, load_into, read_weights, to_network_keys, to_released_keys
from cpn_fast.runtime.errors import UserError
from cpn_fast.training import run_folder

MAGICS = {"V2": 0xF993FAC9, "V1": 0xF993FAC8, "legacy": None}
CODES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}


def params_array(array: np.ndarray, version: str) -> bytes:
    magic = MAGICS[version]
    head = b"" if magic is None else struct.pack("<I", magic)
    head += struct.pack("<i", 0) if version == "V2" else b""
    dims = struct.pack(f"<I{array.ndim}{'I' if magic is None else 'q'}", array.ndim, *array.shape)
    return head + dims + struct.pack("<iii", 1, 0, CODES[array.dtype.name]) + array.tobytes()


def params_bytes(arrays: Mapping[str, np.ndarray], version: str = "V2") -> bytes:
    """Return the bytes that MXNet's ``nd.save`` writes."""
    names = b"".join(struct.pack("<Q", len(name)) + name.encode() for name in arrays)
    count = struct.pack("<Q", len(arrays))
    data = b"".join(params_array(array, version) for array in arrays.values())
    return struct.pack("<QQ", 0x112, 0) + count + data + count + names


def to_mxnet(key: str) -> str:
    """``b2_1.bn_branch2a.running_mean`` -> ``aux:bn2b1_branch2a_moving_mean``."""
    layer, _, field = key.rpartition(".")
    group = "aux" if field.startswith("running") else "arg"
    if layer == "conv1a":
        return "arg:conv1a_weight"
    kind = {"bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}.get(field)
    if layer == "bn7":
        return f"{group}:bn7_{kind or 'gamma'}"
    block, _, branch = layer.partition(".")
    stage, _, index = block[1:].partition("_")
    place = f"{stage}b{index}" if index else f"{stage}a"
    if branch.startswith("conv_"):
        return f"arg:res{place}_{branch.removeprefix('conv_')}_weight"
    return f"{group}:bn{place}_{branch.removeprefix('bn_')}_{kind or 'gamma'}"


class Stub(nn.Module):
    """Blocks of ResNet38d with 2 to 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, 2, 3, bias=False)
        self.b2 = Block(2, 4, 4, stride=2)
        self.b2_1 = Block(4, 4, 4)
        self.bn7 = nn.BatchNorm2d(4)
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()


def plain(module: nn.Module) -> dict[str, Tensor]:
    return {key: t for key, t in module.state_dict().items() if not key.endswith("num_batches_tracked")}


def as_params(module: nn.Module) -> dict[str, np.ndarray]:
    return {to_mxnet(key): tensor.numpy() for key, tensor in plain(module).items()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# MXNet .params


@pytest.mark.parametrize("version", MAGICS)
def test_params_of_every_version_load_under_released_names(tmp_path: Path, version: str) -> None:
    source, target = Stub(), Stub()
    path = tmp_path / "resnet_38d.params"
    classifier = {"arg:linear1000_weight": np.ones((5, 4), np.float32), "arg:linear1000_bias": np.ones(5, np.float32)}
    path.write_bytes(params_bytes(as_params(source) | classifier, version))
    load_into(target, read_weights(path), source=path)
    assert_same(plain(target), plain(source))


def test_params_names_cover_the_whole_resnet38d(tmp_path: Path) -> None:
    with torch.device("meta"):
        backbone = build_backbone(Model(backbone="resnet38d"))
    keys = list(plain(backbone))
    arrays = {to_mxnet(key): np.full(1, i, np.float32) for i, key in enumerate(keys)}
    assert {"arg:res2a_branch2a_weight", "aux:bn4b5_branch2b1_moving_mean", "arg:bn7_beta"} <= arrays.keys()
    path = tmp_path / "full.params"
    path.write_bytes(params_bytes(arrays))
    assert {key: int(tensor) for key, tensor in read_weights(path).items()} == {key: i for i, key in enumerate(keys)}


@pytest.mark.parametrize("dtype", CODES)
def test_params_types(tmp_path: Path, dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    path = tmp_path / "x.params"
    path.write_bytes(params_bytes({"arg:conv1a_weight": array}))
    tensor = read_weights(path)["conv1a.weight"]
    assert str(tensor.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(tensor.numpy(), array)


def changed(data: bytes, offset: int, form: str, value: int) -> bytes:
    return data[:offset] + struct.pack(f"<{form}", value) + data[offset + struct.calcsize(f"<{form}") :]


ONE = params_bytes({"arg:conv1a_weight": np.zeros((2, 3), np.float32)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected 8 more bytes, found 0"),
        (changed(ONE, 0, "Q", 0x113), "does not start with 0x112"),
        (changed(ONE, 16, "Q", 2**62), "not a readable .params file"),
        (changed(ONE, 24, "I", 0xF993FACA), "0xf993faca dimensions or an unknown version"),
        (changed(ONE, 28, "i", 1), "sparse"),
        (changed(ONE, 32, "I", 33), "0x21 dimensions"),
        (changed(ONE, 32, "I", 0), "0x0 dimensions"),
        (changed(ONE, 36, "q", 2**60), "more bytes, found"),
        (changed(ONE, 36, "q", -2), r"shape \[-2, 3\]"),
        (changed(ONE, 36, "q", 0), r"shape \[0, 3\]"),
        (changed(ONE, 60, "i", 12), "type 12"),
        (changed(ONE, 60, "i", -1), "type -1"),
        (changed(ONE, 88, "Q", 0), "1 arrays have 0 names"),
        (changed(ONE, 96, "Q", 2**63), "more bytes, found 17"),
        (changed(ONE, 104, "B", 0xFF), "name is not text"),
        (ONE[:-1], "expected 17 more bytes, found 16"),
        (ONE + b"\0", "1 bytes follow"),
        (
            params_bytes({"arg:fc1_weight": np.zeros(1, np.float32)}),
            "'arg:fc1_weight' is an unknown or duplicate name for ResNet38",
        ),
        (ONE.replace(b"arg:conv1a_weight", b"arg:linear1000_we"), "holds no weights"),
    ],
)
def test_a_damaged_or_foreign_params_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.params"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


def test_one_weight_twice_in_a_params_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.params"
    array = np.zeros(1, np.float32)
    path.write_bytes(params_bytes({"arg:conv1a_weight": array, "aux:conv1a_weight": array}))
    with pytest.raises(UserError, match="aux:conv1a_weight"):
        read_weights(path)


# .pth, .pt and .safetensors


def pth(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


TENSORS = {"conv1a.weight": torch.arange(6.0).reshape(2, 3), "fc8.weight": torch.ones(1, 2, dtype=torch.float16)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {"model": to_network_keys(tensors), "optimizer": {"state": {}}, "step": 5, "config": "name: x"},
        lambda tensors: {f"module.{key}": tensor for key, tensor in tensors.items()},
        lambda tensors: {"model": {f"_orig_mod.module.{key}": tensor for key, tensor in tensors.items()}},
        lambda tensors: {f"module._orig_mod.{key}": tensor for key, tensor in to_network_keys(tensors).items()},
        lambda tensors: {key: nn.Parameter(tensor) for key, tensor in tensors.items()},
    ],
)
def test_state_dicts_are_unwrapped_to_released_names(tmp_path: Path, wrap: Any, zipped: bool) -> None:
    path = pth(wrap(TENSORS), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = read_weights(path)
    assert_same(found, TENSORS)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_safetensors_are_read_under_released_names(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(to_network_keys(TENSORS), path)
    assert_same(read_weights(path), TENSORS)


class Trap:
    """A pickle that runs code when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    path = pth({"conv1a.weight": torch.ones(1), "x": Trap(tmp_path / "ran")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"whole Python objects is refused.*state_dict\(\)"):
        read_weights(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "found list"),
        ({}, "holds no weights"),
        ({"epoch": 3}, "'epoch' with int"),
        ({3: torch.ones(1)}, "3 with Tensor"),
        ({"x": torch.ones(1).expand(10**12)}, "x claims 4000000000000 bytes"),
        ({"x": torch.eye(2).to_sparse()}, "x is sparse"),
        ({"backbone.x": torch.ones(1), "x": torch.ones(1)}, "backbone.x and x are two names of one weight"),
    ],
)
def test_foreign_content_of_a_pth_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = pth(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_files_that_are_no_weights_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    with pytest.raises(UserError, match="no such file"):
        read_weights(path)
    for data in (b"", b"<html>not found</html>", bytes(100)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="readable"):
            read_weights(path)


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.safetensors, \.pth, \.pt, \.params"):
        read_weights(tmp_path / "x.h5")


@functools.cache
def sound_files() -> dict[str, bytes]:
    tensors = {"conv1a.weight": torch.zeros(2, 3), "bn7.bias": torch.zeros(4)}
    with tempfile.TemporaryDirectory() as folder:
        zipped = pth(tensors, Path(folder) / "a").read_bytes()
        tarred = pth(tensors, Path(folder) / "b", _use_new_zipfile_serialization=False).read_bytes()
    arrays = {"arg:conv1a_weight": np.zeros((2, 3), np.float32), "arg:bn7_beta": np.zeros(4, np.float32)}
    return {
        ".params": params_bytes(arrays),
        ".params (V1)": params_bytes(arrays, "V1"),
        ".params (legacy)": params_bytes(arrays, "legacy"),
        ".safetensors": safetensors.torch.save(tensors),
        ".pth": zipped,
        ".pth (legacy)": tarred,
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("kind", list(sound_files()))
def test_mutated_files_parse_or_raise_a_user_error(kind: str, data: st.DataObject) -> None:
    content = bytearray(sound_files()[kind])
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(new)] = new
    content = content[: data.draw(st.integers(len(content) // 2, len(content)) | st.just(len(content)))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{kind.split()[0]}"
        path.write_bytes(content)
        tracemalloc.start()
        try:
            found = read_weights(path)
        except UserError as error:
            found, message = {}, str(error)
        else:
            message = str(path)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    assert str(path) in message
    assert all(tensor.nbytes <= len(content) for tensor in found.values())
    if not kind.startswith(".pth"):  # for .pth torch's unpickler allocates
        assert peak < 4_000_000


# Names


def test_network_keys_prefix_all_but_heads_and_turn_back() -> None:
    keys = (
        "conv1a.weight",
        "b2_1.bn_branch2a.bias",
        "fc8.weight",
        "f8_3.weight",
        "f8_4.weight",
        "f9.weight",
        "f10.weight",
    )
    tensors = {key: torch.ones(1) for key in keys}
    network = to_network_keys(tensors)
    assert list(network) == ["backbone.conv1a.weight", "backbone.b2_1.bn_branch2a.bias", *keys[2:]]
    assert list(to_released_keys(network)) == list(keys)
    assert list(to_released_keys(tensors)) == list(keys)


# load_into


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


def test_load_into_reports_every_mismatch_and_changes_nothing() -> None:
    module = layers()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    tensors = {key: tensor + 1 for key, tensor in before.items()}
    tensors["0.conv.weight"] = tensors.pop("0.weight")
    tensors["1.running_mean"] = torch.ones(4)
    tensors["1.bias"] = torch.ones(3, dtype=torch.int8)
    with pytest.raises(UserError) as caught:
        load_into(module, tensors, source="x.pth")
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[:-1] == [
        "x.pth: the weights do not fit the model",
        "1 missing:",
        "0.weight (3, 2, 1, 1); the file has 0.conv.weight",
        "1 unexpected:",
        "0.conv.weight (3, 2, 1, 1)",
        "2 of another shape or type:",
        "1.bias: expected (3), found (3) int8",
        "1.running_mean: expected (3), found (4)",
    ]
    assert_same(module.state_dict(), before)


def test_load_into_counts_what_it_does_not_list() -> None:
    with pytest.raises(UserError, match="20 unexpected:") as caught:
        load_into(layers(), layers().state_dict() | {f"x{i}": torch.ones(1) for i in range(20)}, source="x.pth")
    assert str(caught.value).count("(1)") == 5


def test_load_into_passes_over_only_what_is_allowed_and_says_so() -> None:
    module, other = layers(), layers()
    tensors = {key: tensor + 1 for key, tensor in other.state_dict().items() if not key.startswith("1.")}
    tensors["classifier.weight"] = torch.ones(1)
    loaded = load_into(module, tensors, source="x", allow_missing=["1.*"], allow_unexpected=["classifier.*"])
    assert loaded.missing == ["1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert loaded.unexpected == ["classifier.weight"]
    torch.testing.assert_close(module.state_dict()["0.weight"], other.state_dict()["0.weight"] + 1)
    with pytest.raises(UserError, match="4 missing"):
        load_into(module, tensors, source="x", allow_missing=["1"], allow_unexpected=["classifier.*"])
    with pytest.raises(UserError, match="1 unexpected"):
        load_into(module, tensors, source="x", allow_missing=["1.*"], allow_unexpected=["fc8.*"])


@pytest.mark.parametrize("extra", [{}, {"0.num_batches_tracked": torch.tensor(7)}])
def test_load_into_tolerates_batch_counters_absent_or_present(extra: dict[str, Tensor]) -> None:
    module, tensors = layers(), plain(layers())
    load_into(module, tensors | extra, source="x")
    assert_same(plain(module), tensors)


def test_load_into_converts_floating_types() -> None:
    module = layers()
    tensors = {key: tensor.half() for key, tensor in plain(layers()).items()}
    load_into(module, tensors, source="x")
    assert module[0].weight.dtype == torch.float32
    assert torch.equal(module.state_dict()["0.weight"], tensors["0.weight"].float())


# convert


def narrow(prefix: str = "backbone.") -> dict[str, Tensor]:
    state = build_backbone(Model(backbone="narrow")).state_dict()
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_convert_writes_released_names_and_says_what_it_left_out(tmp_path: Path, suffix: str) -> None:
    network = narrow() | {"fc8.weight": torch.ones(4, 2).T, "f9.weight": torch.eye(2)}
    source = pth({"step": 3, "model": network, "optimizer": {}, "config": "name: x"}, tmp_path / "step.pt")
    destination = tmp_path / f"model{suffix}"
    summary = convert(source, destination)
    parameters = sum(p.numel() for p in build_backbone(Model(backbone="narrow")).parameters()) + 8 + 4
    expected = (len(network), parameters, ("step", "optimizer", "config"))
    assert (summary.tensors, summary.parameters, summary.dropped) == expected
    said = f"{destination}: {len(network)} tensors, {parameters:,} parameters; left out step, optimizer, config"
    assert str(summary) == said
    assert_same(read_weights(destination), to_released_keys(network))
    if suffix == ".pth":
        assert list(torch.load(destination, weights_only=True)) == [*narrow(""), "fc8.weight", "f9.weight"]
    assert {path.name for path in tmp_path.iterdir()} == {source.name, destination.name}


def test_convert_params_reports_the_dropped_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub()
    vars(stub)["classifier"] = ()
    monkeypatch.setattr(weights, "build_backbone", lambda _: stub)
    source = tmp_path / "x.params"
    source.write_bytes(params_bytes(as_params(stub) | {"arg:linear1000_bias": np.ones(5, np.float32)}))
    summary = convert(source, tmp_path / "x.safetensors")
    assert summary.dropped == ("arg:linear1000_bias",)
    assert summary.parameters == sum(p.numel() for p in stub.parameters())
    assert_same(read_weights(tmp_path / "x.safetensors"), plain(stub))


def test_convert_writes_tensors_that_share_memory(tmp_path: Path) -> None:
    state = narrow("")
    name = next(key for key, tensor in state.items() if tensor.is_floating_point())
    whole = torch.ones(100_000)
    state[name] = whole[: state[name].numel()].view_as(state[name])
    source = pth(state, tmp_path / "x.pth")
    for other in ("y.safetensors", "y.pth"):
        convert(source, tmp_path / other)
        assert_same(read_weights(tmp_path / other), state)
        assert (tmp_path / other).stat().st_size < source.stat().st_size - 300_000


def test_convert_is_strict_about_names_and_shapes(tmp_path: Path) -> None:
    state = narrow("")
    first, second, *_ = state
    state["totally.wrong"] = torch.ones(2)
    state[second] = torch.ones(2, 3, 5)
    del state[first]
    with pytest.raises(UserError) as error:
        convert(pth(state, tmp_path / "x.pth"), tmp_path / "y.pth")
    said = " ".join(str(error.value).split())
    for expected in (f"1 missing: {first}", "1 unexpected: totally.wrong (2)", f"{second}: expected", "(2, 3, 5)"):
        assert expected in said
    assert not (tmp_path / "y.pth").exists()


def test_convert_overwrites_nothing_and_needs_a_known_suffix(tmp_path: Path) -> None:
    source = pth(narrow(""), tmp_path / "x.pth")
    before = source.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        convert(source, source)
    assert source.read_bytes() == before
    with pytest.raises(UserError, match=r"can write \.safetensors, \.pth and, of a run, \.pt2, not '\.params'"):
        convert(source, tmp_path / "x.params")
    with pytest.raises(UserError, match="cannot be written"):
        convert(source, source / "y.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
    for name in ("y.pth", "y.safetensors"):
        made = convert(source, tmp_path / "new" / name).destination
        before = made.read_bytes()
        assert convert(source, made).destination.read_bytes() == before  # as after a kill at its end
        made.write_bytes(before[:-1])
        with pytest.raises(UserError, match="exists already"):
            convert(source, made)
        assert made.read_bytes() == before[:-1]


# Checksums, configs, numbers


def test_written_weights_know_their_checksum_and_their_config(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.tensor(3), "c": torch.zeros(0, 2)}
    weights.write_weights(path, tensors, config="name: ü\n")
    assert_same(read_weights(path), tensors)
    assert run_folder.own_config(path) == "name: ü\n"
    assert weights.is_whole(path)
    content = path.read_bytes()
    for at in (content.index(b"name: "), len(content) - 1, len(content) - 9):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        for look in (read_weights, weights.is_whole):
            with pytest.raises(UserError, match=r"model\.safetensors: damaged: .* checksum"):
                look(path)
    path.write_bytes(content[:-5])
    assert not weights.is_whole(path)
    safetensors.torch.save_file(tensors, path)  # by another tool
    assert_same(read_weights(path), tensors)
    assert run_folder.own_config(path) is None


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, suffix: str, value: float) -> None:
    tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, value, 2.0]).half()}
    path = tmp_path / f"x{suffix}"
    safetensors.torch.save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    with pytest.raises(UserError, match=rf"x\{suffix}: 1 of the 3 numbers of b are not finite"):
        read_weights(path)


def test_a_flipped_bit_in_a_state_dict_is_found(tmp_path: Path) -> None:
    path = pth({"a": torch.ones(1000)}, tmp_path / "x.pth")
    content = path.read_bytes()
    at = content.index(b"\x00\x00\x80\x3f" * 9) + 1
    path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    with pytest.raises(UserError, match=r"x\.pth: .*checksum of"):
        read_weights(path)


# Real weights, on machines that have them

IMAGENET = Path(__file__).parents[3] / "shared/weights/mobilenet_v2_imagenet.safetensors"
VOC = Path(__file__).parents[3] / "shared/voc12mini/JPEGImages"


@pytest.mark.skipif(not IMAGENET.is_file(), reason="the ImageNet weights are not part of the project")
def test_imagenet_weights_fit_mobilenet_but_for_its_classifier() -> None:
    backbone = build_backbone(Model(backbone="mobilenet_v2"))
    loaded = load_into(backbone, read_weights(IMAGENET), source=IMAGENET, allow_unexpected=backbone.classifier)
    assert loaded.missing == []
    assert sorted(loaded.unexpected) == ["classifier.1.bias", "classifier.1.weight"]


@pytest.mark.skipif(not (IMAGENET.is_file() and VOC.is_dir()), reason="needs real weights and images")
def test_mobilenet_s_inner_features_are_as_large_as_the_image_beside_them() -> None:
    backbone = build_backbone(Model(backbone="mobilenet_v2", stride=16))
    load_into(backbone, read_weights(IMAGENET), source=IMAGENET, allow_unexpected=backbone.classifier)
    for path in sorted(VOC.iterdir())[:3]:
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB").resize((225, 225)))).permute(2, 0, 1)
        images = ((pixels - backbone.mean[0]) / backbone.std[0])[None]
        with torch.no_grad():
            features = backbone(images)
        for inner in (features.low, features.middle):
            assert 0.25 < inner.square().mean().sqrt() / images.square().mean().sqrt() < 2
