from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpn_fast.config import Data
from cpn_fast.data import dataset
from cpn_fast.data.dataset import DatasetError, Sample, check_files, load_checked, load_samples
from cpn_fast.data.masks import write_mask

CLASSES = ("cat", "dog")
LIST = Path("list.txt")


@pytest.fixture
def data(tmp_path) -> Data:
    """Images and masks a, b and c of 20 x 10 pixels, tagged cat, dog and both."""
    (tmp_path / "JPEGImages").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 3), np.uint8)
    for id_, value in (("a", 1), ("b", 2), ("c", 255)):
        Image.fromarray(pixels).save(tmp_path / f"JPEGImages/{id_}.jpg")
        write_mask(tmp_path / f"SegmentationClass/{id_}.png", np.full((10, 20), value, np.uint8))
    (tmp_path / "labels.csv").write_text("a,cat\nb,dog\nc,cat;dog\n")
    (tmp_path / LIST).write_text("a\nb\nc\n")
    return Data(root=tmp_path, labels=Path("labels.csv"))


def load(
    data: Data, text: str | bytes | None = None, *, labels: bool = False, masks: bool | None = False
) -> list[Sample]:
    if text is not None:
        (data.root / LIST).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_samples(data, CLASSES, LIST, labels=labels, masks=masks)


def refused(data: Data, text: str | None = None, *, labels: bool = False, masks: bool = False) -> str:
    with pytest.raises(DatasetError) as caught:
        load(data, text, labels=labels, masks=masks)
    return str(caught.value)


# Lists


def test_samples_come_in_the_order_of_the_list_with_files_and_labels(data):
    samples = load(data, "c\na\n", labels=True, masks=True)
    assert samples == [
        Sample(id_, data.root / f"JPEGImages/{id_}.jpg", data.root / f"SegmentationClass/{id_}.png", None)
        for id_ in "ca"
    ]
    assert [sample.label.tolist() for sample in samples] == [[True, True], [True, False]]
    assert not samples[0].label.flags.writeable


def test_masks_that_are_there_can_be_taken_without_missing_the_others(data):
    (data.root / "SegmentationClass/b.png").unlink()
    assert [sample.mask is None for sample in load(data, masks=None)] == [False, True, False]


def test_what_is_not_asked_for_is_neither_needed_nor_given(data):
    (data.root / "labels.csv").unlink()
    (data.root / "SegmentationClass/a.png").unlink()
    assert load(data, "a")[0] == Sample("a", data.root / "JPEGImages/a.jpg", None, None)


@pytest.mark.parametrize(
    "text",
    [
        "a\nb\n",
        b"\xef\xbb\xbfa\r\n\r\nb\r\n\r\n",
        "  a  \n\n\tb",
        "/JPEGImages/a.jpg /SegmentationClass/a.png\nJPEGImages/b.jpg\tSegmentationClass/b.png\n",
        "/JPEGImages/a.jpg\n/JPEGImages/b.jpg\n",
        "a.jpg\nb.jpg\n",
        "a\n/JPEGImages/b.jpg /SegmentationClass/b.png\n",
    ],
)
def test_forms_of_a_list(data, text):
    assert load(data, text, masks=True) == load(data, "a\nb\n", masks=True)


def test_paths_of_a_list_replace_the_configured_folders(data):
    (data.root / "JPEGImages").rename(data.root / "photos")
    (data.root / "SegmentationClass").rename(data.root / "SegmentationClassAug")
    (sample,) = load(data, "/photos/a.jpg /SegmentationClassAug/b.png\n", labels=True, masks=True)
    assert sample == Sample("a", data.root / "photos/a.jpg", data.root / "SegmentationClassAug/b.png", None)
    assert sample.label.tolist() == [True, False]


@pytest.mark.parametrize("id_", ["x", "2007_000032", "x" * 200, "an image (1)", "v1.2", "größe", "-1"])
def test_ids_of_any_length_and_kind(data, id_):
    (data.root / "JPEGImages/a.jpg").rename(data.root / f"JPEGImages/{id_}.jpg")
    (data.root / "labels.csv").write_text(f"{id_},dog\n", encoding="utf-8")
    (sample,) = load(data, f"{id_}\n", labels=True)
    assert sample.id == id_
    assert sample.label.tolist() == [False, True]


@pytest.mark.parametrize(
    "line",
    [
        "../a",
        "..",
        "C:\\photos\\a.jpg",
        "../JPEGImages/a.jpg",
        "/JPEGImages/../../a.jpg /SegmentationClass/a.png",
        "/JPEGImages/a.jpg /../SegmentationClass/a.png",
    ],
)
def test_lines_that_leave_the_root_are_refused(data, line):
    message = refused(data, f"b\n{line}\n")
    assert "1 lines that are neither an id nor paths inside data.root: line 2" in message
    assert repr(line) in message


