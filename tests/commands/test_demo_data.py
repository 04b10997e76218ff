from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cpn_fast.commands import demo_data
from cpn_fast.commands.demo_data import DEMO_CLASSES, generate
from cpn_fast.config import Data
from cpn_fast.data.dataset import check_files, load_samples
from cpn_fast.data.masks import IGNORE, read_mask
from cpn_fast.runtime.errors import UserError


def digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_same_seed_gives_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        generate(tmp_path / name, seed=seed, train=4, val=2)
    assert digests(tmp_path / "first") == digests(tmp_path / "again")
    images = "JPEGImages/train_0000.jpg"
    assert digests(tmp_path / "first")[images] != digests(tmp_path / "other")[images]


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path):
    generate(tmp_path / "few", train=2, val=1)
    generate(tmp_path / "more", train=4, val=2)
    few, more = digests(tmp_path / "few"), digests(tmp_path / "more")
    shared = [name for name in few if name.startswith(("JPEGImages", "SegmentationClass", "Annotations"))]
    assert len(shared) == 9
    assert {name: few[name] for name in shared} == {name: more[name] for name in shared}


def test_training_and_validation_images_differ(tmp_path):
    generate(tmp_path / "demo", train=1, val=1)
    found = digests(tmp_path / "demo")
    assert found["JPEGImages/train_0000.jpg"] != found["JPEGImages/val_0000.jpg"]


@pytest.mark.parametrize("name", ["train", "val"])
def test_it_is_a_sound_data_set_whose_tags_are_the_classes_of_its_masks(small_voc, name):
    data = Data(root=small_voc)
    samples = load_samples(data, DEMO_CLASSES, Path(f"ImageSets/Segmentation/{name}.txt"), labels=True, masks=True)
    assert len(samples) == {"train": 12, "val": 4}[name]
    check_files(samples, classes=len(DEMO_CLASSES), workers=1)
    for sample in samples:
        present = set(np.unique(read_mask(sample.mask))) - {0, IGNORE}
        assert present == {k + 1 for k in np.flatnonzero(sample.label)}


def test_every_object_is_outlined_by_ignored_pixels(small_voc):
    for path in (small_voc / "SegmentationClass").iterdir():
        mask = read_mask(path).astype(int)
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            assert not ((a != b) & (a != IGNORE) & (b != IGNORE)).any()


def test_there_are_several_sizes_tags_and_every_class(tmp_path):
    generate(tmp_path / "demo", train=40, val=0)
    list_path = Path("ImageSets/Segmentation/train.txt")
    samples = load_samples(Data(root=tmp_path / "demo"), DEMO_CLASSES, list_path, labels=True, masks=True)
    labels = np.stack([sample.label for sample in samples])
    masks = [read_mask(sample.mask) for sample in samples]
    covered = [np.isin(mask, (0, IGNORE), invert=True).mean() for mask in masks]
    assert labels.any(0).all()
    assert set(labels.sum(1)) >= {1, 2}
    assert len({mask.shape for mask in masks}) >= 4
    assert min(covered) < 0.06
    assert max(covered) > 0.25


def test_a_complete_data_set_is_left_alone(tmp_path, monkeypatch):
    generate(tmp_path / "demo", train=2, val=1)
    (tmp_path / "demo/ImageSets/Segmentation/mine.txt").write_text("train_0000\n")
    monkeypatch.setattr(demo_data, "_scene", lambda rng: pytest.fail("drew an image"))
    generate(tmp_path / "demo", train=2, val=1)
    assert (tmp_path / "demo/ImageSets/Segmentation/mine.txt").exists()


def test_an_incomplete_or_different_one_is_replaced(tmp_path):
    root = tmp_path / "demo"
    generate(root, train=2, val=1)
    whole = digests(root)
    (root / "SegmentationClass/train_0001.png").unlink()
    generate(root, train=2, val=1)
    assert digests(root) == whole
    generate(root, train=1, val=1)
    assert (root / "ImageSets/Segmentation/train.txt").read_text() == "train_0000\n"
    assert not (root / "JPEGImages/train_0001.jpg").exists()


def test_an_interrupted_run_leaves_nothing_behind_that_looks_complete(tmp_path, monkeypatch):
    root = tmp_path / "demo"
    drawn = []

    def interrupt(rng):
        drawn.append(rng)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return scene(rng)

    scene = demo_data._scene
    monkeypatch.setattr(demo_data, "_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(root, train=2, val=1)
    assert not root.exists()
    monkeypatch.undo()
    generate(root, train=2, val=1)
    generate(tmp_path / "clean", train=2, val=1)
    assert digests(root) == digests(tmp_path / "clean")


def test_what_a_killed_one_left_beside_a_complete_one_is_removed(tmp_path):
    root = tmp_path / "demo"
    generate(root, train=1, val=1)
    for kind in ("partial", "replaced"):
        (tmp_path / f".demo.{kind}/JPEGImages").mkdir(parents=True)
    generate(root, train=1, val=1)
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize("before", ["foreign folder", "foreign file in a generated folder", "file"])
def test_what_it_did_not_make_is_never_replaced(tmp_path, before):
    root = tmp_path / "demo"
    if before == "file":
        root.write_text("mine")
    elif before == "foreign folder":
        (root / "JPEGImages").mkdir(parents=True)
        (root / "JPEGImages/mine.jpg").write_text("mine")
    else:
        generate(root, train=1, val=0)
        (root / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not the demo's data set"):
        generate(root, train=2, val=0)
    mine = {"file": root, "foreign folder": root / "JPEGImages/mine.jpg"}.get(before, root / "notes.txt")
    assert mine.read_text() == "mine"
