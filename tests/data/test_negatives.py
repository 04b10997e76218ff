"""Images that show no class: their effect on each loss, and a whole run in which half of the images are such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cpn_fast.config import Config
from cpn_fast.config_file import load, parse
from cpn_fast.data.masks import read_mask, write_mask
from cpn_fast.data.seeds import read_seed
from cpn_fast.methods.known import METHODS
from cpn_fast.methods.method import Losses, Method
from cpn_fast.pipelines.batch import Batch
from cpn_fast.stages import cam, evaluate, train

PAPER = {
    "background": "before-lambda",
    "refined_background": "own",
    "cpcr_target": "difference",
    "normalise": "max",
    "hard_over": "batch",
}


def settings(method: str, **sections: dict) -> Config:
    tree = {
        "name": "x",
        "classes": ["a", "b"],
        "data": {"root": "nowhere"},
        "method": method,
        "model": {"backbone": "narrow"},
        "train": {"steps": 1},
        **sections,
    }
    return parse(tree, "test")


def losses_of(config: Config, labels: list[list[int]]) -> tuple[Losses, Method]:
    torch.manual_seed(0)
    method = METHODS[config.method](config)
    cells = torch.arange(32) // 8
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        torch.randn(len(labels), 3, 32, 32, generator=generator),
        (cells[:, None] * 4 + cells).int().expand(len(labels), 32, 32).contiguous(),
        torch.tensor(labels).float(),
        torch.arange(len(labels)),
    )
    views = method.views(batch, generator)
    found = method.losses([method.network(*inputs) for inputs in views.inputs], views)
    found.total.backward()
    return found, method


def gradient(method: Method, head: str) -> float:
    weight = method.network.get_parameter(f"{head}.weight")
    return 0.0 if weight.grad is None else float(weight.grad.abs().sum())


@pytest.mark.parametrize("labels", [[[1, 0], [0, 0]], [[0, 0], [0, 0]]])
@pytest.mark.parametrize("name", ["cam", "seam", "cpn", "paper"])
def test_losses_and_gradients_are_finite_with_negatives(name: str, labels: list[list[int]]) -> None:
    plain: dict[str, Any] = {"model": {"backbone": "narrow", "pcm": False, "prcm": False}, "cam": {"map": "raw"}}
    sections: dict[str, Any] = {"cam": plain, "paper": {"loss": PAPER}}.get(name, {})
    found, method = losses_of(settings("cpn" if name == "paper" else name, **sections), labels)
    assert all(torch.isfinite(value) for value in found.parts.values())
    gradients = [parameter.grad for parameter in method.network.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(value).all() for value in gradients)
    assert gradient(method, "fc8") > 0  # absence is learned


def test_of_a_negative_the_released_terms_of_consistency_train_nothing() -> None:
    found, method = losses_of(settings("cpn"), [[0, 0]])
    parts = {name: float(value) for name, value in found.parts.items()}
    classification = parts.pop("classification")
    assert classification > 0
    assert parts == pytest.approx({"tcp": 0, "tcp_refined": 0, "cpcr": 2, "background_suppression": 0})
    assert gradient(method, "f9") == 0


def test_of_a_negative_the_paper_s_cross_regularisation_asks_for_background() -> None:
    found, method = losses_of(settings("cpn", loss=PAPER), [[0, 0]])
    assert found.parts["tcp"] == found.parts["tcp_refined"] == 0
    assert found.parts["cpcr"] > 0
    assert gradient(method, "f9") > 0


def test_of_a_negative_seam_s_er_is_zero() -> None:
    found, _ = losses_of(settings("seam"), [[0, 0]])
    assert found.parts["er"] == found.parts["background_suppression"] == 0


def test_one_class_and_as_many_negatives_from_training_to_scores(tiny_config, small_voc: Path, tmp_path: Path) -> None:
    path = tiny_config(train={"steps": 2})
    tree = yaml.safe_load(path.read_text())
    ids = (small_voc / "ImageSets/Segmentation/train.txt").read_text().split()
    tags = tmp_path / "tags.csv"
    tags.write_text("image,tags\n" + "".join(f"{id_}.jpg,{'thing' if k % 2 else ''}\n" for k, id_ in enumerate(ids)))
    masks = tmp_path / "masks"
    for id_ in ids:
        mask = read_mask(small_voc / f"SegmentationClass/{id_}.png")
        write_mask(masks / f"{id_}.png", np.where((mask > 0) & (mask < 255), np.uint8(1), mask))
    tree["classes"] = ["thing"]
    tree["data"] = {"root": str(small_voc), "labels": str(tags), "masks": str(masks)}
    path.write_text(yaml.safe_dump(tree))
    config = load(path)
    assert config.data.train_list == config.data.eval_list == tags  # without --list: all tagged images
    folder = cam.run(config, train.run(config))
    assert len(read_seed(folder / f"seeds/{ids[0]}.npz").classes) == 0
    assert read_mask(folder / f"masks/{ids[0]}.png").max() == 0
    assert read_seed(folder / f"seeds/{ids[1]}.npz").classes.tolist() == [0]
    scores = evaluate.run(config, cams=folder / "seeds", masks=None, list_path=None, threshold_from=None)
    assert len(scores.ids) == len(ids)
