"""``train.validate_every``: scores during training, the best weights, and the stages that use them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from several_processes import run_in_processes

import cpn_fast
from cpn_fast import config, config_file
from cpn_fast.commands import report
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.seeds import seed_probabilities
from cpn_fast.models.network import Network
from cpn_fast.models.weights import BEST, read_weights, training_of
from cpn_fast.runtime import distributed
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import cam, chain, evaluate, train
from cpn_fast.training import checkpoint, validation
from cpn_fast.training.metrics import mean_average_precision

VAL = "ImageSets/Segmentation/val.txt"
PLAIN = {"method": "cam", "model": {"pcm": False, "prcm": False}, "cam": {"map": "raw", "scales": [1.0]}}
VALIDATED: dict[str, Any] = {**PLAIN, "data": {"eval_list": VAL}, "train": {"validate_every": 2, "checkpoint_every": 1}}


def scores(settings: config.Config, name: str = "validation_mIoU") -> dict[int, float]:
    lines = [json.loads(line) for line in (settings.run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_the_score_is_that_of_seeds_at_one_scale_and_the_best_weights_are_kept(tiny_config, capsys) -> None:
    path = tiny_config(**VALIDATED | {"train": {**VALIDATED["train"], "log_every": 4, "keep_checkpoints": 9}})
    settings = config_file.load(path)
    final = train.run(settings)
    assert final == settings.run / "model.safetensors"
    said = capsys.readouterr().out
    assert f"Validating on 4 of the 4 images of {VAL}, 0 of which are trained on: mIoU of their seeds" in said
    found = scores(settings)
    assert list(found) == [2, 4, 6]  # each belongs to a line
    best = max(found, key=found.__getitem__)
    note = training_of(settings.run / BEST)
    assert (note["step"], note["score"], note["measure"]) == (best, found[best], "mIoU")
    kept = checkpoint.read(settings.run / f"checkpoints/step-{best:08d}.pt", torch.device("cpu"))["model"]
    weights = read_weights(settings.run / BEST)
    assert all(torch.equal(weights[name.removeprefix("backbone.")], tensor) for name, tensor in kept.items())
    straight = settings.model_copy(update={"cam": settings.cam.model_copy(update={"flip": False})})
    seeds = cam.run(straight, settings.run / BEST) / "seeds"
    scored = evaluate.run(straight, cams=seeds, masks=None, list_path=None, threshold_from=None)
    assert float(scored.oracle.mean_iou) == pytest.approx(found[best], abs=2e-3)  # seeds are stored in 16 bits


def test_without_masks_the_score_is_the_precision_of_tags(tiny_config, small_voc, tmp_path, capsys) -> None:
    root = tmp_path / "voc"
    shutil.copytree(small_voc, root, ignore=shutil.ignore_patterns("SegmentationClass"))
    settings = config_file.load(tiny_config(**VALIDATED | {"data": {"root": str(root), "eval_list": VAL}}))
    train.run(settings)
    assert "mAP of their tags, since masks are missing" in capsys.readouterr().out
    found = scores(settings, "validation_mAP")
    note = training_of(settings.run / BEST)
    assert note["measure"] == "mAP"
    samples = load_samples(settings.data, settings.classes, Path(VAL), labels=True, masks=False)
    seeds = cam.run(settings, settings.run / BEST) / "seeds"
    labels = np.stack([sample.label for sample in samples])
    given = np.stack([seed_probabilities(seeds / f"{sample.id}.npz") for sample in samples])
    expected = mean_average_precision(torch.from_numpy(labels), torch.from_numpy(given))
    assert found[note["step"]] == pytest.approx(expected)
    page = report.run(settings.run).page.read_text()
    assert 'alt="validation over the steps"' in page
    assert f"mAP {note['score']:.1%} after step {note['step']} (best.safetensors)" in page


def test_validation_changes_no_weights_and_a_killed_run_ends_with_the_same_best(tiny_config, monkeypatch) -> None:
    plain = load_file(train.run(config_file.load(tiny_config(**PLAIN, out=str(Path(tiny_config()).parent / "plain")))))
    whole = config_file.load(path := tiny_config(**VALIDATED), ["train.checkpoint_every=3"])
    broken = config_file.load(path, ["train.checkpoint_every=3", f"out={whole.out}-broken"])
    with_scores = load_file(train.run(whole))
    assert all(torch.equal(with_scores[name], plain[name]) for name in plain)

    class Killed(Exception):
        pass

    real = validation.Validation.after

    def die_after_the_fourth(self: validation.Validation, step: int, network: Network) -> dict[str, float]:
        found = real(self, step, network)
        if step == 4:  # its best weights may exist, but the last checkpoint is of step 3
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(validation.Validation, "after", die_after_the_fourth)
        with pytest.raises(Killed):
            train.run(broken)
    train.run(broken)
    assert scores(broken) == scores(whole)
    assert training_of(broken.run / BEST) == training_of(whole.run / BEST)
    a, b = (load_file(settings.run / BEST) for settings in (broken, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def best_after(path: Path) -> dict:
    settings = config_file.load(path)
    train.run(settings)
    return training_of(settings.run / BEST) | {"scores": scores(settings)}


def test_processes_score_as_one(tiny_config) -> None:
    one = best_after(tiny_config(**VALIDATED, name="one"))
    for found in run_in_processes(2, best_after, tiny_config(**VALIDATED, name="two")):
        assert found["scores"] == pytest.approx(one["scores"], abs=1e-3)
        assert found["of"] == one["of"]


def test_later_stages_take_the_weights_that_the_config_names(tiny_config) -> None:
    path = tiny_config(**VALIDATED)
    settings = config_file.load(path)
    last = train.run(settings)
    best = settings.run / BEST
    chosen = config_file.load(path, ["train.use_weights=best"])
    stamp = last.stat().st_mtime_ns
    assert train.run(chosen) == best  # no step is trained
    assert last.stat().st_mtime_ns == stamp
    assert cpn_fast.load(settings.run).weights == best  # the run's config.yaml now names them
    assert train.run(settings) == last
    assert cpn_fast.load(settings.run).weights == last
    best.write_bytes(best.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"best\.safetensors: not .* delete it, and set train\.use_weights to last"):
        cam.run(chosen, best)
    best.unlink()
    with pytest.raises(UserError, match=r"no \S+best\.safetensors: .* Set train\.use_weights to last"):
        train.run(chosen)


def test_run_takes_the_best_weights(tiny_config, monkeypatch) -> None:
    taken = []

    def seeds_of(settings: config.Config, weights: Path, *_: object) -> Path:
        taken.append(weights)
        raise UserError("far enough")

    monkeypatch.setattr(cam, "run", seeds_of)
    monkeypatch.setattr(chain, "check", lambda *_: None)
    path = tiny_config(**VALIDATED | {"train": {**VALIDATED["train"], "use_weights": "best"}})
    with pytest.raises(UserError, match="far enough"):
        chain.run(config_file.load(path))
    assert [weights.name for weights in taken] == [BEST]


def test_other_maps_choose_the_best_anew(tiny_config, capsys) -> None:
    path = tiny_config(data={"eval_list": VAL}, train={"validate_every": 2, "checkpoint_every": 1})
    train.run(config_file.load(path))
    train.run(config_file.load(path, ["train.steps=8", "cam.map=raw"]))
    assert "was the best on other images or of other maps: chosen anew" in capsys.readouterr().err
    assert training_of(config_file.load(path).run / BEST)["step"] == 8


def test_other_images_choose_the_best_anew(tiny_config, capsys) -> None:
    path = tiny_config(**VALIDATED)
    train.run(config_file.load(path))
    listed = ["train.steps=8", "data.eval_list=ImageSets/Segmentation/train.txt"]
    before = training_of(config_file.load(path).run / BEST)
    train.run(config_file.load(path, listed))
    said = capsys.readouterr()
    assert "was the best on other images or of other maps: chosen anew" in said.err
    assert "12 of which are trained on" in said.out
    after = training_of(config_file.load(path).run / BEST)
    assert after["of"] != before["of"]
    assert after["step"] == 8


def test_only_a_part_of_a_long_list_is_looked_at(tiny_config, monkeypatch) -> None:
    monkeypatch.setattr(validation, "MOST", 3)
    settings = config_file.load(tiny_config(**VALIDATED))
    found = validation.Validation(settings, [], distributed.join(), begins=True).samples
    assert [sample.id for sample in found] == ["val_0000", "val_0002", "val_0003"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"use_weights": "best"}}, "use_weights is best, which needs scores: set validate_every"),
        (
            {"segment": {"train": {"validate_every": 5}}},
            "segment.train.validate_every: .* for section train only; set it to null",
        ),
    ],
)
def test_what_finds_no_best_weights_is_refused(changes, message, tiny_config) -> None:
    with pytest.raises(UserError, match=message):
        config_file.load(tiny_config(**changes))
