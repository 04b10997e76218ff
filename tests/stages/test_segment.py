from __future__ import annotations

import math
import os
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

from cpn_fast import config_file
from cpn_fast.cli import app
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.masks import PALETTE, read_mask
from cpn_fast.methods.segmentation import Segmentation
from cpn_fast.models.backbone import Features
from cpn_fast.models.deeplab import build_deeplab
from cpn_fast.pipelines.batch import Batch
from cpn_fast.pipelines.inference import ScaledBatch
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import evaluate, segment
from cpn_fast.training.step import make_optimizer

VAL = "ImageSets/Segmentation/val.txt"
SMALL = {
    "augment": {"crop": 64},
    "train": {"batch": 4, "steps": 4, "checkpoint_every": 2, "log_every": 2, "data_threads": 1},
    "bn_momentum": 0.1,
    "scales": [0.5, 1.0],
}


@pytest.fixture
def settings(tiny_config):
    return config_file.load(tiny_config(segment=SMALL, crf={"workers": 1}))


def test_from_masks_to_a_score(settings, small_voc, tmp_path) -> None:
    """Training uses the ground truth here, so that no earlier stage is needed."""
    truth = small_voc / "SegmentationClass"
    weights = segment.run(settings, truth)
    folder = segment.segment(settings, weights)
    samples = load_samples(settings.data, settings.classes, settings.segment.eval_list, labels=False, masks=True)
    for kind in ("masks", "crf"):
        for sample in samples:
            assert read_mask(folder / kind / f"{sample.id}.png").shape == read_mask(sample.mask).shape
        scores = evaluate.run(
            settings, cams=None, masks=folder / kind, list_path=settings.segment.eval_list, threshold_from=None
        )
        assert 0 < scores.results[0].scores.mean_iou < 1
    assert segment.write_submission(settings, folder / "crf", tmp_path / "voc.tar.gz") == len(samples)
    with tarfile.open(tmp_path / "voc.tar.gz") as archive:
        inside = f"results/VOC2012/Segmentation/comp6_test_cls/{samples[0].id}.png"
        image = Image.open(archive.extractfile(inside))
    assert image.mode == "P"
    assert np.array_equal(np.array(image.getpalette()).reshape(-1, 3), PALETTE)

    # Finished parts stay, lost images are made again, and other masks or settings train anew.
    lost, kept = (folder / "crf" / f"{sample.id}.png" for sample in samples[:2])
    before = weights.stat().st_mtime_ns, kept.stat().st_mtime_ns
    lost.unlink()
    assert segment.run(settings, truth) == weights
    segment.segment(settings, weights)
    assert (weights.stat().st_mtime_ns, kept.stat().st_mtime_ns) == before
    assert lost.exists()
    other = tmp_path / "other"
    other.mkdir()
    for sample in load_samples(settings.data, settings.classes, settings.data.train_list, labels=False, masks=True):
        mask = read_mask(sample.mask)
        Image.fromarray(np.where(mask == 1, 255, mask).astype(np.uint8)).save(other / f"{sample.id}.png")  # gray
    segment.run(settings, other)
    second = weights.stat().st_mtime_ns
    assert second != before[0]
    train_ = settings.segment.train.model_copy(update={"lr": 0.5})
    segment.run(settings.model_copy(update={"segment": settings.segment.model_copy(update={"train": train_})}), other)
    assert weights.stat().st_mtime_ns != second


def test_masks_that_are_missing_or_do_not_fit_are_named(settings, small_voc, tmp_path) -> None:
    with pytest.raises(UserError, match=r"12 of the 12 images .* have no mask"):
        segment.run(settings, tmp_path)
    for path in (small_voc / "SegmentationClass").iterdir():
        Image.fromarray(read_mask(path)[1:]).save(tmp_path / path.name)
    with pytest.raises(UserError, match="another size than their image"):
        segment.run(settings, tmp_path)


