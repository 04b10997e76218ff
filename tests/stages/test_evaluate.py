from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from cpn_fast.config import Config, Data, Evaluate, Train
from cpn_fast.data import scores
from cpn_fast.data.dataset import Sample
from cpn_fast.data.masks import write_mask
from cpn_fast.data.scores import Evaluation, Scores, ThresholdSweep, confusion
from cpn_fast.data.seeds import Seed, read_seed, write_seed
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import evaluate
from cpn_fast.stages.evaluate import evaluate_cams, evaluate_masks, held_out_threshold
from cpn_fast.stages.evaluation_files import print_evaluation, write_evaluation

K = 4
CLASSES = ("cat", "dog", "cow", "bus")
GRID = np.arange(10) / 10


def many_passes(
    seeds: Sequence[Seed], truths: Sequence[np.ndarray], thresholds: np.ndarray, classes: int
) -> np.ndarray:
    """Predict as released: for each threshold, the argmax over a background plane and all class planes."""
    counts = np.zeros((len(thresholds), classes + 1, classes + 1), np.int64)
    for seed, truth in zip(seeds, truths, strict=True):
        planes = np.zeros((classes + 1, *truth.shape), np.float32)
        planes[seed.classes + 1] = seed.cam
        for count, threshold in zip(counts, thresholds, strict=True):
            planes[0] = threshold
            counted = truth != 255
            np.add.at(count, (truth[counted], planes.argmax(0)[counted]), 1)
    return counts


def swept(seeds: Sequence[Seed], truths: Sequence[np.ndarray], thresholds: np.ndarray, classes: int) -> np.ndarray:
    sweep = ThresholdSweep(thresholds, classes)
    for seed, truth in zip(seeds, truths, strict=True):
        sweep.add(seed, truth)
    return sweep.confusion()


SCORES = st.one_of(
    st.sampled_from([0, 0.1, 0.2, 0.3, 0.7, 1]),  # ties with thresholds and with each other
    st.sampled_from([np.nextafter(np.float32(k / 10), np.float32(side)) for k in (1, 3, 7) for side in (0, 1)]),
    st.floats(0, 1, width=32),
)


@st.composite
def scored_image(draw: st.DrawFn) -> tuple[Seed, np.ndarray]:
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    classes = sorted(draw(st.sets(st.integers(0, K - 1))))
    size = len(classes) * height * width
    cam = np.array(draw(st.lists(SCORES, min_size=size, max_size=size)), np.float32)
    values = st.sampled_from([*range(K + 1), 255])
    truth = draw(st.lists(values, min_size=height * width, max_size=height * width))
    seed = Seed(np.array(classes, np.int64), cam.reshape(len(classes), height, width))
    return seed, np.array(truth, np.uint8).reshape(height, width)


@settings(max_examples=300)
@given(
    st.lists(scored_image(), min_size=1, max_size=3),
    st.one_of(st.just(GRID), st.lists(SCORES, min_size=1, max_size=6).map(lambda t: np.unique(np.array(t, float)))),
)
@example([(Seed(np.zeros(0, np.int64), np.zeros((0, 1, 1), np.float32)), np.array([[255]], np.uint8))], GRID)
def test_one_pass_equals_many(images: list[tuple[Seed, np.ndarray]], thresholds: np.ndarray) -> None:
    seeds, truths = zip(*images, strict=True)
    counts = swept(seeds, truths, thresholds, K)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, many_passes(seeds, truths, thresholds, K))


def test_one_pass_equals_many_on_a_whole_image_of_20_classes() -> None:
    rng = np.random.default_rng(0)
    cam = rng.integers(0, 65536, (3, 75, 100)).astype(np.float32) / np.float32(65535)
    seed = Seed(np.array([0, 7, 19]), cam)
    truth = rng.choice(np.array([0, 1, 8, 14, 20, 255], np.uint8), (75, 100))
    thresholds = np.arange(100) / 100
    np.testing.assert_array_equal(swept([seed], [truth], thresholds, 20), many_passes([seed], [truth], thresholds, 20))


