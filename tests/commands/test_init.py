"""``cpn-fast init`` on typical folders of photos."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from cpn_fast.cli import app
from cpn_fast.commands import init
from cpn_fast.config import Config, Crf, Superpixels, Walk
from cpn_fast.config_file import load
from cpn_fast.data.dataset import Sample, load_samples
from cpn_fast.pipelines.superpixels import SuperpixelCache
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import train


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write twenty photos of 40 x 30 pixels into a folder, half of them into its subfolder."""
    rng = np.random.default_rng(0)
    for k in range(20):
        path = tmp_path / "my photos" / ("more" if k % 2 else "") / f"p{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (30, 40, 3)).astype(np.uint8)).save(path)
    (tmp_path / "my photos/._p0.jpg").write_bytes(b"junk")
    return tmp_path / "my photos"


def started(photos: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[Config, str]:
    """Return the config that the command writes, and its output. A step is assumed to take two seconds."""
    monkeypatch.chdir(photos.parent)
    monkeypatch.setattr("cpn_fast.training.batch_size.try_steps", lambda *_: 2.0)
    result = CliRunner().invoke(app, ["init", str(photos), *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return load(Path("my-photos-cpn/config.yaml")), result.output


TAGS = {
    "tags.csv": "image,tags\n" + "".join(f"p{k}.jpg,{('red', 'dark blue', '')[k % 3]}\n" for k in range(20)),
    "labels.csv": "image,red,dark blue\n" + "".join(f"p{k},{int(k % 3 == 0)},{int(k % 3 == 1)}\n" for k in range(20)),
    "all.json": json.dumps({f"p{k}": (["red"], ["dark blue"], [])[k % 3] for k in range(20)}),
}


@pytest.mark.parametrize("name", TAGS)
def test_tags_are_found_and_make_a_config_that_trains(name: str, photos: Path, monkeypatch) -> None:
    (photos / name).write_text(TAGS[name])
    config, said = started(photos, monkeypatch)
    assert sorted(config.classes) == ["dark blue", "red"]
    assert "20 of 20 photos are tagged" in said
    assert "red (7)" in said
    assert "6 photos show none of them" in said
    lists = [config.data.train_list, config.segment.eval_list]
    ids = [{s.id for s in load_samples(config.data, config.classes, x, labels=True, masks=False)} for x in lists]
    assert ids[0] | ids[1] == {f"{'more/' if k % 2 else ''}p{k}" for k in range(20)}
    assert not ids[0] & ids[1]
    assert 1 <= len(ids[1]) <= 4
    small = {"crop": 32, "long_side": (32, 48)}
    short = config.model_copy(
        update={
            "augment": config.augment.model_copy(update=small),
            "train": config.train.model_copy(update={"steps": 1, "precision": "fp32"}),
        }
    )
    assert train.run(short).is_file()


def test_it_says_how_long_and_what_to_type_and_the_sizes_follow(photos: Path, monkeypatch) -> None:
    (photos / "tags.csv").write_text(TAGS["tags.csv"])
    config, said = started(photos, monkeypatch)
    # A hundred passes of 16 photos end before the hour.
    assert config.train.steps == 100 * 16 // 8
    assert config.segment.train.steps == config.affinity.train.steps == config.train.steps // 2
    assert "A step of 8 photos takes 2 s on this CPU" in said.replace("\n", " ")
    assert re.search(r"about\s+7\s+minutes, and cpn-fast run, with all stages, about\s+13", said)
    assert "cpn-fast doctor my-photos-cpn/config.yaml" in said
    assert "cpn-fast run my-photos-cpn/config.yaml" in said


def test_seeds_and_background_thresholds_fit_the_network(photos: Path, monkeypatch) -> None:
    (photos / "tags.csv").write_text(TAGS["tags.csv"])
    small, _ = started(photos, monkeypatch)
    assert small.cam.map == "raw"
    assert (1 - small.cam.mask_threshold) ** small.walk.alpha == small.cam.mask_threshold  # both cut at one threshold
    assert small.crf.low_alpha < small.walk.alpha < small.crf.high_alpha
    assert small.loss.hard_share == 1  # two classes
    save_file({"conv1a.weight": torch.zeros(1)}, "resnet38d.safetensors")
    started(photos, monkeypatch, "--weights", "resnet38d.safetensors", "--out", "large")
    large = load(Path("large/config.yaml"))
    assert (large.cam.map, large.crf, large.walk) == ("refined", Crf(), Walk())


def test_torchvision_s_weights_come_with_their_normalisation(photos: Path, monkeypatch) -> None:
    (photos / "tags.csv").write_text(TAGS["tags.csv"])
    weights = {"features.0.0.weight": torch.zeros(1), "classifier.1.weight": torch.zeros(1000, 2)}
    save_file(weights, photos.parent / "mobilenet_v2.safetensors")
    config, _ = started(photos, monkeypatch, "--weights", photos.parent / "mobilenet_v2.safetensors")
    assert config.model.mean == (123.675, 116.28, 103.53)
    assert config.model.std == (58.395, 57.12, 57.375)


@pytest.mark.parametrize(("classes", "share"), [(1, 1), (2, 1), (4, 0.84), (20, 0.2), (80, 0.2)])
def test_few_classes_count_a_larger_share_of_the_errors(classes: int, share: float) -> None:
    assert init.hard_share(classes) == share


@pytest.mark.parametrize("more", ["train", "640"])
def test_a_table_may_have_columns_that_are_no_classes(more: str, photos: Path, monkeypatch) -> None:
    rows = (f"p{k},{int(k % 3 == 0)},{int(k % 3 == 1)},{more}\n" for k in range(20))
    (photos / "tags.csv").write_text("image,red,dark blue,more\n" + "".join(rows))
    config, _ = started(photos, monkeypatch)
    assert sorted(config.classes) == ["dark blue", "red"]


def test_one_column_of_0_and_1_beside_text_is_refused(photos: Path) -> None:
    (photos / "tags.csv").write_text("image,thing,checked\n" + "".join(f"p{k},red,{k % 2}\n" for k in range(20)))
    assert "column checked holds 0 and 1, and thing holds text" in message_of(photos, None, None, None)


def test_a_quote_that_is_not_closed_is_said(photos: Path) -> None:
    (photos / "tags.csv").write_text('image,"tags\n' + "".join(f"p{k}.jpg,red\n" for k in range(20_000)))
    assert "not readable as CSV" in message_of(photos, None, None, None)


def test_tags_of_other_photos_are_said(photos: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "cls_labels.npy", np.array({"q0": np.zeros(20)}), allow_pickle=True)
    message = message_of(photos, tmp_path / "cls_labels.npy", None, None)
    assert "cls_labels.npy: it tags none of the 20 photos" in message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "P1.JPG,red\nP0.JPG,blue\n", "(P1.JPG, P0.JPG) differ in capital letters, as P1.JPG and more/p1:"),
        ("t.json", '{"P0": ["red"]}', "(P0) differ in capital letters, as P0 and p0: write them as the files' names"),
        ("t.csv", "q0.jpg,red\n", "(q0.jpg) are not those of the files. Expected a CSV"),
        ("t.csv", "", "(none) are not those of the files. Expected a CSV"),
    ],
)
def test_names_of_no_photo_are_said(name: str, text: str, message: str, photos: Path) -> None:
    (photos / name).write_text(text)
    said = message_of(photos, None, None, None)
    assert f"{photos / name}: it tags none of the 20 photos" in said
    assert message in said


