"""Whole commands, run as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def cpn_fast(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cpn_fast", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_from_images_and_tags_to_a_score(tiny_config) -> None:
    path = tiny_config(cam={"map": "refined"})
    runs = path.parent / "runs"
    assert "cpn-fast train" in cpn_fast("superpixels", path)
    assert "cpn-fast cam" in cpn_fast("train", path)
    weights = runs / "tiny" / "model.safetensors"
    val = Path("ImageSets/Segmentation/val.txt")
    cpn_fast("cam", path, "--checkpoint", weights)
    cpn_fast("cam", path, "--checkpoint", runs / "tiny/checkpoints/step-00000006.pt", "--list", val)
    assert "oracle" in cpn_fast("evaluate", path, "--cams", runs / "tiny/cams/train/seeds").lower()
    held_out = next((runs / "tiny").rglob("evaluation.json"))
    curve = json.loads(held_out.read_text())
    assert curve
    seeds = runs / "tiny/cams/val/seeds"
    cpn_fast("evaluate", path, "--cams", seeds, "--list", val, "--threshold-from", held_out)
    cpn_fast("evaluate", path, "--masks", runs / "tiny/cams/val/masks", "--list", val)
    for form in ("cpn", "seam", "irn"):
        assert "4 seeds" in cpn_fast("export", seeds, path.parent / form, "--form", form)
    released = path.parent / "released.pth"
    cpn_fast("convert", weights, released)
    cpn_fast("cam", path, "--checkpoint", released)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "no such config"),
        (["train", "CONFIG", "--set", "train.ephocs=3"], "did you mean epochs?"),
        (["train", "CONFIG", "--set", "data.root=nowhere"], "nowhere"),
        (["cam", "CONFIG", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["cam", "CONFIG", "--checkpoint", "CONFIG"], "tiny.yaml"),
        (["evaluate", "CONFIG", "--cams", "nowhere"], "nowhere"),
        (["evaluate", "CONFIG"], "--masks"),
        (["convert", "nowhere.params", "x.safetensors"], "nowhere.params"),
    ],
)
def test_what_a_user_can_mend_is_said_without_a_traceback(arguments, message, tiny_config) -> None:
    path = tiny_config()
    output = cpn_fast(*[path if argument == "CONFIG" else argument for argument in arguments], code=1)
    assert message in output
    assert "Traceback" not in output


def test_help_lists_the_stages() -> None:
    output = cpn_fast("--help")
    for command in ("superpixels", "shards", "train", "cam", "evaluate", "convert", "export", "demo"):
        assert command in output