def test_254_classes_fit() -> None:
    seed = Seed(np.array([253]), np.full((1, 1, 2), 0.5, np.float32))
    counts = swept([seed], [np.array([[254, 255]], np.uint8)], np.array([0.2, 0.5]), 254)
    assert counts[0, 254, 254] == 1
    assert counts[1, 254, 0] == 1
    assert counts.sum() == 2


def test_the_sweep_agrees_with_a_seeds_own_mask() -> None:
    rng = np.random.default_rng(1)
    seed = Seed(np.array([1, 3]), rng.integers(0, 11, (2, 30, 30)).astype(np.float32) / np.float32(10))
    truth = rng.integers(0, K + 1, (30, 30)).astype(np.uint8)
    for count, threshold in zip(swept([seed], [truth], GRID, K), GRID, strict=True):
        np.testing.assert_array_equal(count, confusion(seed.mask(threshold), truth, K))


def test_counts_do_not_overflow_32_bits() -> None:
    sweep = ThresholdSweep(GRID, K)
    seed, truth = Seed(np.array([0]), np.ones((1, 1, 1), np.float32)), np.ones((1, 1), np.uint8)
    sweep._foreground += 2**40
    sweep._true += 2**45
    sweep.add(seed, truth)
    assert sweep.confusion()[9, 1, 1] == 2**40 + 1


