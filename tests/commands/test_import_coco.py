from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rasteriser
from typer.testing import CliRunner

from cpn_fast import config
from cpn_fast.cli import app
from cpn_fast.commands import import_coco
from cpn_fast.data.dataset import check_files, load_samples
from cpn_fast.data.masks import IGNORE, read_mask
from cpn_fast.runtime.errors import UserError

SIZE = 64
CROWD = np.zeros((SIZE, SIZE), np.uint8)
CROWD[40:, :50] = 1


def runs(mask: np.ndarray) -> list[int]:
    """Return COCO's uncompressed run lengths."""
    flat = mask.T.ravel()
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]
    return ([0] if flat[0] else []) + [int(length) for length in np.diff(edges)]


def square(left: int, top: int, right: int, bottom: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """Write a folder of five images, and return a tree with the objects of four. Ids have gaps, as in COCO."""
    rng = np.random.default_rng(0)
    images = []
    for number, name in enumerate(["9.jpg", "a b.png", "sub/c.jpg", "d.jpg", "empty.jpg"], 10):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3)).astype(np.uint8)).save(path)
        images.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
    compressed = rasteriser.encode(np.asfortranarray(CROWD))["counts"].decode()
    outlines = [
        (10, 90, [square(8, 8, 56, 56)], 0),
        (10, 17, [square(20, 20, 30, 30), square(40, 40, 50, 50)], 0),  # one object in two parts, on the larger object
        (11, 17, {"size": [SIZE, SIZE], "counts": runs(CROWD)}, 1),
        (11, 17, [square(0, 44, 20, 60), [3, 3, 9, 9]], 0),  # its second part is a line
        (12, 1, {"size": [SIZE, SIZE], "counts": compressed}, 0),
        (13, 90, [square(-5, -5, 30, 80)], 0),  # beyond the border
    ]
    return {
        "info": {"year": 2014},
        "images": images,
        "annotations": [
            {
                "id": id_,
                "image_id": image,
                "category_id": category,
                "segmentation": outline,
                "iscrowd": crowd,
                "area": 1,
            }
            for id_, (image, category, outline, crowd) in enumerate(outlines, 100)
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 17, "name": "hot dog"}],
    }


@pytest.fixture
def source(tmp_path: Path, tree: dict[str, Any]) -> Path:
    path = tmp_path / "instances_part.json"
    path.write_text(json.dumps(tree))
    return path


def test_from_a_json_to_a_trained_network_and_its_scores(source: Path, tmp_path: Path) -> None:
    def cpn_fast(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    root = tmp_path / "data"
    said = cpn_fast("import-coco", source, tmp_path / "photos", root)
    assert "5 images of 3 classes" in said
    assert "1 of them show no object and are negatives" in said
    settings = yaml.safe_load(said[said.index("classes:") :])
    small = {"augment": {"long_side": [64, 64], "crop": 64}, "model": {"backbone": "narrow"}, "name": "coco"}
    train = {"batch": 2, "steps": 2, "log_every": 1, "data_threads": 1}
    path = tmp_path / "coco.yaml"
    path.write_text(yaml.safe_dump({**settings, **small, "out": str(tmp_path / "runs"), "train": train}))
    cpn_fast("train", path, "--set", "superpixels.count=20")
    cpn_fast("cam", path, "--checkpoint", tmp_path / "runs/coco/model.safetensors", "--set", "cam.scales=[1.0]")
    assert "mIoU" in cpn_fast("evaluate", path, "--cams", tmp_path / "runs/coco/cams/part/seeds")


def test_after_an_import_of_cocos_classes_the_next_command_names_a_config_that_exists(
    source: Path, tree: dict[str, Any], tmp_path: Path
) -> None:
    ids = [*range(1, 80), 90]
    categories = [{"id": id_, "name": name} for id_, name in zip(ids, import_coco.coco_classes(), strict=True)]
    source.write_text(json.dumps({**tree, "categories": categories}))
    arguments = ["import-coco", source, tmp_path / "photos", tmp_path / "data"]
    said = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).output
    named = re.search(r"Next: cpn-fast doctor (\S+) --set data.root=", said)
    assert named, said
    assert (Path(__file__).parents[2] / named[1]).is_file()