def into_folders(photos: Path, *names: str) -> None:
    """Move the twenty photos into folders, in turn."""
    for k, path in enumerate(sorted(photos.rglob("p*.jpg"))):
        place = photos / names[k % len(names)] / f"{k // len(names)}.jpg"
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
    (photos / "more").rmdir()


def test_folders_of_classes_are_tags(photos: Path, monkeypatch) -> None:
    into_folders(photos, "cats", "dogs")
    config, _ = started(photos, monkeypatch)
    assert config.classes == ("cats", "dogs")
    samples = load_samples(config.data, config.classes, config.data.train_list, labels=True, masks=False)
    assert all(
        sample.label.tolist() == [sample.id.startswith("cats/"), sample.id.startswith("dogs/")] for sample in samples
    )


@pytest.mark.parametrize("folders", [("Background", "cats", "dogs"), ("NONE", "cats"), ("negative", "negatives", "x")])
def test_folders_of_negatives_are_no_classes(folders: tuple[str, ...], photos: Path, monkeypatch) -> None:
    into_folders(photos, *folders)
    config, said = started(photos, monkeypatch)
    negatives = [name for name in folders if name.lower() in init.NEGATIVES]
    assert config.classes == tuple(name for name in folders if name not in negatives)
    assert f"Photos in {', '.join(negatives)} are negatives, without a tag" in said.replace("\n", " ")
    for path in (config.data.train_list, config.segment.eval_list):
        for sample in load_samples(config.data, config.classes, path, labels=True, masks=False):
            place = sample.id.split("/")[0]
            assert sample.label.tolist() == [name == place for name in config.classes]


