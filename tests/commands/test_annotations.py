"""Masks in the formats of annotation tools have the same pixels."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpn_fast.commands.annotations import FORMS, outlines, writer
from cpn_fast.runtime.errors import UserError

CLASSES = ("dog", 'a "b" <c> & \x1b', "cat")


def blobs(height: int, width: int, seed: int) -> np.ndarray:
    """Return uint8 (H, W) with smooth regions of the values 0 to 3."""
    noise = np.random.default_rng(seed).random((height // 8 + 2, width // 8 + 2), np.float32)
    return (4 * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 0.99)).astype(np.uint8)


def written(form: str, mask: np.ndarray, folder: Path) -> str:
    own = writer(form, CLASSES)
    own.add("photos/a.jpg", np.zeros((4, 5), np.uint8), {})
    own.add("photos/b \x07.jpg", mask, {1: 0.5, 2: 0.25, 3: 1.0})
    return own.write(folder).read_text()


@settings(max_examples=10)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 1000))
def test_coco_s_runs_are_the_mask(tmp_path_factory: pytest.TempPathFactory, height: int, width: int, seed: int) -> None:
    rle = pytest.importorskip("pycocotools.mask")
    mask = blobs(height, width, seed)
    tree = json.loads(written("coco", mask, tmp_path_factory.mktemp("coco")))
    assert [(image["height"], image["width"]) for image in tree["images"]] == [(4, 5), (height, width)]
    found = np.zeros_like(mask)
    for annotation in tree["annotations"]:
        assert annotation["image_id"] == 2
        pixels = rle.decode(annotation["segmentation"]).astype(bool)
        assert annotation["area"] == pixels.sum()
        found[pixels] = annotation["category_id"]
    assert np.array_equal(found, mask)
    assert [category["name"] for category in tree["categories"]] == list(CLASSES)


def test_coco_s_files_are_loaded_by_its_own_reader(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    for form in ("coco", "coco-polygons"):
        written(form, blobs(40, 60, 1), tmp_path)
        read = coco.COCO(str(tmp_path / f"{form}.json"))
        assert {annotation["score"] for annotation in read.loadAnns(read.getAnnIds())} == {0.5, 0.25, 1.0}


@pytest.mark.parametrize("seed", range(4))
def test_polygons_cover_the_mask_but_for_holes(tmp_path: Path, seed: int) -> None:
    rle = pytest.importorskip("pycocotools.mask")
    mask = blobs(90, 120, seed)
    tree = json.loads(written("coco-polygons", mask, tmp_path))
    tasks = json.loads(written("label-studio", mask, tmp_path))
    for annotation in tree["annotations"]:
        value = annotation["category_id"]
        filled = np.zeros(mask.shape, np.uint8)  # without holes
        regions, _ = cv2.findContours((mask == value).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(filled, regions, -1, 1, cv2.FILLED)
        polygons = [polygon for polygon in annotation["segmentation"] if len(polygon) >= 6]
        drawn = rle.decode(rle.merge(rle.frPyObjects(polygons, *mask.shape))).astype(bool)
        assert (drawn & (filled > 0)).sum() > 0.97 * (drawn | (filled > 0)).sum()
        studio = np.zeros(mask.shape, np.uint8)
        for region in tasks[1]["predictions"][0]["result"]:
            if region["value"]["polygonlabels"] == [CLASSES[value - 1]]:
                points = np.array(region["value"]["points"]) / 100 * mask.shape[::-1]
                cv2.fillPoly(studio, [np.floor(points).astype(np.int32)], 1)
        assert (studio.astype(bool) & (filled > 0)).sum() > 0.95 * (studio.astype(bool) | (filled > 0)).sum()


def test_one_pixel_has_an_outline() -> None:
    (outline,) = outlines(np.eye(1, dtype=bool))
    assert outline.min() == 0.25
    assert outline.max() == 0.75
    assert len(outline) == 4


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_cvat_s_runs_are_the_mask(tmp_path_factory: pytest.TempPathFactory, height: int, width: int, seed: int) -> None:
    mask = blobs(height, width, seed)
    tree = ElementTree.fromstring(written("cvat", mask, tmp_path_factory.mktemp("cvat")))
    first, second = tree.findall("image")
    assert (first.get("width"), first.get("height")) == ("5", "4")
    names = {name.replace("\x1b", "\ufffd"): value for value, name in enumerate(CLASSES, 1)}
    found = np.zeros_like(mask)
    for element in second.findall("mask"):
        left, top, wide, high = (int(element.get(key, "")) for key in ("left", "top", "width", "height"))
        runs = [int(run) for run in element.get("rle", "").split(", ")]
        box = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(high, wide)
        found[top : top + high, left : left + wide][box] = names[element.get("label", "")]
    assert np.array_equal(found, mask)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(UserError, match=f"expected one of {', '.join(FORMS)}"):
        writer("yolo", CLASSES)
