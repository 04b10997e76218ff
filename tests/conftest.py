from __future__ import annotations

import importlib.util
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
import yaml

from cpn_fast.commands.demo_data import DEMO_CLASSES, generate
from cpn_fast.config_file import parse
from cpn_fast.data.masks import IGNORE, read_mask, write_mask
from cpn_fast.stages import cam, evaluate, segment, train

hypothesis.settings.register_profile("cpn_fast", deadline=None)  # no test may depend on the machine's speed
hypothesis.settings.load_profile("cpn_fast")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if item.get_closest_marker("fast_slic") and importlib.util.find_spec("fast_slic") is None:
        pytest.skip("needs fast-slic")
    torch.manual_seed(0)  # the same random numbers in every run, whatever ran before


@pytest.fixture(scope="session")
def small_voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generate a data set in VOC's layout: 12 training and 4 validation images with tags and masks."""
    root = tmp_path_factory.mktemp("voc")
    generate(root, seed=0, train=12, val=4)
    return root


@pytest.fixture(scope="session")
def small_run(small_voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps on the small data set, with seeds and scores of its validation images. Read-only."""
    settings = parse(
        {
            "name": "small",
            "out": str(tmp_path_factory.mktemp("runs")),
            "classes": list(DEMO_CLASSES),
            "data": {"root": str(small_voc), "train_list": "ImageSets/Segmentation/train.txt"},
            "augment": {"long_side": [64, 96], "crop": 64},
            "model": {"backbone": "narrow"},
            "superpixels": {"count": 30},
            "train": {"batch": 4, "steps": 2, "log_every": 1, "data_threads": 1, "precision": "fp32"},
            "cam": {"scales": [0.5, 1.0]},
        },
        "small_run",
    )
    val = Path("ImageSets/Segmentation/val.txt")
    seeds = cam.run(settings, train.run(settings), val) / "seeds"
    evaluate.run(settings, cams=seeds, masks=None, list_path=val, threshold_from=None)
    return settings.run


@pytest.fixture(scope="session")
def small_segmenter(small_voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``RUN/segment/deeplab`` of a segmenter that was trained on ground truth. Read-only.

    Its validation masks are in ``RUN/segment/val``.
    """
    masks = tmp_path_factory.mktemp("masks")
    for path in (small_voc / "SegmentationClass").iterdir():
        mask = read_mask(path).copy()
        kept = np.zeros(mask.shape, bool)
        kept[::4, ::4] = True
        mask[(mask == 0) & ~kept] = IGNORE  # with all of the background, so few steps would predict only background
        write_mask(masks / path.name, mask)
    settings = parse(
        {
            "name": "small",
            "out": str(tmp_path_factory.mktemp("segmented")),
            "classes": list(DEMO_CLASSES),
            "data": {"root": str(small_voc), "train_list": "ImageSets/Segmentation/train.txt"},
            "model": {"backbone": "narrow"},
            "train": {"steps": 1},
            "crf": {"workers": 1},
            "segment": {
                "augment": {"crop": 96},
                "train": {"batch": 4, "steps": 40, "lr": 0.01, "data_threads": 1, "precision": "fp32"},
                "bn_momentum": 0.1,
                "scales": [0.5, 1.0],
            },
        },
        "small_segmenter",
    )
    weights = segment.run(settings, masks)
    segment.segment(settings, weights)
    return weights.parent


@pytest.fixture
def tiny_config(small_voc: Path, tmp_path: Path):
    """Return a function that writes a config of a few training steps on the small data set.

    Its keyword arguments are merged into the config.
    """

    def write(**changes: dict) -> Path:
        tree: dict = {
            "name": "tiny",
            "out": str(tmp_path / "runs"),
            "classes": list(DEMO_CLASSES),
            "data": {"root": str(small_voc), "train_list": "ImageSets/Segmentation/train.txt"},
            "superpixels": {"count": 30},
            "augment": {"long_side": [64, 96], "crop": 64},
            "model": {"backbone": "narrow"},
            "train": {
                "batch": 2,
                "steps": 6,
                "log_every": 2,
                "checkpoint_every": 3,
                "data_threads": 1,
                "precision": "fp32",
            },
            "cam": {"scales": [0.5, 1.0], "batch": 2},
        }
        for key, value in changes.items():
            tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
        path = tmp_path / f"{tree['name']}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture
def short_chain(tiny_config) -> Path:
    """A config whose stages take seconds: trainings of one step on the validation list."""
    short = {"batch": 2, "steps": 1, "data_threads": 1}
    size = {"long_side": [64, 96], "crop": 64}
    val = "ImageSets/Segmentation/val.txt"
    return tiny_config(
        train=short,
        data={"train_list": val, "eval_list": val},
        crf={"workers": 1},
        affinity={"train": short, "augment": size},
        segment={"train": short, "augment": size, "scales": [1.0], "crf": None},
    )