def test_negatives_alone_are_no_classes(photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    into_folders(photos, "background", "none")
    assert "its photos are not in a folder for each class" in message_of(photos, None, None, None)


@pytest.mark.parametrize("place", ["", "JPEGImages"])
@pytest.mark.parametrize("layout", ["flat", "subfolders", "classes"])
def test_masks_beside_the_photos_are_no_photos(layout: str, place: str, photos: Path, monkeypatch) -> None:
    if layout == "classes":
        into_folders(photos, "cats", "dogs")
    else:
        (photos / "tags.csv").write_text(TAGS["tags.csv"])
    if layout == "flat":
        for path in (photos / "more").iterdir():
            path.rename(photos / path.name)
    if place:
        (photos / place).mkdir()
        for path in [path for path in photos.iterdir() if path.suffix != ".csv" and path.name != place]:
            path.rename(photos / place / path.name)
    config, _ = started(photos, monkeypatch)
    before = lists(config)
    for path in [path for path in (photos / place).rglob("*.jpg") if not path.name.startswith(".")]:
        for folder in ("SegmentationClass", "SegmentationClassAug", "SegmentationObject"):
            mask = (photos / folder / path.relative_to(photos / place)).with_suffix(".png")
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (40, 30)).save(mask)
    again = init.run(photos, None, None, None).remarks
    assert "The config exists already and is kept" in again
    assert any("20 of 20 photos are tagged" in remark for remark in again)
    assert lists(config) == before


def test_parts_of_a_data_set_are_no_classes(photos: Path) -> None:
    for name, source in (("train", "p*.jpg"), ("Test", "more/p*.jpg")):
        place = photos / name / "cats"
        place.mkdir(parents=True)
        for path in photos.glob(source):
            path.rename(place / path.name)
    assert "its folders Test, train look like parts of a data set" in message_of(photos, None, None, None)


def test_folders_of_images_and_masks_are_no_classes(photos: Path) -> None:
    into_folders(photos, "images", "masks")
    assert f"Give one of them ({photos}/images)" in message_of(photos, None, None, None)


def test_classes_that_may_be_none_or_one_are_said(photos: Path, monkeypatch) -> None:
    (photos / "tags.csv").write_text("".join(f"p{k},{('red', 'Red', 'blue', 'nan')[k % 4]}\n" for k in range(20)))
    _, said = started(photos, monkeypatch)
    assert "Red and red are different classes, but may be one" in said
    assert "nan is a class like others. If it means that a photo has no tag, leave it out" in said


@pytest.mark.parametrize("tag", ["background", "re\u200bd", "\x07"])
def test_a_tag_that_cannot_be_a_class_is_said_with_its_file(tag: str, photos: Path) -> None:
    path = photos / "tags.csv"
    path.write_text(f"p0,{tag}\np2,blue\n", encoding="utf-8")
    assert f"{path}: 1 problem(s)\n  classes has {tag!r}" in message_of(photos, path, photos.parent / "out", None)
    assert not list((photos.parent / "out").iterdir())


def test_a_list_of_init_that_is_damaged_is_named(photos: Path, monkeypatch) -> None:
    (photos / "tags.csv").write_text(TAGS["tags.csv"])
    started(photos, monkeypatch)
    (photos.parent / "my-photos-cpn/held_out.txt").write_bytes(b"\xff\xfe")
    assert "held_out.txt: not readable as a list of images" in message_of(photos, None, None, None)


def test_a_folder_that_cannot_be_read_is_said(photos: Path, monkeypatch) -> None:
    real = os.scandir

    def scandir(path):
        if Path(path).name == "more":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    (photos / "tags.csv").write_text(TAGS["tags.csv"])
    monkeypatch.setattr(os, "scandir", scandir)  # root may read every folder
    _, said = started(photos, monkeypatch)
    assert f"Warning: {photos}/more: Permission denied; the files in it are left out" in said
    assert "10 of 10 photos are tagged" in said