def test_a_finished_segmenter_is_kept_until_another_can_be_trained(settings, small_voc, tmp_path) -> None:
    truth, wrong = small_voc / "SegmentationClass", tmp_path / "wrong"
    weights = segment.run(settings, truth)
    before = weights.read_bytes()
    wrong.mkdir()
    for path in truth.iterdir():
        Image.fromarray(read_mask(path)[1:]).save(wrong / path.name)
    with pytest.raises(UserError, match="another size than their image"):
        segment.run(settings, wrong)
    faster = settings.segment.model_copy(
        update={"train": settings.segment.train.model_copy(update={"lr": 0.5})}  # it must be trained anew
    )
    for update, message in (
        ({"model": settings.model.model_copy(update={"weights": tmp_path / "none.pth"})}, "none.pth"),
        ({"hook": "nowhere:log"}, "nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            segment.run(settings.model_copy(update={"segment": faster, **update}), truth)
    assert weights.read_bytes() == before
    assert (weights.parent / "checkpoints").is_dir()


def test_a_submission_holds_the_masks_of_its_list_and_no_other(settings, small_voc, tmp_path) -> None:
    masks, path = tmp_path / "masks", tmp_path / "comp6.tgz"
    shutil.copytree(small_voc / "SegmentationClass", masks)  # masks of training images too
    ids = (small_voc / VAL).read_text().split()
    assert segment.write_submission(settings, masks, path) == len(ids) == 4
    with tarfile.open(path, "r:gz") as archive:
        assert sorted(Path(name).stem for name in archive.getnames()) == sorted(ids)
    fewer = tmp_path / "fewer.txt"
    fewer.write_text(f"{ids[2]}\n")
    assert segment.write_submission(settings, masks, path, fewer) == 1
    with tarfile.open(path) as archive:
        assert [Path(name).stem for name in archive.getnames()] == ids[2:3]
    before = path.read_bytes()
    (masks / f"{ids[1]}.png").unlink()
    with pytest.raises(UserError, match=rf"masks: 1 of the 4 images of .*val\.txt have no mask there \({ids[1]}\)"):
        segment.write_submission(settings, masks, path)
    assert path.read_bytes() == before


def test_an_archive_of_another_program_is_not_replaced(settings, small_voc, tmp_path) -> None:
    path = tmp_path / "mine.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(small_voc / VAL, "notes.txt")
    whole = path.read_bytes()
    for content in (whole, whole[:40], whole[:20] + bytes(9) + whole[29:], b"mine"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"mine\.tar\.gz: exists, and is no submission of cpn-fast"):
            segment.write_submission(settings, small_voc / "SegmentationClass", path)
        assert path.read_bytes() == content
    path.unlink()
    os.mkfifo(path)  # it must not wait for a writer
    with pytest.raises(UserError, match="is no submission of cpn-fast"):
        segment.check_submission(path)


@pytest.mark.parametrize("name", ["comp6.zip", "comp6.tar", "comp6"])
def test_a_submission_of_another_kind_is_refused_before_training(tiny_config, small_voc, tmp_path, name) -> None:
    path = tiny_config(segment=SMALL)
    arguments = ["segment", str(path), "--masks", str(small_voc / "SegmentationClass")]
    result = CliRunner().invoke(app, [*arguments, "--submission", str(tmp_path / name)])
    assert isinstance(result.exception, UserError)
    message = str(result.exception)
    assert re.search(rf"{name}: expected an archive name that ends in \.tar\.gz or \.tgz, found ", message)
    assert not config_file.load(path).run.exists()


def test_a_missing_list_is_missed_before_training(tiny_config, small_voc) -> None:
    path = tiny_config(segment=SMALL)
    arguments = ["segment", str(path), "--masks", str(small_voc / "SegmentationClass")]
    result = CliRunner().invoke(app, [*arguments, "--list", "ImageSets/Segmentation/vall.txt"])
    assert re.search(r"vall\.txt: no such list. Did you mean .*val\.txt", str(result.exception))
    assert not config_file.load(path).run.exists()


@pytest.mark.parametrize("crf", [None, "segmentation"])
def test_masks_have_the_values_of_their_classes_where_one_between_is_impossible(tmp_path, crf) -> None:
    """The CRF gets only the possible classes and numbers them from 0."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 20:40], image[:, 40:] = 120, 240
    Image.fromarray(image).save(tmp_path / "a.png")
    truth = np.repeat([0, 1, 4], 20)[None].repeat(40, 0)
    probabilities = np.where(np.arange(5)[:, None, None] == truth, 0.9, 0.04).astype(np.float32)
    probabilities[2:4] = segment.POSSIBLE  # not above it: classes 2 and 3 are left out
    assert np.array_equal(segment.mask_of(probabilities, tmp_path / "a.png", crf), truth)
    even = np.full((150, 40, 60), 1 / 150, np.float32)  # no class is possible
    even[7] *= 1.1
    assert (segment.mask_of(even, tmp_path / "a.png", crf) == 7).all()


def test_inference_has_the_precision_of_its_own_training(tiny_config) -> None:
    """It does not have the precision of CPN's training, the run's key ``train``."""
    seen = []

    def forward(images: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return images

    network: Any = forward

    batch = ScaledBatch([0], (8, 8), [torch.zeros(1, 3, 8, 8)])
    for own, other in (("bf16", "fp32"), ("fp32", "bf16")):
        changes = {"segment": {"train": {"precision": own}}, "train": {"precision": other}}
        segment.class_probabilities(network, batch, config_file.load(tiny_config(**changes)))
    assert seen == [True, False]


def method(settings) -> Segmentation:
    torch.manual_seed(0)
    return Segmentation(settings, settings.run)


def batch(truth: torch.Tensor) -> Batch:
    return Batch(torch.zeros(len(truth), 3, *truth.shape[1:]), truth, torch.ones(len(truth), 5), torch.arange(1))


def test_loss_is_the_mean_cross_entropy_of_what_is_labelled(settings) -> None:
    truth = torch.tensor([[[0, 1, 255], [3, -1, 5]]], dtype=torch.int32)
    logits = torch.randn(1, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    trained = method(settings)
    loss = trained.losses([logits], trained.views(batch(truth), torch.Generator())).total
    log = logits.float().log_softmax(1)[0]
    expected = -(log[0, 0, 0] + log[1, 0, 1] + log[3, 1, 0] + log[5, 1, 2]) / 4
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, :, 0, 2].abs().max() == 0  # ignored
    assert gradient[0, :, 1, 1].abs().max() == 0  # padding
    nothing = torch.full_like(truth, 255)
    assert trained.losses([logits], trained.views(batch(nothing), torch.Generator())).total == 0


def test_the_head_is_the_released_one() -> None:
    """SEAM's head: 3x3 with dilation 12 to 512, no bias, BN, ReLU; 1x1 512, BN, ReLU; dropout 0.5; 1x1 with bias."""
    tree = {"name": "x", "data": {"root": "there"}, "train": {"steps": 1}}
    with torch.device("meta"):
        large = build_deeplab(config_file.parse(tree, "test"))
    assert {
        name: tuple(value.shape) for name, value in large.named_parameters() if not name.startswith("backbone")
    } == {
        "conv_fov.weight": (512, 4096, 3, 3),
        "bn_fov.weight": (512,),
        "bn_fov.bias": (512,),
        "conv_fov2.weight": (512, 512, 1, 1),
        "bn_fov2.weight": (512,),
        "bn_fov2.bias": (512,),
        "cls_conv.weight": (21, 512, 1, 1),
        "cls_conv.bias": (21,),
    }
    assert (large.bn_fov.momentum, large.bn_fov2.momentum) == (0.0003, 0.0003)
    assert large.dropout1.p == 0.5

    torch.manual_seed(0)
    network = build_deeplab(config_file.parse({**tree, "model": {"backbone": "narrow"}}, "test")).eval()
    for convolution in (network.conv_fov, network.conv_fov2):  # Kaiming's standard deviation by fan-out
        fan_out = 512 * convolution.kernel_size[0] ** 2
        assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    for norm in (network.bn_fov, network.bn_fov2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    own = network.state_dict()

    def normalised(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance = (own[f"{name}.running_{part}"][:, None, None] for part in ("mean", "var"))
        return (x - mean) / (variance + 1e-5).sqrt()  # factors start at 1 and 0, and stay there

    images = torch.randn(1, 3, 120, 136)  # 15 x 17 cells, more than the dilation of 12
    with torch.no_grad():
        x = network.backbone(images).last
        x = F.conv2d(x, own["conv_fov.weight"], padding=12, dilation=12)
        x = F.conv2d(normalised(x, "bn_fov").relu(), own["conv_fov2.weight"])
        x = F.conv2d(normalised(x, "bn_fov2").relu(), own["cls_conv.weight"], own["cls_conv.bias"])
        torch.testing.assert_close(network(images), x, rtol=1e-4, atol=1e-5)


def test_every_convolution_trains_and_the_head_ten_times_as_fast() -> None:
    tree = {"name": "x", "data": {"root": "there"}, "train": {"steps": 1}, "model": {"backbone": "mobilenet_v2"}}
    settings = config_file.parse(tree, "test")
    network = build_deeplab(settings).train()
    assert not network.get_submodule("backbone.features.0.1").training
    assert network.bn_fov.training
    groups = make_optimizer(network, settings.segment.train, torch.device("cpu")).param_groups
    assert [group["base_lr"] for group in groups] == pytest.approx([0.001, 0.01, 0.02])
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(p) for m in convolutions for p in m.parameters()}


def test_a_new_segmenter_prefers_no_class(monkeypatch) -> None:
    """Its first loss is that of a guess. A larger loss would send destructive gradients through the backbone."""
    torch.manual_seed(0)
    tree = {"name": "x", "data": {"root": "there"}, "train": {"steps": 1}, "model": {"backbone": "mobilenet_v2"}}
    network = build_deeplab(config_file.parse(tree, "test")).train()
    features = torch.randn(4, 1280, 13, 13).relu()
    monkeypatch.setattr(network.backbone, "forward", lambda images: Features(images, images, features))
    logits = network(torch.zeros(4, 3, 193, 193))
    truth = torch.randint(21, (4, 13, 13))
    assert abs(F.cross_entropy(logits, truth) - math.log(21)) < 0.2


def test_logits_are_averaged_over_scales_and_flips() -> None:
    """If a network's logits are the image itself, the mean of all views is the image."""
    image = F.interpolate(torch.randn(1, 3, 5, 4), (40, 32), mode="bilinear", align_corners=True)
    scales = [image, F.interpolate(image, (79, 63), mode="bilinear", align_corners=True)]

    same: Any = torch.nn.Identity()
    summed: Any = partial(torch.cumsum, dim=3)
    for pixels in (10**6, 10):
        found = segment.mean_logits(same, ScaledBatch([0], (40, 32), scales), flip=True, pixels=pixels)
        torch.testing.assert_close(found, image, atol=0.05, rtol=0)
    biased = segment.mean_logits(summed, ScaledBatch([0], (40, 32), scales[:1]), flip=True, pixels=10)
    torch.testing.assert_close(biased, (image.cumsum(3) + image.flip(3).cumsum(3).flip(3)) / 2)
