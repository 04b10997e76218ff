from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from cpn_fast import config_file
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.masks import read_mask, write_mask
from cpn_fast.methods.cpn import Cpn
from cpn_fast.models import pretrained
from cpn_fast.models.affinity_net import build_affinity_net
from cpn_fast.models.deeplab import build_deeplab
from cpn_fast.models.dropout import SharedDropout2d
from cpn_fast.models.network import build_network
from cpn_fast.models.weights import BEST, FINAL, to_released_keys, training_of, write_weights
from cpn_fast.pipelines.training import TrainingPipeline
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import train
from cpn_fast.training import checkpoint, run_folder

PLAIN = {"method": "cam", "model": {"pcm": False, "prcm": False}, "cam": {"map": "raw"}}


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        PLAIN,
        {"patches": {"kind": "grid", "grid_sizes": [16, 32]}},
        pytest.param({"superpixels": {"mode": "online", "engine": "fast-slic"}}, marks=pytest.mark.fast_slic),
        {"superpixels": {"mode": "online", "engine": "kernel"}},
        {"method": "seam", "model": {"prcm": False}},
        {**PLAIN, "train": {"precision": "fp16"}},
    ],
    ids=["cpn", "cam", "grid", "online", "kernel", "seam", "fp16"],
)
def test_an_interrupted_run_ends_bit_equal_to_an_uninterrupted_one(changes, tiny_config, monkeypatch) -> None:
    whole = config_file.load(tiny_config(name="whole", **changes))
    broken = config_file.load(tiny_config(name="broken", **changes))
    expected = load_file(train.run(whole))

    class Killed(Exception):
        pass

    real = checkpoint.write

    def write_then_die(*args, **kwargs):
        real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(checkpoint, "write", write_then_die)
    with pytest.raises(Killed):
        train.run(broken)
    monkeypatch.undo()
    assert [path.name for path in checkpoint.existing(broken.run / "checkpoints")] == ["step-00000003.pt"]

    continued = load_file(train.run(broken))
    assert expected.keys() == continued.keys()
    assert all(torch.equal(expected[name], continued[name]) for name in expected)
    assert [line["step"] for line in lines(broken.run)] == [2, 4, 6]
    for a, b in zip(lines(whole.run)[1:], lines(broken.run)[1:], strict=True):
        assert b["lr"] == a["lr"]


def test_a_continued_run_lets_the_checkpoint_go(tiny_config, monkeypatch) -> None:
    """Its weights take 0.4 GB in addition to the network's."""
    train.run(config_file.load(tiny_config()))
    settings = config_file.load(tiny_config())
    (settings.run / FINAL).unlink()
    (settings.run / "checkpoints" / "step-00000006.pt").unlink()
    read, write, kept = checkpoint.newest, checkpoint.write, []

    def noted(*args):
        state = read(*args)
        kept.extend(weakref.ref(tensor) for tensor in state["model"].values())
        return state

    def looked_at(*args, **kwargs):
        assert len(kept) > 0
        assert all(tensor() is None for tensor in kept)
        kept.clear()
        write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "newest", noted)
    monkeypatch.setattr(checkpoint, "write", looked_at)
    train.run(settings)
    assert not kept


def test_a_run_notes_what_its_operations_run_on_and_on_a_gpu_why() -> None:
    """On a CPU there is no choice, so there is no reason."""
    found = run_folder._backends("fp32", torch.device("cpu"))
    assert (found["pixel_correlation"], found["region_pooling"]) == ("tiled", "eager")
    with FakeTensorMode():  # GPU tensors without a GPU
        on_gpu = run_folder._backends("fp32", torch.device("cuda"))
        assert on_gpu["complementary_losses"] == "triton"
        assert on_gpu["region_pooling"].startswith("eager: triton's products of float32 are TF32")
        assert set(run_folder._backends("bf16", torch.device("cuda")).values()) == {"triton"}


def test_a_run_trains_and_writes_what_it_should(tiny_config) -> None:
    settings = config_file.load(tiny_config())
    weights = load_file(train.run(settings))
    assert "fc8.weight" in weights
    found = lines(settings.run)
    assert [line["step"] for line in found] == [2, 4, 6]
    terms = {"classification", "tcp", "tcp_refined", "cpcr", "background_suppression"}
    for line in found:
        assert terms <= line.keys()
        assert line["loss"] == pytest.approx(sum(line[name] for name in terms), rel=1e-4)
        assert line["images_per_second"] > 0
        assert 0 <= line["waiting"] <= 1
    assert 0 <= found[-1]["mAP"] <= 1  # 12 images are one epoch of 6 steps
    assert found[0]["lr"] == pytest.approx(0.01 * (5 / 6) ** 0.9)
    assert config_file.load(settings.run / "config.yaml") == settings
    assert json.loads((settings.run / "environment.json").read_text())["backends"]["pixel_correlation"] == "tiled"
    assert list(settings.run.glob("events.*"))
    before = (settings.run / "model.safetensors").stat().st_mtime_ns
    assert train.run(settings).stat().st_mtime_ns == before  # a finished run does not change