def test_masks_have_the_categories_in_their_order_small_objects_on_top_and_crowds_ignored(
    source: Path, tmp_path: Path
) -> None:
    import_coco.run(source, tmp_path / "photos", tmp_path / "data")
    masks = tmp_path / "data/SegmentationClass/part"
    expected = np.zeros((SIZE, SIZE), np.uint8)
    expected[8:56, 8:56] = 3
    expected[20:30, 20:30] = expected[40:50, 40:50] = 2
    assert np.array_equal(read_mask(masks / "9.png"), expected)
    expected = np.where(CROWD, IGNORE, 0).astype(np.uint8)
    expected[44:60, :20] = 2
    assert np.array_equal(read_mask(masks / "a b.png"), expected)
    assert np.array_equal(read_mask(masks / "c.png"), CROWD)
    assert np.array_equal(read_mask(masks / "d.png") == 3, np.arange(SIZE)[None].repeat(SIZE, 0) < 30)
    assert json.loads((tmp_path / "data/tags.json").read_text()) == {
        "9": ["hot dog", "toothbrush"],
        "a b": ["hot dog"],
        "c": ["person"],
        "d": ["toothbrush"],
        "empty": [],
    }


def test_images_are_linked_to_and_pass_every_check(source: Path, tmp_path: Path) -> None:
    made = import_coco.run(source, tmp_path / "photos", tmp_path / "data")
    data = config.Data(root=tmp_path / "data", labels=import_coco.TAGS)
    samples = load_samples(data, made.classes, made.list_path, labels=True, masks=True)
    check_files(samples, workers=1, classes=3)
    assert [sample.id for sample in samples] == ["part/9", "part/a b", "part/sub/c", "part/d", "part/empty"]
    assert not samples[4].label.any()
    assert samples[2].image.resolve() == tmp_path / "photos/sub/c.jpg"


def test_a_second_import_adds_a_list_and_a_repeated_one_keeps_its_masks(
    source: Path, tree: dict[str, Any], tmp_path: Path
) -> None:
    root = tmp_path / "data"
    import_coco.run(source, tmp_path / "photos", root)
    mask = root / "SegmentationClass/part/9.png"
    before = mask.stat().st_mtime_ns
    (root / "SegmentationClass/part/c.png").unlink()
    import_coco.run(source, tmp_path / "photos", root)
    assert mask.stat().st_mtime_ns == before
    assert (root / "SegmentationClass/part/c.png").exists()

    other = tmp_path / "instances_val.json"
    (tmp_path / "photos/late.jpg").write_bytes((tmp_path / "photos/empty.jpg").read_bytes())
    image = {"id": 1, "file_name": "late.jpg", "width": SIZE, "height": SIZE}
    object_ = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [square(0, 0, 9, 9)]}
    other.write_text(json.dumps({**tree, "images": [image], "annotations": [object_]}))
    import_coco.run(other, tmp_path / "photos", root)
    assert sorted(json.loads((root / "tags.json").read_text())) == ["9", "a b", "c", "d", "empty", "late"]
    assert (root / "ImageSets/Segmentation/part.txt").exists()

    other.write_text(json.dumps({**tree, "images": [{**image, "file_name": "9.jpg"}], "annotations": [object_]}))
    with pytest.raises(UserError, match=r"1 images have the name of an image of another list, but other tags \(9\)"):
        import_coco.run(other, tmp_path / "photos", root)
    categories = [{"id": 1, "name": "cat"}]
    other.write_text(json.dumps({"images": [image], "annotations": [object_], "categories": categories}))
    with pytest.raises(UserError, match=r"part was imported with 3 classes \(person, hot dog, toothbrush\)"):
        import_coco.run(other, tmp_path / "photos", root)
    (note,) = root.glob("*/part/made_by.json")
    note.write_text(note.read_text()[:9])
    with pytest.raises(UserError, match=r"made_by\.json: damaged: delete \S+part and import this list again"):
        import_coco.run(other, tmp_path / "photos", root)