def test_scores_by_hand() -> None:
    # Rows: true background, cat, dog, cow; dog is never predicted, cow occurs nowhere.
    scores = Scores(np.array([[6, 2, 0, 0], [1, 3, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_allclose(scores.iou, [6 / 9, 3 / 10, 0, np.nan])
    np.testing.assert_allclose(scores.precision, [6 / 7, 3 / 9, np.nan, np.nan])
    np.testing.assert_allclose(scores.recall, [6 / 8, 3 / 4, 0, np.nan])
    assert scores.mean_iou == pytest.approx((6 / 9 + 3 / 10) / 3)
    assert scores.background_iou == pytest.approx(6 / 9)
    assert scores.foreground_iou == pytest.approx(3 / 20)
    assert scores.mean_precision == pytest.approx((6 / 7 + 1 / 3) / 2)
    assert scores.mean_recall == pytest.approx(1.5 / 3)
    assert scores.accuracy == pytest.approx(9 / 16)
    assert scores.true.tolist() == [8, 4, 4, 0]
    assert scores.predicted.tolist() == [7, 9, 0, 0]


@given(st.integers(0, 2**32 - 1))
def test_scores_of_a_curve_are_those_of_its_points(seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 3, (5, 4, 4))
    curve = Scores(counts)
    for name in (*scores.SUMMARY, "iou", "precision", "recall"):
        points = [getattr(Scores(count), name) for count in counts]
        np.testing.assert_array_equal(getattr(curve, name), np.array(points))


def test_released_metric_agrees_when_every_class_occurs() -> None:
    counts = np.random.default_rng(0).integers(1, 100, (21, 21))
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    assert Scores(counts).mean_iou == pytest.approx(np.mean(hits / (true + predicted - hits + 1e-10)), abs=1e-9)


class World:
    """A folder with ground truth, seeds and masks of a few small images."""

    def __init__(self, root: Path, images: int = 6) -> None:
        self.root = root
        rng = np.random.default_rng(0)
        self.seeds, self.truths, self.samples = [], [], []
        for index in range(images):
            id_ = f"img{index}"
            present = np.sort(rng.choice(K, index % 3, replace=False)).astype(np.int64)
            truth = rng.choice(np.append(present + 1, [0, 255]), (12, 16)).astype(np.uint8)
            cam = rng.random((len(present), 12, 16), np.float32) * 0.6
            for plane, value in zip(cam, present + 1, strict=True):
                plane[truth == value] += 0.3
            write_seed(root / "seeds" / f"{id_}.npz", Seed(present, cam))
            self.seeds.append(read_seed(root / "seeds" / f"{id_}.npz"))
            write_mask(root / "SegmentationClass" / f"{id_}.png", truth)
            write_mask(root / "masks" / f"{id_}.png", self.seeds[-1].mask(0.5))
            (root / "JPEGImages").mkdir(exist_ok=True)
            Image.new("RGB", (16, 12)).save(root / "JPEGImages" / f"{id_}.jpg")
            self.truths.append(truth)
            self.samples.append(
                Sample(id_, root / "JPEGImages" / f"{id_}.jpg", root / "SegmentationClass" / f"{id_}.png", None)
            )

    def cams(
        self, config: Evaluate | None = None, *, samples: Sequence[Sample] | None = None, **more: Any
    ) -> Evaluation:
        chosen = self.samples if samples is None else samples
        return evaluate_cams(
            chosen, self.root / "seeds", config or Evaluate(), CLASSES, list_path="lists/val.txt", workers=2, **more
        )

    def masks(self) -> Evaluation:
        return evaluate_masks(self.samples, self.root / "masks", CLASSES, list_path="lists/val.txt", workers=2)

    def config(self, **evaluate_keys: Any) -> Config:
        data = Data(root=self.root, eval_list=self.list("val", range(len(self.samples))))
        return Config(
            name="run",
            out=self.root,
            classes=CLASSES,
            data=data,
            train=Train(steps=1),
            evaluate=Evaluate(**evaluate_keys),
        )

    def list(self, name: str, indices: range) -> Path:
        path = self.root / f"{name}.txt"
        path.write_text("".join(f"{self.samples[i].id}\n" for i in indices))
        return path


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_files_are_scored_as_many_passes_would(world: World) -> None:
    evaluation = world.cams(Evaluate(thresholds=20))
    assert evaluation.curve is not None
    expected = many_passes(world.seeds, world.truths, np.arange(20) / 20, K)
    np.testing.assert_array_equal(evaluation.curve.scores.confusion, expected)
    assert evaluation.ids == tuple(sample.id for sample in world.samples)


def test_the_oracle_is_the_best_point_of_the_curve_and_the_only_result_by_default(world: World) -> None:
    evaluation = world.cams()
    assert evaluation.curve is not None
    (oracle,) = evaluation.results
    best = np.nanargmax(evaluation.curve.scores.mean_iou)
    assert oracle.kind == "oracle"
    assert oracle.threshold == best / 100
    assert evaluation.oracle.mean_iou == np.nanmax(evaluation.curve.scores.mean_iou)
    with pytest.raises(LookupError, match=r"no held-out or fixed threshold among \['oracle'\]"):
        _ = evaluation.fixed


def test_thresholds_given_beforehand_come_first_and_need_not_be_on_the_grid(world: World) -> None:
    evaluation = world.cams(Evaluate(thresholds=10, threshold=0.333), held_out=0.457)
    assert [(result.kind, result.threshold) for result in evaluation.results[:2]] == [
        ("held-out", 0.457),
        ("fixed", 0.333),
    ]
    points = many_passes(world.seeds, world.truths, np.array([0.457, 0.333]), K)
    for result, expected in zip(evaluation.results, points, strict=False):
        np.testing.assert_array_equal(result.scores.confusion, expected)
    assert evaluation.fixed is evaluation.results[0].scores
    alone = world.cams(Evaluate(thresholds=10))
    assert evaluation.results[2].threshold == alone.results[0].threshold
    assert evaluation.curve is not None
    assert len(evaluation.curve.thresholds) == 10


def test_masks_are_scored_as_the_seeds_they_came_from(world: World) -> None:
    np.testing.assert_array_equal(
        world.masks().results[0].scores.confusion, world.cams(Evaluate(threshold=0.5)).fixed.confusion
    )
    assert world.masks().curve is None


def test_all_problems_are_reported_in_one_go(world: World) -> None:
    write_seed(world.root / "seeds/img1.npz", Seed(np.array([0]), np.zeros((1, 16, 12), np.float32)))
    write_seed(world.root / "seeds/img2.npz", Seed(np.array([K]), np.zeros((1, 12, 16), np.float32)))
    (world.root / "seeds/img3.npz").write_text("damaged")
    (world.root / "seeds/img4.npz").unlink()
    (world.root / "seeds/img5.npz").unlink()
    write_mask(world.root / "SegmentationClass/img0.png", np.full((12, 16), 7, np.uint8))
    with pytest.raises(UserError) as raised:
        world.cams()
    text = str(raised.value)
    for part in (
        "not all of 6 images",
        "2 files missing: img4.npz, img5.npz",
        "1 of another size than the ground truth: img1 (12x16, ground truth 16x12)",
        "1 seeds of more than 4 classes: img2.npz (5)",
        "1 files that cannot be read: ",
        "img3.npz: damaged",
        "1 ground truths with values other than 0 to 4 and 255: img0 (7)",
    ):
        assert part in text


def test_problems_of_masks_are_reported_in_one_go(world: World) -> None:
    write_mask(world.root / "masks/img0.png", np.full((12, 16), 255, np.uint8))
    write_mask(world.root / "masks/img1.png", np.zeros((3, 3), np.uint8))
    (world.root / "masks/img2.png").unlink()
    with pytest.raises(UserError) as raised:
        world.masks()
    text = str(raised.value)
    for part in ("1 masks with values above 4: img0.png (255)", "1 of another size", "1 files missing: img2.png"):
        assert part in text


def test_evaluation_json_holds_everything_without_nan(world: World) -> None:
    only_background = [world.samples[0], world.samples[3]]  # no class is present: foreground scores are 0 / 0
    for evaluation in (world.cams(Evaluate(threshold=0.4)), world.cams(samples=only_background), world.masks()):
        path = write_evaluation(world.root / "out", evaluation)
        tree = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert tree["list"] == "lists/val.txt"
        assert tree["images"] == len(evaluation.ids)
        assert tree["ids"] == list(evaluation.ids)
        assert tree["classes"] == ["background", *CLASSES]
        assert len(tree["results"]) == len(evaluation.results)
        for item, result in zip(tree["results"], evaluation.results, strict=True):
            assert item["kind"] == result.kind
            assert item["threshold"] == result.threshold
            assert item["confusion"] == result.scores.confusion.tolist()
            assert item["mean_iou"] == pytest.approx(float(result.scores.mean_iou))
            assert list(item["iou"]) == ["background", *CLASSES]
        if evaluation.curve is None:
            assert "curve" not in tree
        else:
            assert tree["curve"]["threshold"] == evaluation.curve.thresholds.tolist()
            np.testing.assert_allclose(tree["curve"]["mean_iou"], evaluation.curve.scores.mean_iou)
    scores = world.cams(samples=only_background)
    path = write_evaluation(world.root / "empty", scores)
    assert json.loads(path.read_text())["results"][0]["foreground_iou"] is None


def test_per_class_csv_has_a_line_for_each_result_and_class(world: World) -> None:
    evaluation = world.cams(Evaluate(threshold=0.4))
    write_evaluation(world.root / "out", evaluation)
    rows = list(csv.DictReader((world.root / "out/per_class.csv").open()))
    assert [(row["result"], row["class"]) for row in rows] == [
        (kind, name) for kind in ("fixed", "oracle") for name in ("background", *CLASSES)
    ]
    assert float(rows[0]["iou"]) == pytest.approx(float(evaluation.fixed.iou[0]))
    assert int(rows[0]["true_pixels"]) == evaluation.fixed.true[0]


def test_plots_are_pictures_and_masks_have_no_curve(world: World) -> None:
    write_evaluation(world.root / "cams", world.cams(Evaluate(threshold=0.4), held_out=0.2))
    write_evaluation(world.root / "labels", world.masks())
    for path in ("cams/curve.png", "cams/per_class.png", "labels/per_class.png"):
        with Image.open(world.root / path) as picture:
            assert min(picture.size) > 300
    assert sorted(path.name for path in (world.root / "labels").iterdir()) == [
        "evaluation.json",
        "per_class.csv",
        "per_class.png",
    ]


def printed(evaluation: Evaluation) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_evaluation(evaluation, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_oracle_is_called_one_and_stands_after_what_was_given(world: World) -> None:
    text = printed(world.cams(Evaluate(threshold=0.4), held_out=0.2))
    assert "oracle (chosen on this ground truth)" in text
    assert text.index("held out") < text.index("fixed beforehand") < text.index("oracle")
    assert "oracle" not in printed(world.masks())
    assert f"{100 * world.cams().oracle.mean_iou:.2f}" in text


def test_a_threshold_from_other_images_is_held_out_and_from_these_is_refused(world: World) -> None:
    path = write_evaluation(world.root / "train", world.cams(samples=world.samples[:3]))
    others = [sample.id for sample in world.samples[3:]]
    assert held_out_threshold(path, others) == world.cams(samples=world.samples[:3]).results[0].threshold
    with pytest.raises(UserError, match=r"chosen on 1 of the 4 images to be scored \(img2"):
        held_out_threshold(path, ["img2", *others])


def test_a_threshold_file_that_holds_none_is_refused(world: World) -> None:
    with pytest.raises(UserError, match=r"no such evaluation"):
        held_out_threshold(world.root / "missing.json", [])
    for content in (
        "not json",
        "[]",
        '{"results": []}',
        '{"results": [{"kind": "oracle", "threshold": null}], "ids": []}',
    ):
        (world.root / "a.json").write_text(content)
        with pytest.raises(UserError, match=r"a\.json: not an evaluation\.json"):
            held_out_threshold(world.root / "a.json", [])
    with pytest.raises(UserError, match=r"masks, so it has no threshold"):
        held_out_threshold(write_evaluation(world.root / "m", world.masks()), [])


def test_the_stage_writes_under_the_run_and_chains_lists(world: World) -> None:
    config = world.config()
    train = evaluate.run(
        config, cams=world.root / "seeds", masks=None, list_path=world.list("train", range(3)), threshold_from=None
    )
    assert train.path is not None
    assert train.path.parent.parent == world.root / "run/evaluation/train"
    assert re.fullmatch(
        rf"{world.root.name}-seeds-[0-9a-f]{{8}}", train.path.parent.name
    )  # the seeds are outside the run
    val = evaluate.run(
        config,
        cams=world.root / "seeds",
        masks=None,
        list_path=world.list("rest", range(3, 6)),
        threshold_from=train.path,
    )
    assert [result.kind for result in val.results] == ["held-out", "oracle"]
    assert val.results[0].threshold == train.results[0].threshold
    inside = world.root / "run/cams/val/masks"
    inside.parent.mkdir(parents=True)
    (world.root / "masks").rename(inside)
    masks = evaluate.run(config, cams=None, masks=inside, list_path=None, threshold_from=None)
    assert masks.path == world.root / "run/evaluation/val/cams-val-masks/evaluation.json"


def test_the_stage_says_what_it_needs(world: World) -> None:
    seeds, config = world.root / "seeds", world.config()
    for cams, masks in ((None, None), (seeds, seeds)):
        with pytest.raises(UserError, match=r"either --cams or --masks"):
            evaluate.run(config, cams=cams, masks=masks, list_path=None, threshold_from=None)
    with pytest.raises(UserError, match=r"masks have no threshold"):
        evaluate.run(config, cams=None, masks=seeds, list_path=None, threshold_from=seeds)
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        evaluate.run(config, cams=world.root / "nowhere", masks=None, list_path=None, threshold_from=None)