@pytest.mark.parametrize("suffix", [".jpeg", ".JPG", ".Jpg", ".jfif", ".png", ".PNG", ".webp", ".TIF"])
def test_other_suffixes_of_images(data, suffix):
    (data.root / "JPEGImages/a.jpg").rename(data.root / f"JPEGImages/a{suffix}")
    assert [sample.image.name for sample in load(data, "a\nb\n")] == [f"a{suffix}", "b.jpg"]


def test_ids_may_hold_folders(data):
    for folder, name in (("dogs", "0"), ("cats", "0")):
        for parent, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
            (data.root / parent / folder).mkdir()
            shutil.copy(data.root / parent / f"a.{ending}", data.root / parent / folder / f"{name}.{ending}")
    (data.root / "labels.csv").write_text("JPEGImages/dogs/0.jpg,dog\ncats\\0.jpg,cat\na.jpg,cat;dog\n")
    for lines in ("dogs/0\ncats/0\na\n", "JPEGImages/dogs/0.jpg\nJPEGImages\\cats\\0.jpg\na.jpg\n"):
        samples = load(data, lines, labels=True, masks=True)
        assert [sample.id for sample in samples] == ["dogs/0", "cats/0", "a"]
        assert [sample.label.tolist() for sample in samples] == [[False, True], [True, False], [True, True]]
        assert [sample.image.relative_to(data.root / "JPEGImages") for sample in samples] == [
            Path("dogs/0.jpg"),
            Path("cats/0.jpg"),
            Path("a.jpg"),
        ]
        assert samples[0].mask == data.root / "SegmentationClass/dogs/0.png"


def test_a_name_alone_finds_the_label_of_an_image_in_a_folder_if_it_is_the_only_one(data):
    (data.root / "JPEGImages/dogs").mkdir()
    (data.root / "JPEGImages/a.jpg").rename(data.root / "JPEGImages/dogs/a.jpg")
    (data.root / "labels.csv").write_text("a,dog\n")
    (sample,) = load(data, "dogs/a\n", labels=True)
    assert sample.label.tolist() == [False, True]


def test_absolute_paths_inside_the_root_are_read_and_others_refused(data, tmp_path_factory):
    (sample,) = load(data, f"{data.root.absolute()}/JPEGImages/a.jpg\n")
    assert sample.id == "a"
    outside = tmp_path_factory.mktemp("elsewhere") / "a.jpg"
    shutil.copy(data.root / "JPEGImages/a.jpg", outside)
    assert "neither an id nor paths inside data.root: line 1" in refused(data, f"{outside}\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tags.csv", "a,cat\nb,dog\nb,cat\n"),
        ("tags.csv", "image,tags\na.jpg,cat\nb.jpg,\n"),
        ("tags.csv", "image;cat;dog\nJPEGImages/a.jpg;1;0\nJPEGImages/b.jpg;0;1\n"),
        ("tags.json", '{"a": ["cat"], "b": []}'),
    ],
)
def test_a_source_of_labels_is_a_list_of_its_images(data, name, content):
    (data.root / name).write_text(content)
    data = data.model_copy(update={"labels": Path(name)})
    samples = load_samples(data, CLASSES, Path(name), labels=True, masks=False)
    assert [sample.id for sample in samples] == ["a", "b"]
    assert samples[0].label.tolist() == [True, False]


def test_images_without_a_class_are_negatives_but_not_all_of_them(data):
    (data.root / "labels.csv").write_text("a,cat\nb,\nc\n")
    assert [sample.label.any() for sample in load(data, "a\nb\nc\n", labels=True)] == [True, False, False]
    (data.root / "labels.csv").write_text("a,\nb,\n")
    assert "no image shows any of the 2 classes" in refused(data, "a\nb\n", labels=True)


@pytest.mark.parametrize("form", ["WEBP", "TIFF"])
def test_webp_and_tiff_are_decoded(data, form):
    content = encoded(noise("RGB", 30, 20), form)
    (data.root / "JPEGImages/a.jpg").write_bytes(content)
    (data.root / "SegmentationClass/a.png").write_bytes(encoded(Image.new("L", (30, 20)), "PNG"))
    check_files(load(data, "a\n"), workers=1, classes=2)


def test_tiff_of_32_bits_is_refused_by_name(data):
    (data.root / "JPEGImages/a.jpg").write_bytes(encoded(Image.new("F", (30, 20)), "TIFF"))
    assert "a.jpg (32 bits a pixel and channel; save it with 8 or 16)" in check_refused(data)