def test_what_a_kill_between_two_files_left_is_removed(tiny_config) -> None:
    settings = config_file.load(tiny_config())
    train.run(settings)
    folder = settings.run / "checkpoints"
    for name in ("step-00000001.pt", ".step-00000006.pt.cpn-fast.tmp"):
        (folder / name).touch()
    train.run(settings)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003.pt", "step-00000006.pt"]


def test_the_loss_falls(tiny_config) -> None:
    settings = config_file.load(
        tiny_config(train={"batch": 4, "steps": 40, "log_every": 10, "lr": 0.02, "momentum": 0.9})
    )
    train.run(settings)
    found = lines(settings.run)
    assert found[-1]["classification"] < found[0]["classification"]


def test_accumulated_batches_equal_one_large_batch(tiny_config) -> None:
    """The test has no dropout and no hiding, whose random numbers depend on the batch."""
    same = {**PLAIN, "name": "one", "train": {"batch": 4, "steps": 2}}
    one = config_file.load(tiny_config(**same))
    two = config_file.load(tiny_config(**{**same, "name": "two", "train": {"batch": 2, "accumulate": 2, "steps": 2}}))
    results = []
    for settings in (one, two):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SharedDropout2d, "forward", lambda self, x: x)
            results.append(load_file(train.run(settings)))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5)


def test_another_config_does_not_continue_the_run(tiny_config) -> None:
    train.run(config_file.load(tiny_config()))
    with pytest.raises(UserError, match=r"train\.lr"):
        train.run(config_file.load(tiny_config(train={"lr": 0.5})))
    train.run(config_file.load(tiny_config(train={"log_every": 1})))  # prints nothing about weights


def truncated(content: bytes) -> bytes:
    return content[:1000]