def test_results_among_the_photos_are_no_photos(photos: Path, monkeypatch) -> None:
    (photos / "tags.csv").write_text(TAGS["tags.csv"])
    for folder, marks in (("run", ("config.yaml", "metrics.jsonl")), ("run/cams/train", ("made_by.json",))):
        (photos / folder).mkdir(parents=True)
        for name in marks:
            (photos / folder / name).write_text("{}")
        shutil.copy(photos / "p0.jpg", photos / folder / "x.png")
    shutil.copy(photos / "p0.jpg", photos / "p0_mask.png")
    (photos / "p0.json").write_text('{"made_of": {}}')
    SuperpixelCache(photos / "superpixels", Superpixels(count=5)).build([Sample("p0", photos / "p0.jpg", None, None)])
    (photos / "more/manifest.json").write_text("{}")  # of another program
    assert "20 of 20 photos are tagged" in started(photos, monkeypatch)[1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("boxes.csv", "file,width,kind,xmin\np0.jpg,40,red,7\np1.jpg,40,blue,9\n", "7 and 9|40, 7|look like numbers"),
        ("signs.csv", "image,red,blue\np0.jpg,1,-1\np1.jpg,-1,1\n", "-1 would be classes|look like numbers"),
        ("words.json", '{"p0.jpg": "red"}', 'p0.jpg: expected a list of class names, found "red"'),
    ],
)
def test_what_names_no_class_is_said(name: str, text: str, message: str, photos: Path) -> None:
    (photos / name).write_text(text)
    assert re.search(message, message_of(photos, None, None, None))


def test_every_class_keeps_most_of_its_photos_to_train_on() -> None:
    labels = {f"{k}": np.array([True, k == 3, k < 5]) for k in range(50)}
    held_out = init._held_out(labels)
    assert len(held_out) == 10
    assert "3" not in held_out
    assert sum(id_ in {"0", "1", "2", "4"} for id_ in held_out) <= 1


def message_of(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        init.run(*arguments)
    return str(caught.value)


def lists(config: Config) -> list[list[str]]:
    """Return the ids of the photos to train on, and of those held out."""
    return [
        [sample.id for sample in load_samples(config.data, config.classes, path, labels=True, masks=False)]
        for path in (config.data.train_list, config.segment.eval_list)
    ]


@pytest.mark.parametrize("name", ["p.png.jpg", "dogs/x.TIF.jpg", "a b.jpg", "x.jpg y.png.jpg"])
def test_a_name_that_looks_like_a_path_is_found_again(name: str, photos: Path, monkeypatch) -> None:
    (photos / name).parent.mkdir(exist_ok=True)
    shutil.copy(photos / "p0.jpg", photos / name)
    (photos / "tags.csv").write_text(TAGS["tags.csv"] + f"{name},red\n")
    config, _ = started(photos, monkeypatch)
    assert any(name.removesuffix(".jpg") in ids for ids in lists(config))


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\u2028b.jpg", " a.jpg", "a\\b.jpg", os.fsdecode(b"caf\xe9.jpg")])
def test_a_name_that_a_list_cannot_hold_is_refused(name: str, photos: Path) -> None:
    shutil.copy(photos / "p0.jpg", photos / name)
    (photos / "tags.csv").write_text(TAGS["tags.csv"])
    assert f"{name!r}: a list holds UTF-8 names without" in message_of(photos, None, None, None)


def test_linked_folders_are_read_once(photos: Path, tmp_path: Path, monkeypatch) -> None:
    (photos / "more").rename(tmp_path / "elsewhere")
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    (photos / "round").symlink_to(photos)
    (photos / "tags.csv").write_text(TAGS["tags.csv"])
    _, said = started(photos, monkeypatch)
    assert "20 of 20 photos are tagged" in said


def test_given_again_it_leaves_its_config_and_never_another(photos: Path, monkeypatch) -> None:
    (photos / "tags.csv").write_text(TAGS["tags.csv"])
    config, _ = started(photos, monkeypatch)
    path = Path("my-photos-cpn/config.yaml")
    written = path.read_bytes()
    monkeypatch.setattr("cpn_fast.training.batch_size.try_steps", lambda *_: pytest.fail("measured again"))
    made = init.run(photos, None, None, None)
    assert "The config exists already and is kept" in made.remarks
    assert path.read_bytes() == written
    assert not any("lists" in remark for remark in made.remarks)

    before = [set(ids) for ids in lists(config)]
    for k in range(20, 30):
        shutil.copy(photos / "p0.jpg", photos / f"p{k}.jpg")
    (photos / "tags.csv").write_text(TAGS["tags.csv"] + "".join(f"p{k}.jpg,red\n" for k in range(20, 30)))
    made = init.run(photos, None, None, None)
    assert "30 of 30 photos are tagged: 26 to train on, 4 held out" in made.remarks
    assert "The lists are written anew. No photo changed sides: new ones are to train on" in made.remarks
    trained_on, held_out = (set(ids) for ids in lists(config))
    assert held_out == before[1]
    assert trained_on == before[0] | {f"p{k}" for k in range(20, 30)}

    path.write_text(path.read_text().replace("crop: 128", "crop: 96"))
    assert load(path) != config
    assert "exists already" in message_of(photos, None, None, None)


@pytest.mark.parametrize("name", ["train.txt", "held_out.txt", "tags.csv"])
def test_a_list_of_the_user_s_own_is_not_replaced(name: str, photos: Path, tmp_path: Path, monkeypatch) -> None:
    into_folders(photos, "cats", "dogs")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / name).write_text("mine\n")
    monkeypatch.setattr("cpn_fast.training.batch_size.try_steps", lambda *_: pytest.fail("measured before it refused"))
    message = message_of(photos, None, tmp_path / "w", None)
    assert f"{name}: exists already, without init's config.yaml beside it" in message
    assert "Name another folder with --out" in message
    assert {path.name for path in (tmp_path / "w").iterdir()} == {name}
    assert (tmp_path / "w" / name).read_text() == "mine\n"