def test_two_images_of_one_id_are_ambiguous(data):
    (data.root / "JPEGImages/a.png").touch()
    assert "1 ids with more than one image: a (a.jpg, a.png)" in refused(data)


def test_a_missing_list_names_those_that_are_there(data):
    (data.root / "other.txt").touch()
    with pytest.raises(DatasetError, match=r"train_aug.txt: no such list. Lists in .*: list.txt, other.txt"):
        load_samples(data, CLASSES, Path("train_aug.txt"), labels=False, masks=False)
    (data.root / "ImageSets/Segmentation").mkdir(parents=True)
    (data.root / "ImageSets/Segmentation/val.txt").touch()
    with pytest.raises(DatasetError, match=r"no such list. Did you mean ImageSets/Segmentation/val\.txt\?"):
        load_samples(data, CLASSES, Path("val"), labels=False, masks=False)


def test_a_missing_root_and_an_unreadable_or_empty_list_are_refused(data, tmp_path):
    with pytest.raises(DatasetError, match=r"data.root: .*nowhere is not a folder"):
        load_samples(Data(root=tmp_path / "nowhere"), CLASSES, LIST, labels=False, masks=False)
    (data.root / LIST).write_bytes(b"\xff\xfe\x00")
    assert "not readable as a list" in refused(data)
    assert "list without any id" in refused(data, "\n \n")


def test_every_problem_is_reported_at_once_with_counts_and_first_names(data):
    (data.root / "labels.csv").write_text("a,cat\nc,\n")
    (data.root / "SegmentationClass/c.png").unlink()
    missing = [f"m{k}" for k in range(7)]
    message = refused(data, "\n".join(["a", "b", "a", "c", "../x", *missing]), labels=True, masks=True)
    assert message.splitlines() == [
        f"{data.root / LIST} lists 10 images; found",
        "  1 ids listed more than once: line 3 a",
        f"  8 masks missing in {data.root}/SegmentationClass: c.png, m0.png, m1.png, m2.png, m3.png ...",
        "  1 lines that are neither an id nor paths inside data.root: line 5 '../x'",
        f"  7 images missing in {data.root}/JPEGImages: m0.jpg, m1.jpg, m2.jpg, m3.jpg, m4.jpg ...",
        f"  8 ids without labels in {data.root}/labels.csv: b, m0, m1, m2, m3 ...",
    ]


def test_problems_of_the_label_source_stand_beside_the_others(data):
    (data.root / "labels.csv").write_text("a,cta\nb,dog\n")
    message = refused(data, "a\nb\nm\n", labels=True)
    assert "line 1: 'cta' is not a class; did you mean cat?" in message
    assert "1 images missing" in message


# Contents


def check(data: Data, **options) -> None:
    check_files(load(data, masks=True), **{"classes": len(CLASSES), "workers": 2, **options})


def check_refused(data: Data, **options) -> str:
    with pytest.raises(DatasetError) as caught:
        check(data, **options)
    return str(caught.value)


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_sound_files_pass(data):
    check(data)


def noise(mode: str, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, len(mode)), np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


@pytest.mark.parametrize("form", ["JPEG", "PNG", "gray", "CMYK", "progressive", "one pixel", "EXIF-rotated"])
def test_images_of_every_supported_kind_pass(data, form):
    width, height = {"one pixel": (1, 1), "EXIF-rotated": (10, 20)}.get(form, (20, 10))
    mode = {"gray": "L", "CMYK": "CMYK"}.get(form, "RGB")
    exif = Image.Exif()
    if form == "EXIF-rotated":
        exif[0x0112] = 6
    raw = encoded(
        noise(mode, width, height), "PNG" if form == "PNG" else "JPEG", exif=exif, progressive=form == "progressive"
    )
    (data.root / "JPEGImages/a.jpg").write_bytes(raw)
    if form == "one pixel":
        write_mask(data.root / "SegmentationClass/a.png", np.zeros((1, 1), np.uint8))
    check(data)


@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated", "truncated progressive", "truncated PNG", "GIF", "gone"]
)
def test_images_that_cannot_be_decoded_are_named(data, kind):
    picture = noise("RGB", 200, 100)
    (data.root / "JPEGImages/b.jpg").write_bytes(
        {
            "empty": b"",
            "text": b"<html>404</html>",
            "truncated": encoded(picture)[:-2000],
            "truncated progressive": encoded(picture, progressive=True)[:-2000],
            "truncated PNG": encoded(picture, "PNG")[:-2000],
            "GIF": encoded(picture, "GIF"),
            "gone": b"",
        }[kind]
    )
    samples = load(data, masks=True)
    if kind == "gone":
        (data.root / "JPEGImages/b.jpg").unlink()
    with pytest.raises(DatasetError) as caught:
        check_files(samples, workers=2, classes=len(CLASSES))
    reason = {
        "empty": "empty file",
        "text": "none of JPEG, PNG, WEBP, TIFF",
        "GIF": "none of JPEG, PNG, WEBP, TIFF",
    }.get(kind, "")
    message = str(caught.value)
    assert "3 images checked; found\n  1 images that cannot be decoded: " in message
    assert f"{data.root / 'JPEGImages/b.jpg'} ({reason}" in message