def with_a_flipped_bit(content: bytes) -> bytes:
    """Flip a bit in the middle, where tensors are: the file's structure does not show it."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("override", "goes_on"),
    [
        ("data.root=/elsewhere", True),
        ("data.images=photos", True),
        ("data.labels=/elsewhere/tags.csv", True),
        ("data.train_list=/elsewhere/train.txt", True),
        ("data.train_list=ImageSets/Segmentation/val.txt", False),
        ("data.shards=shards", False),  # another order of images
        ("model.weights=/elsewhere/net.pth", True),
        ("model.weights=weights/other.pth", False),
        ("superpixels.cache=/elsewhere", True),
        ("superpixels.count=31", False),
    ],
)
def test_a_run_goes_on_where_its_data_now_lies(override: str, goes_on: bool, tiny_config) -> None:
    path = tiny_config(model={"weights": "weights/net.pth"})
    before, now = (run_folder.decisive(config_file.load(path, given)) for given in ([], [override]))
    assert (before == now) == goes_on


@pytest.mark.parametrize("damage", [truncated, with_a_flipped_bit])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(damage, tiny_config, capfd) -> None:
    settings = config_file.load(tiny_config())
    expected = load_file(train.run(settings))
    (settings.run / "model.safetensors").unlink()
    newest, older = checkpoint.existing(settings.run / "checkpoints")
    newest.write_bytes(damage(newest.read_bytes()))
    found = load_file(train.run(settings))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    message = capfd.readouterr().err
    assert f"{newest}: not a readable checkpoint" in message
    assert f"Going on from {older.name}" in message

    (settings.run / "model.safetensors").unlink()
    for path in (newest, older):
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{newest.name}.*There is no other checkpoint: delete"):
        train.run(settings)


def test_checkpoints_execute_nothing(tmp_path) -> None:
    class Payload:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "step-00000001.pt"
    torch.save({"step": Payload()}, path)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.read(path, torch.device("cpu"))


def with_a_bad_step(monkeypatch, number: int) -> None:
    """Make the loss of one step NaN."""
    real, calls = Cpn.losses, itertools.count(1)

    def losses(self, outputs, views):
        found = real(self, outputs, views)
        return found._replace(total=found.total * (float("nan") if next(calls) == number else 1))

    monkeypatch.setattr(Cpn, "losses", losses)


def images_of(settings, step: int) -> list[str]:
    """Return the ids that the run without a fault uses in a step."""
    samples = load_samples(settings.data, settings.classes, settings.data.train_list, labels=True, masks=False)
    options = {"batch": settings.train.batch, "seed": 0, "threads": 1, "device": torch.device("cpu")}
    pipeline = TrainingPipeline(
        samples, settings.augment, mean=(0, 0, 0), std=(1, 1, 1), start_step=step - 1, **options
    )
    return [samples[index].id for index in next(pipeline).indices]


@pytest.mark.parametrize(("keep", "steps"), [(1, [6]), (2, [5, 6]), (9, [1, 2, 3, 4, 5, 6])])
def test_the_newest_checkpoints_are_kept(keep: int, steps: list[int], tiny_config) -> None:
    path = tiny_config(**PLAIN | {"train": {"checkpoint_every": 1, "keep_checkpoints": keep}})
    settings = config_file.load(path)
    train.run(settings)
    kept = [checkpoint.read(path, torch.device("cpu")) for path in checkpoint.existing(settings.run / "checkpoints")]
    assert [state["step"] for state in reversed(kept)] == steps


def test_copies_of_checkpoints_are_the_user_s(tmp_path) -> None:
    def files() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    copies = {"step-00000001-good.pt", "step-00000002 (copy).pt", "step-final.pt"}
    for name in copies:
        torch.save({}, tmp_path / name)
    for step in range(1, 4):
        checkpoint.write(tmp_path, step, keep=1, model={}, optimizer={}, scaler={}, config="")
    assert files() == {"step-00000003.pt", *copies}
    state = checkpoint.newest(tmp_path, torch.device("cpu"))
    assert state is not None
    assert state["step"] == 3


def test_a_gradient_that_is_not_finite_stops_before_it_is_kept(tiny_config, monkeypatch) -> None:
    settings = config_file.load(tiny_config(train={"log_every": 5, "checkpoint_every": 3, "steps": 9}))
    with_a_bad_step(monkeypatch, 5)
    with pytest.raises(UserError, match=r"gradient of step 5 is not finite.*or go on with train\.nonfinite=skip"):
        train.run(settings)
    images = images_of(settings, 5)
    assert json.loads((settings.run / "nonfinite.json").read_text()) == [{"step": 5, "images": images}]
    (kept,) = checkpoint.existing(settings.run / "checkpoints")
    assert kept.name == "step-00000003.pt"
    assert all(value.isfinite().all() for value in checkpoint.read(kept, torch.device("cpu"))["model"].values())

    monkeypatch.undo()
    with_a_bad_step(monkeypatch, 2)  # the fifth: the run goes on after the third
    path = tiny_config(train={"log_every": 5, "checkpoint_every": 3, "steps": 9, "nonfinite": "skip"})
    assert all(value.isfinite().all() for value in load_file(train.run(config_file.load(path))).values())


def test_a_gradient_that_is_not_finite_stops_before_validation(tiny_config, monkeypatch) -> None:
    """The weights are NaN then. Validation would say that they are damaged, or could even take them for the best."""
    with_a_bad_step(monkeypatch, 4)
    val = {"eval_list": "ImageSets/Segmentation/val.txt"}
    settings = config_file.load(tiny_config(train={"validate_every": 2}, data=val))
    with pytest.raises(UserError, match="gradient of step 4 is not finite"):
        train.run(settings)
    assert json.loads((settings.run / "nonfinite.json").read_text())[0]["step"] == 4
    assert training_of(settings.run / BEST)["step"] == 2


def test_a_gradient_that_is_not_finite_can_be_skipped(tiny_config, monkeypatch) -> None:
    settings = config_file.load(tiny_config(train={"log_every": 3, "nonfinite": "skip"}))
    with_a_bad_step(monkeypatch, 2)
    weights = load_file(train.run(settings))
    assert all(value.isfinite().all() for value in weights.values())
    assert [line.get("skipped") for line in lines(settings.run)] == [1, None]
    assert json.loads((settings.run / "nonfinite.json").read_text())[0]["images"] == images_of(settings, 2)


def test_skipping_changes_no_sound_run(tiny_config) -> None:
    stop, skip = (
        train.run(config_file.load(tiny_config(name=mode, train={"nonfinite": mode}))) for mode in ("stop", "skip")
    )
    a, b = load_file(stop), load_file(skip)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_deterministic_algorithms_can_be_asked_for(tiny_config) -> None:
    """On a CPU they change nothing. On a GPU they make two runs equal."""
    expected = train.run(config_file.load(tiny_config(name="plain")))
    try:
        found = train.run(config_file.load(tiny_config(name="deterministic", train={"deterministic": True})))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)
    a, b = load_file(found), load_file(expected)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_divergence_stops_with_advice(tiny_config) -> None:
    with pytest.raises(UserError, match=r"Lower train\.lr"):
        train.run(config_file.load(tiny_config(train={"lr": 1e12, "steps": 12})))


def test_pretrained_weights_are_taken(tiny_config) -> None:
    first = train.run(config_file.load(tiny_config(name="first")))
    warm = config_file.load(
        tiny_config(name="warm", model={"weights": str(first)}, train={"lr": 1e-20, "weight_decay": 0})
    )
    a, b = load_file(first), load_file(train.run(warm))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_seeds_of_streams_and_steps_differ() -> None:
    seeds = {train.keyed_seed(seed, step, stream) for seed in range(3) for step in range(50) for stream in range(2)}
    assert len(seeds) == 300


def test_a_mask_that_does_not_fit_is_found_before_training(tiny_config, small_voc, tmp_path) -> None:
    root = shutil.copytree(small_voc, tmp_path / "voc")
    mask = root / "SegmentationClass/train_0003.png"
    write_mask(mask, read_mask(mask)[:-1])
    settings = config_file.load(tiny_config(data={"root": str(root)}))
    with pytest.raises(UserError, match=f"1 masks of another size than their image: {mask}"):
        train.run(settings)
    assert not (settings.run / "metrics.jsonl").exists()


def test_training_starts_from_any_of_our_networks(tiny_config, capsys) -> None:
    first = train.run(config_file.load(tiny_config(train={"steps": 1})))
    capsys.readouterr()
    classes = [*config_file.load(tiny_config()).classes, "unicorn"]
    start = config_file.load(
        tiny_config(name="more", classes=classes, model={"weights": str(first)}, train={"steps": 1})
    )
    train.run(start)
    assert f"Starting from {first} with new layers fc8" in capsys.readouterr().out
    deeplab = build_deeplab(start)
    assert pretrained.start_from(deeplab, first) == ["conv_fov", "bn_fov", "conv_fov2", "bn_fov2", "cls_conv"]
    assert pretrained.start_from(build_affinity_net(start.model), first) == ["f8_5", "f9"]
    resnet = start.model.model_copy(update={"backbone": "mobilenet_v2"})
    with pytest.raises(UserError, match="the weights do not fit the model"):
        pretrained.start_from(build_affinity_net(resnet), first)


def test_weights_of_another_normalisation_are_refused(tiny_config, tmp_path) -> None:
    """torchvision's MobileNetV2 and TensorFlow's have the same names and shapes, and other means."""
    model = {"backbone": "mobilenet_v2"}
    network = build_network(config_file.load(tiny_config(model=model)))
    tensors = to_released_keys(network.backbone.state_dict())
    path = tmp_path / "mobilenet_v2.safetensors"
    write_weights(path, {**tensors, "classifier.1.weight": torch.zeros(1001, 1280)})
    pretrained.start_from(network, path)
    write_weights(path, {**tensors, "classifier.1.weight": torch.zeros(1000, 1280)})
    remedy = r"set model\.mean=(\[123\.675,\S+\]) and model\.std=(\[58\.395,\S+\])$"
    with pytest.raises(UserError, match=remedy) as refused:
        pretrained.start_from(network, path)
    mean, std = (json.loads(found) for found in re.search(remedy, str(refused.value)).groups())
    pretrained.start_from(build_network(config_file.load(tiny_config(model={**model, "mean": mean, "std": std}))), path)


def test_the_next_run_has_the_normalisation_of_the_weights_that_it_starts_from(tiny_config) -> None:
    model = {"mean": [100.0, 110.0, 120.0]}
    first = train.run(config_file.load(tiny_config(model=model, train={"steps": 1})))
    with pytest.raises(UserError, match=r"set model\.mean=\[100\.0,110\.0,120\.0\] and model\.std="):
        train.run(config_file.load(tiny_config(name="next", model={"weights": str(first)})))
    train.run(config_file.load(tiny_config(name="next", model={**model, "weights": str(first)}, train={"steps": 1})))


def test_a_frozen_stem_is_not_left_with_random_weights(tiny_config) -> None:
    with pytest.raises(UserError, match=r"model\.weights is null, but mobilenet_v2 does not train"):
        train.run(config_file.load(tiny_config(model={"backbone": "mobilenet_v2"})))


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tiny_config) -> None:
    """A limit on file sizes replaces the full disk: the kernel refuses the same calls."""
    settings = config_file.load(path := tiny_config(name="small", train={"steps": 40, "checkpoint_every": 3}))
    expected = load_file(
        train.run(config_file.load(tiny_config(name="whole", train={"steps": 40, "checkpoint_every": 3})))
    )
    command = [sys.executable, "-m", "cpn_fast", "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not checkpoint.existing(settings.run / "checkpoints"):
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "step-" in errors
    assert "make room and give the same command again" in errors
    assert "Traceback" not in errors
    assert checkpoint.newest(settings.run / "checkpoints", torch.device("cpu"))
    assert not list((settings.run / "checkpoints").glob(".*"))
    found = load_file(train.run(settings))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