@pytest.mark.parametrize("left", [["tags.csv"], ["tags.csv", "train.txt"], ["tags.csv", "train.txt", "held_out.txt"]])
def test_killed_before_its_config_it_goes_on(left: list[str], photos: Path, tmp_path: Path, monkeypatch) -> None:
    into_folders(photos, "cats", "dogs")
    started(photos, monkeypatch)
    out = tmp_path / "my-photos-cpn"
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in made.keys() - left:
        (out / name).unlink()
    init.run(photos, None, None, None)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made


def test_what_is_not_held_out_is_said(photos: Path, monkeypatch) -> None:
    few = "".join(f"p{k},{'red' if k < 4 else 'blue'}\n" for k in range(8))  # four of each
    (photos / "tags.csv").write_text(few)
    config, said = started(photos, monkeypatch)
    said = said.replace("\n", " ")
    assert "8 to train on, 0 held out" in said
    assert "No photo is held out" in said
    assert "held_out.txt lists the photos to train on" in said
    trained_on, shown = lists(config)
    assert sorted(trained_on) == sorted(shown)
    (photos / "tags.csv").write_text(few + "".join(f"p{k},\n" for k in range(8, 20)))  # negatives can be held out
    remarks = init.run(photos, None, photos.parent / "other", None).remarks
    assert "No held-out photo shows blue, red" in remarks
    assert not any("No photo is held out" in remark for remark in remarks)


def test_what_is_missing_is_said(photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in message_of(tmp_path / "nowhere", None, None, None)
    assert "no tags in it, and its photos are not in a folder for each class" in message_of(photos, None, None, None)
    (photos / "a.csv").write_text("x")
    (photos / "b.csv").write_text("x")
    assert "several files may have the tags (a.csv, b.csv): name one with --tags" in message_of(
        photos, None, None, None
    )
    assert "it tags none of the 20 photos" in message_of(photos, photos / "a.csv", None, None)
    (tmp_path / "empty").mkdir()
    assert "no photos in that folder" in message_of(tmp_path / "empty", None, None, None)
    assert not (tmp_path / "my-photos-cpn").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.yaml").touch()
    (photos / "tags.csv").write_text(TAGS["tags.csv"])
    assert "exists already" in message_of(photos, None, tmp_path / "out", None)


def test_the_step_that_sizes_the_run_is_measured(photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (photos / "tags.csv").write_text(TAGS["tags.csv"])
    (remark,) = (line for line in init.run(photos, None, None, None).remarks if line.startswith("A step of 8"))
    assert float(re.search(r"takes ([\d.e-]+) s", remark)[1]) > 0