def test_a_changed_json_makes_its_masks_anew(source: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    import_coco.run(source, tmp_path / "photos", tmp_path / "data")
    tree["annotations"][4]["category_id"] = 17
    source.write_text(json.dumps(tree))
    import_coco.run(source, tmp_path / "photos", tmp_path / "data")
    assert np.array_equal(read_mask(tmp_path / "data/SegmentationClass/part/c.png"), 2 * CROWD)


def broken(tree: dict[str, Any], kind: str) -> Any:
    """Return the tree with an error."""
    images, objects = tree["images"], tree["annotations"]
    match kind:
        case "missing image":
            images[0]["file_name"] = images[3]["file_name"] = "gone.jpg"
        case "unknown category":
            objects[0]["category_id"] = 91
        case "unknown image":
            objects[0]["image_id"] = 5
        case "outside":
            images[0]["file_name"] = "../photos/9.jpg"
        case "two endings":
            images[0]["file_name"] = "9.png.jpg"
        case "no name":
            images[0]["file_name"] = ""
        case "no list":
            return objects
        case "no width":
            del images[1]["width"]
        case "no objects":
            objects.clear()
        case "box":
            objects[0]["segmentation"] = []
        case "odd":
            objects[0]["segmentation"] = [[1, 2, 3, 4, 5, 6, 7]]
        case "far away":
            objects[0]["segmentation"] = [square(0, 0, 10**9, 9)]
        case "short runs":
            objects[2]["segmentation"]["counts"] = [1, 2, 3]
        case "bad text":
            objects[4]["segmentation"]["counts"] = "zzz"
        case "huge image":
            images[0].update(width=10**6, height=10**6)
        case "many categories":
            tree["categories"] += [{"id": id_, "name": f"class {id_}"} for id_ in range(100, 400)]
        case "no class names":
            tree["categories"] += [{"id": 100, "name": "Background"}, {"id": 101, "name": "fox "}]
    return tree


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing image", r"2 images missing in .*photos: gone\.jpg"),
        ("missing image", r"1 names of two images: gone"),
        ("unknown category", r"category that is not among categories: annotation 100 \(91\)"),
        ("unknown image", r"image that is not among images: annotation 100 \(5\)"),
        ("outside", r"1 images outside their folder: \.\./photos/9\.jpg"),
        ("two endings", r"1 images with names that a list cannot hold .*: 9\.png\.jpg"),
        ("no name", r"1 images with names that a list cannot hold"),
        ("no list", r"expected COCO's instances, with images, annotations and categories"),
        ("no width", r"images\.1\.width: Field required"),
        ("no objects", r"no object is annotated in its 5 images"),
        ("box", r"annotation 100 of 9\.jpg has no outline"),
        ("odd", r"annotation 100 of 9\.jpg: an outline has 7 numbers"),
        ("far away", r"annotation 100 of 9\.jpg: an outline goes far beyond the 64 x 64 pixels"),
        ("short runs", r"annotation 102 of a b\.png: its runs do not cover the 64 x 64 pixels"),
        ("bad text", r"annotation 104 of sub/c\.jpg: its runs do not cover"),
        ("huge image", r"1 images too large to be decoded: 9\.jpg"),
        ("many categories", r"303 categories, where 8-bit masks hold 254"),
        ("no class names", r"2 categories with names that no class may have .*: 'Background', 'fox '"),
    ],
)
def test_what_is_wrong_with_a_json_is_said(source: Path, tree: Any, tmp_path: Path, kind: str, message: str) -> None:
    source.write_text(json.dumps(broken(tree, kind)))
    with pytest.raises(UserError, match=message):
        import_coco.run(source, tmp_path / "photos", tmp_path / "data")
    assert not (tmp_path / "data/ImageSets").exists()


