from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cpn_fast import config_file
from cpn_fast.commands import information
from cpn_fast.commands.information import THRESHOLDS, Counts, Row

maps = arrays(np.float32, (2, 3, 4), elements=st.floats(0, 1, width=32))
pixels = arrays(bool, (2, 3, 4))


@given(plain=maps, pair=maps, on_object=pixels, known=pixels)
def test_counts_are_those_of_one_comparison_per_threshold(plain, pair, on_object, known) -> None:
    counts = Counts.none()
    counts.add(plain, pair, on_object & known, known)
    for at, threshold in enumerate(THRESHOLDS.astype(np.float32)):
        for row, chosen in enumerate((known, on_object & known)):
            own, summed = plain[chosen] > threshold, pair[chosen] > threshold
            assert counts.plain[row, at] == own.sum()
            assert counts.pair[row, at] == summed.sum()
            assert counts.both[row, at] == (own & summed).sum()
    assert counts.pixels.tolist() == [known.sum(), (on_object & known).sum()]


def test_figures_of_a_row() -> None:
    counts = Counts.none()
    plain = np.array([[[0.9, 0.9, 0.0, 0.0]]], np.float32)
    pair = np.array([[[0.9, 0.0, 0.9, 0.9]]], np.float32)
    on_object = np.array([[[True, False, True, False]]])
    counts.add(plain, pair, on_object, np.ones_like(on_object))
    assert Row("grid", 56, counts).figures(0.3) == {
        "plain": 0.5,
        "pair": 0.75,
        "more": 0.5,
        "added": 0.5,
        "lost": 0.25,
        "plain on object": 0.5,
        "added on object": 0.5,
        "lost on object": 0.0,
        "object found, plain": 0.5,
        "object found, pair": 1.0,
    }


@pytest.fixture
def few_sizes(monkeypatch) -> None:
    monkeypatch.setattr(information, "SUPERPIXELS", (1, 50))
    monkeypatch.setattr(information, "GRIDS", (16,))


def measured(run: Path, small_voc: Path, **changes: object) -> list[dict]:
    settings = config_file.load(run / "config.yaml")
    settings = settings.model_copy(update={"data": settings.data.model_copy(update=changes)})
    picture = information.run(settings, run / "model.safetensors", Path("ImageSets/Segmentation/val.txt"))
    assert picture.stat().st_size > 10_000
    return json.loads(picture.with_suffix(".json").read_text())["rows"]


def test_each_size_is_measured_and_drawn(small_run, small_voc, few_sizes, capsys) -> None:
    one, many, grid = measured(small_run, small_voc)
    assert [(row["kind"], row["size"]) for row in (one, many, grid)] == [
        ("superpixel", 1),
        ("superpixel", 50),
        ("grid", 16),
    ]
    # The map of the image does not depend on patches; the sum does.
    assert one["counts"]["plain"] == many["counts"]["plain"] == grid["counts"]["plain"]
    assert many["counts"]["pair"] != grid["counts"]["pair"]
    assert 0 < many["object found, pair"] <= 1
    said = capsys.readouterr().out
    assert "50 superpixels" in said
    assert "grid of 16 px" in said
    assert measured(small_run, small_voc)[1] == many  # the same patches again


def test_without_masks_nothing_is_said_of_objects(small_run, small_voc, few_sizes) -> None:
    rows = measured(small_run, small_voc, masks=Path("nowhere"))
    assert all(row["added on object"] is None and row["pair"] > 0 for row in rows)