def test_every_bad_file_is_reported_at_once(data):
    (data.root / "JPEGImages/a.jpg").write_bytes(b"")
    (data.root / "SegmentationClass/b.png").write_bytes(b"x")
    write_mask(data.root / "SegmentationClass/c.png", np.full((20, 10), 3, np.uint8))
    message = check_refused(data)
    assert "1 images that cannot be decoded: " in message
    assert "1 masks that cannot be used: " in message
    size = f"{data.root / 'SegmentationClass/c.png'} (10x20, image 20x10)"
    assert f"1 masks of another size than their image: {size}" in message
    assert f"1 masks with values other than 0 to 2 and 255: {data.root / 'SegmentationClass/c.png'} (3)" in message


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_mask_must_fit_its_image_as_exif_turns_it(data, form):
    exif = Image.Exif()
    exif[0x0112] = 8
    (data.root / "JPEGImages/a.jpg").write_bytes(encoded(noise("RGB", 20, 10), form, exif=exif))
    assert "a.png (20x10, image 10x20)" in check_refused(data)


def test_mask_values_are_those_of_the_classes(data):
    write_mask(data.root / "SegmentationClass/a.png", np.arange(200, dtype=np.uint8).reshape(10, 20) % 4)
    check(data, classes=3)
    assert "0 to 2 and 255" in check_refused(data, classes=2)


def test_what_passed_is_not_decoded_again_until_it_changes(data, monkeypatch):
    verified = data.root / "run/verified.json"
    decoded = []
    actual = dataset._check
    monkeypatch.setattr(dataset, "_check", lambda sample, classes: decoded.append(sample.id) or actual(sample, classes))

    def again(**options) -> list[str]:
        decoded.clear()
        check(data, verified=verified, **options)
        return sorted(decoded)

    assert again() == ["a", "b", "c"]
    assert again() == []
    os.utime(data.root / "JPEGImages/a.jpg", (1, 1))
    assert again() == ["a"]
    write_mask(data.root / "SegmentationClass/b.png", np.full((10, 20), 1, np.uint8))
    assert again() == ["b"]
    assert again(classes=3) == ["a", "b", "c"]
    verified.write_text("{")
    assert again() == ["a", "b", "c"]
    assert again() == []
    assert not [path for path in verified.parent.iterdir() if path != verified]


def test_what_failed_is_not_remembered_but_what_passed_beside_it_is(data):
    verified = data.root / "verified.json"
    whole = (data.root / "JPEGImages/b.jpg").read_bytes()
    (data.root / "JPEGImages/b.jpg").write_bytes(b"")
    for _ in range(2):
        assert "1 images that cannot be decoded" in check_refused(data, verified=verified)
        assert len(json.loads(verified.read_text())) == 2
    (data.root / "JPEGImages/b.jpg").write_bytes(whole)
    check(data, verified=verified)
    assert len(json.loads(verified.read_text())) == 3


def test_an_interrupted_check_keeps_what_passed(data, monkeypatch):
    verified = data.root / "verified.json"
    actual = dataset._check

    def interrupted(sample, classes):
        if sample.id == "c":
            raise KeyboardInterrupt
        return actual(sample, classes)

    monkeypatch.setattr(dataset, "_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(data, verified=verified, workers=1)
    assert len(json.loads(verified.read_text())) == 2


def test_what_the_index_and_what_the_files_have_wrong_is_said_in_one_go(data):
    (data.root / "labels.csv").write_text("a,dgo\n")  # b has no label
    (data.root / "JPEGImages/b.jpg").write_bytes(b"no JPEG")
    (data.root / "list.txt").write_text("a\nb\nb\nmissing\n")
    with pytest.raises(DatasetError) as error:
        load_checked(data, ("cat", "dog"), Path("list.txt"), workers=1)
    for expected in (
        "1 ids listed more than once: line 3 b",
        "1 images missing in",
        "'dgo' is not a class; did you mean dog?",
        "2 ids without labels in",
        "1 images that cannot be decoded",
    ):
        assert expected in str(error.value)
    assert "missing.jpg" in str(error.value)
    assert str(error.value).count("missing.jpg") == 1  # as missing, but not as undecodable
