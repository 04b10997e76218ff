"""Run the commands of docs/own_data.md, on the demo's images and with a network that trains in seconds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cpn_fast.commands.demo_data import DEMO_CLASSES
from cpn_fast.data.labels import read_labels
from cpn_fast.data.masks import read_mask

PAGE = (Path(__file__).parents[2] / "docs/own_data.md").read_text()
TRAIN = {"batch": 4, "steps": 3, "data_threads": 1}
SMALL = {
    "augment": {"long_side": [64, 96], "crop": 64},
    "superpixels": {"count": 30},
    "train": TRAIN,
    "cam": {"scales": [1.0], "batch": 2},
    "crf": {"workers": 1},
    "affinity": {"augment": {"crop": 64}, "train": TRAIN},
    "walk": {"logt": 1},
}
CLASSES = ("bird", "cat", "dog", "sheep", "sofa")
"""Names for the demo's classes, with those of the page."""
SEGMENT = {"augment": {"crop": 64}, "train": TRAIN, "scales": [0.5], "crf": None}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def home(small_voc: Path, tmp_path: Path) -> Path:
    """Make a working directory with the page's files, of the demo's photos."""
    photos = tmp_path / "photos"
    shutil.copytree(small_voc / "JPEGImages", photos)
    shutil.copytree(small_voc / "SegmentationClass", photos / "SegmentationClass")
    ids = sorted(path.stem for path in photos.glob("*.jpg"))
    labels = read_labels(small_voc / "Annotations", ids, DEMO_CLASSES)
    tags = [";".join(name for name, there in zip(CLASSES, labels[id_], strict=True) if there) for id_ in ids]
    (photos / "tags.csv").write_text("".join(f"{id_}.jpg,{names}\n" for id_, names in zip(ids, tags, strict=True)))
    (photos / "checked.txt").write_text("".join(f"{id_}\n" for id_ in ids[:3]))
    shutil.copy(photos / f"{ids[0]}.jpg", tmp_path / "photo.jpg")
    return tmp_path


def test_every_command_of_the_page_works_in_its_order(home: Path, monkeypatch) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert all(line.startswith("cpn-fast") for line in commands)
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=home, env=tools, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if command.startswith("cpn-fast init"):
            assert "takes about" in done.stdout
            config = home / "photos-cpn/config.yaml"
            tree = yaml.safe_load(config.read_text())
            tree = {**tree, **SMALL, "segment": {**tree["segment"], **SEGMENT}}
            config.write_text(yaml.safe_dump(tree))
    ids = (home / "photos-cpn/train.txt").read_text().split()
    assert len(ids) > 10
    for folder, suffix in (("masks", "png"), ("overlays", "jpg")):
        found = (home / "runs/photos/cams/train" / folder).iterdir()
        assert {path.name for path in found} == {f"{id_}.{suffix}" for id_ in ids}
    assert (home / "runs/photos/segment/deeplab/model.safetensors").exists()
    assert (home / "runs/photos/evaluation/checked/cams-checked-seeds/evaluation.json").exists()
    assert (home / "runs/photos/report.html").exists()
    monkeypatch.chdir(home)
    page: dict[str, Any] = {}
    exec(blocks("python")[0], page)
    assert np.array_equal(page["prediction"].mask, read_mask(home / "predictions/photo_mask.png"))
