from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cpn_fast import config_file
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import chain
from cpn_fast.training import hook

SHORT = {"train": {"batch": 2, "steps": 2, "data_threads": 1}, "augment": {"crop": 64}}
CHAIN: dict[str, Any] = {
    "train": {"batch": 2, "steps": 2, "data_threads": 1},
    "data": {"train_list": "ImageSets/Segmentation/val.txt", "eval_list": "ImageSets/Segmentation/val.txt"},
    "cam": {"scales": [1.0]},
    "crf": {"workers": 1},
    "affinity": {"train": SHORT["train"], "augment": {"long_side": [64, 96], "crop": 64}},
    "walk": {"logt": 1},
    "segment": {**SHORT, "bn_momentum": 0.1, "scales": [1.0]},
}


SECTIONS = ("train", "affinity.train", "segment.train")


def stamps(folder: Path) -> dict[str, int]:
    """Return the write times of the stages' files, without logs and scores, which every start writes."""
    kept = (".safetensors", ".npz", ".png", ".jpg", ".pt")
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.suffix in kept and "evaluation" not in path.parts
    }


def test_run_does_every_stage_and_then_nothing_twice(tiny_config, tmp_path, capsys) -> None:
    (tmp_path / "hooks.py").write_text("told = []\ndef log(line):\n    told.append((line['run'], line['stage']))\n")
    settings = config_file.load(tiny_config(**CHAIN, hook=f"{tmp_path}/hooks.py:log"))
    chain.run(settings)
    told = hook.load(settings.hook).__globals__["told"]
    assert told == [("tiny", "train"), ("tiny", "affinity"), ("tiny", "segment")]
    said = capsys.readouterr().out
    assert all(name in said for name in ("seeds, oracle threshold", "pseudo-masks", "segmenter and CRF"))
    first = stamps(settings.run)
    chain.run(settings)
    assert stamps(settings.run) == first
    assert len(told) == 3

    # A file lost in the middle of a stage: only that stage and the stages that need it run again.
    lost = next((settings.run / "segment" / "val" / "crf").iterdir())
    lost.unlink()
    chain.run(settings)
    again = stamps(settings.run)
    changed = {name for name in first if again[name] != first[name]}
    assert changed == {f"segment/val/{kind}/{lost.name}" for kind in ("masks", "crf")}


def test_a_finished_run_whose_list_or_tags_changed_says_so_and_is_kept(
    tiny_config, small_voc, capsys, tmp_path
) -> None:
    data = shutil.copytree(small_voc, tmp_path / "voc")
    settings = config_file.load(tiny_config(**CHAIN | {"data": {**CHAIN["data"], "root": str(data)}}))
    chain.run(settings)
    weights = (settings.run / "model.safetensors").stat().st_mtime_ns
    assert "was trained on another list" not in capsys.readouterr().err

    listed = data / settings.data.train_list
    ids = listed.read_text().splitlines()
    listed.write_text("\n".join(ids[:-1]))
    chain.run(settings)
    assert f"{settings.run} was trained on another list or other tags" in capsys.readouterr().err
    assert (settings.run / "model.safetensors").stat().st_mtime_ns == weights

    listed.write_text("\n".join(ids))
    chain.run(settings)
    assert "was trained on another list" not in capsys.readouterr().err


def test_a_list_that_only_the_last_stage_needs_is_missed_before_the_first(tiny_config) -> None:
    settings = config_file.load(tiny_config(segment={"eval_list": "later.txt"}))
    with pytest.raises(UserError, match=r"later\.txt: no such list"):
        chain.run(settings)
    assert not settings.run.exists()


def test_what_later_stages_need_is_checked_before_the_first(tiny_config) -> None:
    """One error names all of it, with full names of keys."""
    settings = config_file.load(
        tiny_config(
            model={"weights": "gone.safetensors"},
            affinity={"train": {"batch": 13, "epochs": 1}},
            segment={"eval_list": "later.txt", "train": {"batch": 2, "epochs": 1, "accumulate": 7}},
        )
    )
    with pytest.raises(UserError) as raised:
        chain.run(settings)
    lines = str(raised.value).splitlines()
    found = [
        "segment.eval_list: ",
        "affinity.train.batch is 13",
        "segment.train.accumulate is 7",
        "model.weights: gone",
    ]
    assert [line[: len(start)] for line, start in zip(lines, found, strict=True)] == found
    assert not settings.run.exists()


@pytest.mark.parametrize("key", ["train", "affinity.train", "segment.train"])
def test_every_batch_is_shared_by_all_processes(key: str, tiny_config) -> None:
    batches = {section: 3 if section == key else 4 for section in SECTIONS}
    settings = config_file.load(tiny_config(), [f"{section}.batch={batch}" for section, batch in batches.items()])
    with pytest.raises(UserError, match=rf"^{key}\.batch is 3, expected a multiple of torchrun's 2 processes$"):
        chain.check(settings, world=2)


def test_without_ground_truth_nothing_is_scored(tiny_config, small_voc) -> None:
    settings = config_file.load(tiny_config(data={"masks": "nowhere"}))
    assert chain.score(settings, Path("ImageSets/Segmentation/val.txt"), masks=small_voc) is None


@pytest.mark.parametrize("command", ["segment", "run"])
def test_commands_are_listed(command) -> None:
    from typer.testing import CliRunner

    from cpn_fast.cli import app

    assert command in CliRunner().invoke(app, ["--help"]).output
