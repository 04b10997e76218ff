"""Runs that continue with more steps or more images: whole commands, on finished and on interrupted runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cpn_fast import config, config_file
from cpn_fast.cli import app
from cpn_fast.data.seeds import read_seed
from cpn_fast.models.weights import training_of
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import train
from cpn_fast.training import checkpoint

PLAIN = {"method": "cam", "model": {"pcm": False, "prcm": False}, "cam": {"map": "raw", "scales": [1.0]}}
LISTED = "ImageSets/Segmentation/train.txt"


def typed(*words: object) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return " ".join(result.output.split())


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def killed(monkeypatch):
    """Return a function that trains until the next checkpoint is written, and ends there."""

    class Killed(Exception):
        pass

    def until_a_checkpoint(settings: config.Config) -> None:
        real = checkpoint.write

        def write_then_die(*args, **kwargs):
            real(*args, **kwargs)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write", write_then_die)
            with pytest.raises(Killed):
                train.run(settings)

    return until_a_checkpoint


def test_a_finished_run_with_more_steps_goes_on_and_says_at_which_rate(tiny_config, killed) -> None:
    path = tiny_config(**PLAIN)
    longer = ("--set", "train.steps=12")
    typed("train", path)
    typed("cam", path)
    settings = config_file.load(path)
    final = settings.run / "model.safetensors"
    assert training_of(final) == {"step": 6}
    other = config_file.load(path, ["train.steps=12", f"out={settings.out}-too"])
    shutil.copytree(settings.run, other.run)
    seed = next((settings.run / "cams/train/seeds").iterdir())
    before = read_seed(seed).cam

    said = typed("train", path, *longer)
    rate = 0.01 * (1 - 6 / 12) ** 0.9
    assert "Going on after step 6: the run now has 12 steps, before it had 6" in said
    assert f"The learning rate is now {rate:.3g}, before it was 0, and it falls to 0 at step 12" in said
    assert training_of(final) == {"step": 12}
    assert [line["step"] for line in lines(settings.run)] == [2, 4, 6, 8, 10, 12]
    assert lines(settings.run)[3]["lr"] == pytest.approx(0.01 * (1 - 7 / 12) ** 0.9)
    assert "made anew, because these have changed: weights_sha256" in typed("cam", path, *longer)
    assert not (read_seed(seed).cam == before).all()

    stamp = final.stat().st_mtime_ns
    environment = settings.run / "environment.json"
    environment.write_text('{"device": "another machine"}')
    assert "Going on" not in typed("train", path, *longer)
    assert final.stat().st_mtime_ns == stamp
    assert "another machine" in environment.read_text()

    killed(other)  # the same, before its end
    assert training_of(other.run / "model.safetensors") == {"step": 6}  # complete weights of the shorter training
    train.run(other)
    a, b = (load_file(run / "model.safetensors") for run in (settings.run, other.run))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_steps_that_were_made_cannot_be_taken_back(tiny_config, killed) -> None:
    path = tiny_config(**PLAIN)
    killed(config_file.load(path))
    with pytest.raises(UserError, match=r"train\.steps is 2, but .* has made 3 steps.* Set it to 3 to stop there"):
        typed("train", path, "--set", "train.steps=2")
    assert config_file.load(path).run.joinpath("config.yaml").read_text().count("steps: 6") == 1
    said = typed("train", path, "--set", "train.steps=4")  # fewer steps than planned, more than were made
    assert "the run now has 4 steps, before it had 6" in said
    final = config_file.load(path).run / "model.safetensors"
    assert training_of(final) == {"step": 4}
    stamp = final.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"train\.steps is 3, but .* has made 4 steps"):
        typed("train", path, "--set", "train.steps=3")
    assert final.stat().st_mtime_ns == stamp


def test_without_checkpoints_nothing_goes_on(tiny_config) -> None:
    path = tiny_config(**PLAIN)
    typed("train", path)
    shutil.rmtree(config_file.load(path).run / "checkpoints")
    typed("train", path)  # at its end
    with pytest.raises(UserError, match=r"its checkpoints are gone.*another name and model\.weights=.*safetensors"):
        typed("train", path, "--set", "train.steps=8")


def test_other_pretrained_weights_of_the_same_name_are_refused(tiny_config, tmp_path: Path) -> None:
    weights: dict[str, Path] = {}
    for name in ("a", "b"):
        config = config_file.load(tiny_config(**PLAIN, name=name), [f"train.seed={len(weights)}", "train.steps=1"])
        weights[name] = train.run(config)
    path = tiny_config(**PLAIN)
    first, second = (f"model.weights={file}" for file in weights.values())
    typed("train", path, "--set", first)
    run = config_file.load(path).run
    before = {file: file.read_bytes() for file in (run / "config.yaml", run / "model.safetensors", run / "list.json")}
    for more in ((), ("--set", "train.steps=8")):
        with pytest.raises(UserError, match=r"b/model\.safetensors has another content than the file of this name"):
            typed("train", path, "--set", second, *more)
        assert all(file.read_bytes() == content for file, content in before.items())
    moved = shutil.copy(weights["a"], tmp_path)
    typed("train", path, "--set", f"model.weights={moved}")  # the same file elsewhere
    Path(moved).unlink()
    typed("train", path, "--set", f"model.weights={moved}", "--set", "train.steps=8")  # a continued run needs no file


def test_a_renamed_run_goes_on_under_its_new_name(tiny_config) -> None:
    path = tiny_config(**PLAIN)
    typed("train", path)
    run = config_file.load(path).run
    renamed = run.rename(run.with_name("renamed"))
    said = typed("train", renamed / "config.yaml", "--set", "name=renamed", "--set", "train.steps=8")
    assert "Going on after step 6" in said
    assert config_file.load(renamed / "config.yaml").name == "renamed"


@pytest.fixture
def growing(tiny_config, small_voc: Path, tmp_path: Path):
    """Return a config, and a function that sets its list to this many images."""
    root = shutil.copytree(small_voc, tmp_path / "voc")
    ids = (root / LISTED).read_text().split()

    def images(count: int, name: str = LISTED) -> None:
        (root / name).write_text("\n".join(ids[:count]))

    images(8)
    return tiny_config(**PLAIN | {"data": {"root": str(root)}}), images


def test_more_images_are_trained_on_when_there_are_steps_left(growing) -> None:
    path, images = growing
    typed("train", path)
    run = config_file.load(path).run
    stamp = (run / "model.safetensors").stat().st_mtime_ns
    images(12)
    said = typed("train", path)
    assert re.search(r"the list has 4 more images than \S+ was trained on, and all its 6 steps are made. Raise", said)
    assert (run / "model.safetensors").stat().st_mtime_ns == stamp
    said = typed("train", path, "--set", "train.steps=10")
    assert "The list has 4 more images than before: the run trains on them from now on" in said
    assert "Warning" not in said
    assert json.loads((run / "list.json").read_text())["images"] == 12
    assert "more images" not in typed("train", path, "--set", "train.steps=10")
    assert lines(run)[-1]["epoch"] == pytest.approx(10 / 6, abs=1e-3)


def test_passes_over_a_longer_list_are_more_steps(growing, killed) -> None:
    path, images = growing
    tree = config_file._read(path)
    tree["train"] = {**tree["train"], "epochs": 2, "steps": None}
    settings = config_file.parse(tree, "test")
    train.run(settings)
    final = settings.run / "model.safetensors"
    assert training_of(final) == {"step": 2 * 8 // 2}
    images(12)
    killed(settings)  # at step 9
    assert training_of(final) == {"step": 8}
    train.run(settings)
    assert training_of(final) == {"step": 2 * 12 // 2}


def test_a_list_of_another_name_must_hold_all_that_was_trained_on(growing) -> None:
    path, images = growing
    typed("train", path)
    images(6, "fewer.txt")
    images(12, "more.txt")
    with pytest.raises(UserError, match=r"was trained on .*train\.txt, but fewer\.txt does not extend this list"):
        typed("train", path, "--set", "data.train_list=fewer.txt")
    said = typed("train", path, "--set", "data.train_list=more.txt", "--set", "train.steps=8")
    assert "The list has 4 more images than before" in said