def test_what_is_wrong_with_files_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file\. There are: .*instances_part\.json"):
        import_coco.run(tmp_path / "instances_prat.json", tmp_path / "photos", tmp_path / "data")
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        import_coco.run(source, tmp_path / "nowhere", tmp_path / "data")
    masks = tmp_path / "data/SegmentationClass/part"
    masks.mkdir(parents=True)
    (masks / "mine.png").touch()
    with pytest.raises(UserError, match=r"exists, and cpn-fast import-coco did not make it"):
        import_coco.run(source, tmp_path / "photos", tmp_path / "data")
    (masks / "mine.png").rename(masks / ".made_by.json.cpn-fast.tmp")  # as after an import that was killed at its start
    assert import_coco.run(source, tmp_path / "photos", tmp_path / "data").images
    assert not (masks / ".made_by.json.cpn-fast.tmp").exists()
    (tmp_path / "other/JPEGImages/part").mkdir(parents=True)
    with pytest.raises(UserError, match=r"expected a link to"):
        import_coco.run(source, tmp_path / "photos", tmp_path / "other")


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_text_of_runs_is_read_as_pycocotools_writes_it(height: int, width: int, seed: int, share: float) -> None:
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    text = rasteriser.encode(np.asfortranarray(mask))["counts"].decode()
    image = import_coco.Image(id=1, file_name="x.jpg", height=height, width=width)
    outline = import_coco.Runs(size=(height, width), counts=text)
    object_ = import_coco.Object(id=1, image_id=1, category_id=7, segmentation=outline)
    assert np.array_equal(import_coco.mask_of(image, [object_], {7: 9}), 9 * mask)


@settings(max_examples=200)
@given(st.text(max_size=12), st.integers(1, 9), st.integers(1, 9))
def test_any_text_of_runs_is_a_mask_or_refused(text: str, height: int, width: int) -> None:
    image = import_coco.Image(id=1, file_name="x.jpg", height=height, width=width)
    object_ = import_coco.Object(
        id=1, image_id=1, category_id=7, segmentation=import_coco.Runs(size=(height, width), counts=text)
    )
    try:
        mask = import_coco.mask_of(image, [object_], {7: 9})
    except ValueError as error:
        assert "its runs do not cover" in str(error)  # noqa: PT017
    else:
        assert mask.shape == (height, width)


def test_the_config_has_cocos_classes() -> None:
    assert len(import_coco.coco_classes()) == 80
    assert import_coco.coco_classes()[:2] == ("person", "bicycle")
    assert import_coco.coco_classes()[-1] == "toothbrush"


def test_many_objects_of_a_large_image_are_drawn_one_at_a_time() -> None:
    side, count = 2000, 60
    image = import_coco.Image(id=1, file_name="x.jpg", height=side, width=side)
    objects = [
        import_coco.Object(
            id=k, image_id=1, category_id=1 + k % 2, segmentation=[square(0, 0, side - 9 * k, side - 9 * k)]
        )
        for k in range(count)
    ]
    tracemalloc.start()
    mask = import_coco.mask_of(image, objects, {1: 1, 2: 2})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 12 * side**2  # all masks at once would take 60
    assert mask[0, 0] == 2  # the smallest is on top


def test_an_outline_of_endless_length_is_refused_by_its_annotation() -> None:
    image = import_coco.Image(id=1, file_name="x.jpg", height=4000, width=4000)
    zigzag = [float(z) for k in range(3000) for z in (0, k, 3999, k)]
    object_ = import_coco.Object(id=7, image_id=1, category_id=1, segmentation=[zigzag])
    with pytest.raises(ValueError, match=r"annotation 7 of x\.jpg: an outline is 2\d,\d{3},\d{3} pixels long"):
        import_coco.mask_of(image, [object_], {1: 1})
