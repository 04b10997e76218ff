from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cpn_fast import config_file, kernels
from cpn_fast.cli import app
from cpn_fast.commands import doctor
from cpn_fast.data.masks import read_mask, write_mask
from cpn_fast.data.seeds import Seed, write_seed
from cpn_fast.kernels import Choice
from cpn_fast.runtime import precision
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import evaluate


def test_everything_that_make_setup_installs_works(tiny_config) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tiny_config())], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "broken" not in result.output
    assert "[green]" not in result.output
    assert "12 images in ImageSets/Segmentation/train.txt" in result.output
    for part in ("Python", "torch", "Triton", "operations", "DALI", "superpixels", "pydensecrf", "disk"):
        assert part in result.output


def test_what_is_broken_is_named_and_ends_with_an_exit_code(tiny_config, tmp_path: Path) -> None:
    path = tiny_config(data={"root": str(tmp_path / "nowhere")}, model={"weights": str(tmp_path / "none.pth")})
    result = CliRunner().invoke(app, ["doctor", str(path)], catch_exceptions=False, env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "nowhere is not a folder" in result.output
    assert "none.pth" in result.output


def test_an_image_that_cannot_be_read_is_broken(tiny_config, small_voc: Path, tmp_path: Path) -> None:
    root = shutil.copytree(small_voc, tmp_path / "voc")
    image = root / "JPEGImages/train_0003.jpg"
    image.write_bytes(image.read_bytes()[:500])
    result = CliRunner().invoke(app, ["doctor", str(tiny_config(data={"root": str(root)}))], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "train_0003" in result.output


def test_weights_of_another_backbone_are_broken(tiny_config, tmp_path: Path) -> None:
    weights = tmp_path / "other.pth"
    torch.save({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, weights)
    path = tiny_config(model={"weights": str(weights)})
    result = CliRunner().invoke(app, ["doctor", str(path)], catch_exceptions=False, env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert f"{weights}: the weights do not fit the model" in result.output


def test_no_weights_for_a_frozen_backbone_are_broken(tiny_config) -> None:
    path = tiny_config(model={"backbone": "mobilenet_v2"})
    result = CliRunner().invoke(app, ["doctor", str(path)], catch_exceptions=False, env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "model.weights is null, but mobilenet_v2 does not train its first layers" in result.output


def test_a_folder_that_cannot_be_written_is_broken(tiny_config) -> None:
    finding = doctor.disk(Path("/proc/runs"))
    assert finding.state == "broken"
    assert "/proc cannot be written" in finding.found
    assert "--set out=FOLDER" in finding.mend


def pretended_gpu(monkeypatch, **version: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(name="Some GPU", total_memory=16 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for name, value in version.items():
        monkeypatch.setattr(torch.version, name, value)


def test_rocm_is_refused(monkeypatch) -> None:
    pretended_gpu(monkeypatch, hip="6.4")
    finding = doctor.gpu()
    assert finding.state == "broken"
    assert "ROCm" in finding.found
    pretended_gpu(monkeypatch, hip=None)
    assert doctor.gpu().state == "ok"


def test_what_the_operations_run_on_is_told_and_why() -> None:
    assert doctor.operations().state == "ok"
    assert "tiled for pixel_correlation" in doctor.operations().found
    choices = {
        "pixel_correlation": Choice("tiled", "triton needs a GPU of compute capability 8.0 or above"),
        "region_pooling": Choice("triton", None),
    }
    with pytest.MonkeyPatch.context() as patch:
        pretended_gpu(patch)
        patch.setattr(kernels, "backends", lambda device, dtype: choices)
        patch.setattr(precision, "default", lambda device: "bf16")
        finding = doctor.operations()
    assert finding.state == "slow"
    assert "tiled for pixel_correlation; triton for region_pooling, because triton needs a GPU" in finding.found


def test_a_missing_package_is_a_finding(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    finding = doctor.examine(doctor.dense_crf)
    assert finding.state == "broken"
    assert "pydensecrf" in finding.found
    assert finding.mend


def test_a_class_that_no_image_shows_is_pointed_out(tiny_config) -> None:
    settings = config_file.load(tiny_config())
    finding = doctor.data(settings.model_copy(update={"classes": (*settings.classes, "unicorn")}))
    assert finding.state == "slow"
    assert "no image shows unicorn" in finding.found


def test_a_class_on_every_image_and_one_without_ground_truth_are_pointed_out(
    tiny_config, small_voc: Path, tmp_path: Path
) -> None:
    tags, masks = tmp_path / "tags.csv", tmp_path / "masks"
    ids = (small_voc / "ImageSets/Segmentation/train.txt").read_text().split()
    tags.write_text("".join(f"{id_},thing\n" for id_ in ids))
    for id_ in ids:
        shape = read_mask(small_voc / f"SegmentationClass/{id_}.png").shape
        write_mask(masks / f"{id_}.png", np.full(shape, 255, np.uint8))
        write_seed(tmp_path / f"seeds/{id_}.npz", Seed(np.array([0]), np.zeros((1, *shape), np.float32)))
    settings = config_file.load(tiny_config(), ["classes=[thing]", f"data.labels={tags}", f"data.masks={masks}"])
    finding = doctor.data(settings)
    assert finding.state == "slow"
    assert "every image shows thing, so there is no negative: add images without it" in finding.found
    assert f"no ground truth of {len(ids)} images has a pixel of any class" in finding.found
    with pytest.raises(UserError, match=r"masks: no ground truth of the 12 images has a pixel of any class \(thing\)"):
        evaluate.run(settings, cams=tmp_path / "seeds", masks=None, list_path=None, threshold_from=None)


def test_lists_that_later_stages_need_are_looked_for(tiny_config) -> None:
    settings = config_file.load(tiny_config(), ["segment.eval_list=ImageSets/Segmentation/vla.txt"])
    finding = doctor.data(settings)
    assert finding.state == "slow"
    assert "Did you mean ImageSets/Segmentation/val.txt?" in finding.found
    settings = config_file.load(tiny_config(), ["data.eval_list=ImageSets/Segmentation/vla.txt"])
    finding = doctor.examine(lambda: doctor.data(settings))
    assert finding.state == "broken"
    assert "vla.txt: no such list" in finding.found


def test_a_full_disk_is_pointed_out_before_the_run(monkeypatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2**30))
    assert doctor.disk(tmp_path / "not yet there").state == "slow"
