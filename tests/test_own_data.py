"""Does what docs/own_data.md says, on the demo's pictures and with a network that trains in seconds."""

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

from cpn_fast.config import load
from cpn_fast.demo_data import DEMO_CLASSES
from cpn_fast.labels import read_labels
from cpn_fast.masks import read_mask

PAGE = (Path(__file__).parent.parent / "docs/own_data.md").read_text()
SMALL = {
    "augment": {"long_side": [64, 96], "crop": 64},
    "model": {"backbone": "narrow"},
    "superpixels": {"count": 30},
    "train": {"batch": 4, "steps": 3, "data_threads": 1},
    "cam": {"scales": [1.0], "batch": 2},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def home(small_voc: Path, tmp_path: Path) -> Path:
    """A working directory with the page's photos, tags and config; the classes are the demo's."""
    (tmp_path / "mine").mkdir()
    shutil.copytree(small_voc / "JPEGImages", tmp_path / "mine/JPEGImages")
    shutil.copytree(small_voc / "SegmentationClass", tmp_path / "mine/SegmentationClass")
    ids = sorted(path.stem for path in (tmp_path / "mine/JPEGImages").iterdir())
    labels = read_labels(small_voc / "Annotations", ids, DEMO_CLASSES)
    tags = [";".join(name for name, there in zip(DEMO_CLASSES, labels[id_], strict=True) if there) for id_ in ids]
    lines = [f"{id_},{names}\n" for id_, names in zip(ids, tags, strict=True)]
    (tmp_path / "mine/tags.csv").write_text("".join(lines))
    (tmp_path / "mine/checked.txt").write_text("".join(f"{id_}\n" for id_ in ids[:3]))
    shutil.copy(tmp_path / f"mine/JPEGImages/{ids[0]}.jpg", tmp_path / "photo.jpg")
    (tree,) = map(yaml.safe_load, blocks("yaml"))
    tree = {**tree, **SMALL, "classes": list(DEMO_CLASSES)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_every_command_of_the_page_works_in_its_order(home: Path, monkeypatch) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert sum(line.startswith("cpn-fast") for line in commands) == len(commands) - 1
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=home, env=tools, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    ids = (home / "mine/all.txt").read_text().split()
    assert len(ids) == 16
    for folder, suffix in (("masks", "png"), ("overlays", "jpg")):
        found = (home / "runs/mine/cams/all" / folder).iterdir()
        assert {path.name for path in found} == {f"{id_}.{suffix}" for id_ in ids}
    assert (home / "runs/mine/evaluation/checked/cams-checked-seeds/evaluation.json").exists()
    assert (home / "runs/mine/report.html").exists()
    monkeypatch.chdir(home)
    page: dict[str, Any] = {}
    exec(blocks("python")[0], page)
    assert np.array_equal(page["prediction"].mask, read_mask(home / "predictions/photo_mask.png"))


def test_the_config_of_the_page_is_valid(home: Path) -> None:
    (text,) = blocks("yaml")
    (home / "page.yaml").write_text(text)
    settings = load(home / "page.yaml")
    assert settings.classes == ("dog", "cat", "sofa")
    assert {settings.data.train_list, settings.data.eval_list, settings.segment.eval_list} == {Path("all.txt")}
