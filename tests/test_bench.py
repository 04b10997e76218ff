"""The code of the benches: these tests check their comparisons, not the speed."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cpn_fast.commands.demo_data import DEMO_CLASSES
from cpn_fast.config_file import load
from cpn_fast.data.masks import read_mask, write_mask
from cpn_fast.data.seeds import Seed
from cpn_fast.models.mobilenet_v2 import MobileNetV2

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(autouse=True)
def _bench_on_the_path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.parametrize(
    ("script", "word", "why"),
    [
        ("print('x')", "done", ""),
        ("import nowhere_to_be_found", "skipped", "needs nowhere_to_be_found, which is not installed"),
        ("import cpn_fast.nowhere", "failed", "cpn_fast.nowhere"),
        ("raise SystemExit('seeds differ')", "failed", "seeds differ"),
    ],
)
def test_a_bench_is_done_skipped_or_failed(script: str, word: str, why: str, tmp_path: Path) -> None:
    import run_all

    path = tmp_path / "script.py"
    path.write_text(script)
    outcome = run_all.run(path, [], 60)
    assert outcome.word == word
    assert why in outcome.why


def test_a_bench_that_is_stopped_leaves_the_rows_it_has(tmp_path: Path) -> None:
    import run_all

    script, rows = tmp_path / "script.py", tmp_path / "x.json"
    script.write_text("import sys, time; open(sys.argv[1], 'w').write('[1]'); time.sleep(600)")
    outcome = run_all.run(script, [str(rows)], 3)
    assert (outcome.word, outcome.why) == ("out of time", "stopped after 3 s")
    assert rows.read_text() == "[1]"


def test_benches_run_in_order_each_within_its_limit_and_all_within_theirs(monkeypatch, capsys) -> None:
    import run_all

    clock = mock.Mock(return_value=0.0)
    needed = {"a": 10.0, "b": 500.0, "c": 20.0, "d": 90.0, "e": 5.0}
    given: list[tuple[str, float]] = []

    def run(script: Path, arguments: list[str], limit: float) -> run_all.Outcome:
        given.append((script.stem, limit))
        took = min(needed[script.stem], limit)
        clock.return_value += took
        return run_all.Outcome("done" if took < limit else "out of time", "", took)

    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(run_all, "run", run)
    limits = {"a": 30.0, "b": 60.0, "c": 50.0, "d": 100.0, "e": 10.0}
    outcomes = run_all.run_in_turn({name: Path(f"{name}.py") for name in needed}, [], limits, 150)
    assert given == [("a", 30.0), ("b", 60.0), ("c", 50.0), ("d", 60.0)]  # 60 s are left for d's 100 s, and none for e
    assert [outcome.word for outcome in outcomes] == ["done", "out of time", "done", "out of time", "not started"]
    assert "e: not started no time was left" in capsys.readouterr().out


def test_ten_minutes_hold_the_benches_that_a_gpu_is_for() -> None:
    import run_all

    names = list(run_all.BENCHES)
    first = names[: 1 + names.index("schedule")]
    assert first == [
        *("train_step", "affinity_kernel", "data_pipeline", "cam_inference"),
        *("loss_kernel", "region_kernel", "schedule"),
    ]
    assert sum(run_all.BENCHES[name].limit for name in first) <= 600
    assert all((BENCH / f"{name}.py").is_file() for name in names)


def test_the_gpu_tests_come_from_every_folder() -> None:
    import gpu_tests

    folders = {Path(file).parent.name for file in gpu_tests.modules()}
    assert {"kernels", "pipelines", "stages", "training"} <= folders


def test_ours_is_compared_with_the_fastest_peer() -> None:
    import run_all

    def row(backend: str, ms: float, size: str = "a") -> dict:
        return {"size": size, "pass": "forward", "backend": backend, "call ms": ms}

    rows = [row("eager", 9), row("compiled eager", 6), row("tiled", 3), row("triton", 2), row("eager", 8, "b")]
    ((what, column, own, peer, ratio),) = run_all.compared("affinity_kernel", {"rows": rows})  # "b" has no row of ours
    assert (what, column, own["backend"], peer["backend"], ratio) == (
        "a, forward",
        "call ms",
        "triton",
        "compiled eager",
        3,
    )
    ways = ("as released", "ours, one image a batch", "ours, batches of 4")
    seeds = [{"way": way, "images/s": rate} for way, rate in zip(ways, (2, 3, 8), strict=True)]
    ((what, _, own, peer, ratio),) = run_all.compared("cam_inference", {"rows": seeds})
    assert (what, own["way"], peer["way"], ratio) == ("CAM seeds, four scales with flips", ways[2], ways[0], 4)


def test_a_variant_of_the_step_is_no_figure_of_ours() -> None:
    import run_all
    import train_step

    steps = [{"step": case.name, "images/s": 1 + index} for index, case in enumerate(train_step.cases(True, 4))]
    result = {"rows": steps, "backbone": "resnet38d", "side": 448, "batch": 4}
    ((what, _, own, _, _),) = run_all.compared("train_step", result)
    assert what == "CPN's step, resnet38d at 448 px, 4 images"
    assert own["step"] == "the trainer's step"


def test_the_steps_that_decide_are_measured_first() -> None:
    import train_step

    ladder = train_step.cases(True, 4)
    order = train_step.decisive_first(ladder)
    assert [case.name for case in order[:3]] == ["as released", "the trainer's step", "+ whole step in a CUDA graph"]
    assert order[3].times == 4
    assert {case.name for case in order[4:7]} == train_step.VARIANTS.keys()
    assert {case.name for case in order} == {case.name for case in ladder}
    assert len(order) == len(ladder)
    on_a_cpu = train_step.cases(False, 4)
    assert train_step.decisive_first(on_a_cpu) == on_a_cpu


def test_kernels_are_compared_by_the_device_where_it_was_timed() -> None:
    import run_all

    def row(backend: str, call: float, device: float | None) -> dict:
        return {"size": "a", "pass": "forward", "backend": backend, "call ms": call, "device ms": device}

    rows = [row("eager", 1, None), row("compiled eager", 2, 1.5), row("triton", 3, 0.5)]  # eager cannot be captured
    ((_, column, own, peer, ratio),) = run_all.compared("affinity_kernel", {"rows": rows})
    assert (column, own["backend"], peer["backend"], ratio) == ("device ms", "triton", "compiled eager", 3)


def test_calls_that_warm_up_are_not_timed() -> None:
    import timing

    seconds = iter([9.0, 1.0, 2.0, 3.0, 100.0])
    clock = mock.Mock(return_value=0.0)

    def run() -> None:
        clock.return_value += next(seconds)

    with mock.patch.object(time, "perf_counter", clock):
        times = timing.call_times(run, torch.device("cpu"), budget=5.0)
    assert times.repeats == 3  # without the compiling call; three calls fill the budget
    assert (times.low, times.median, times.high) == pytest.approx((1.4, 2.0, 2.6))


@pytest.fixture
def pretended_gpu(monkeypatch) -> SimpleNamespace:
    """Replace the parts of torch.cuda that ``timing`` uses. It counts captures and replays; events are 2 ms apart."""
    import timing

    seen = SimpleNamespace(captures=0, replays=0, fails=None)

    @contextmanager
    def graph(*_: object, **__: object):
        seen.captures += 1
        yield
        if seen.fails is not None:
            raise seen.fails

    def replay() -> None:
        seen.replays += 1

    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda _: 2.0)
    stream = mock.MagicMock()
    fake = SimpleNamespace(
        Stream=stream,
        stream=stream,
        current_stream=stream,
        CUDAGraph=lambda: SimpleNamespace(replay=replay),
        graph=graph,
        Event=lambda **_: event,
        synchronize=lambda _: None,
        OutOfMemoryError=torch.cuda.OutOfMemoryError,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(timing, "overwriting", lambda _: None)
    return seen


def test_the_device_s_time_is_that_of_replays(pretended_gpu: SimpleNamespace) -> None:
    import timing

    run = mock.Mock()
    times = timing.device_times(run, torch.device("cuda"), budget=0.0)
    assert run.call_count == 3 + 1  # warm-up and capture
    assert (pretended_gpu.captures, pretended_gpu.replays) == (1, 1 + 10)
    assert times == timing.Times(0.002, 0.002, 0.002, 10)


def test_a_kernel_bench_has_both_times_or_says_why_not(pretended_gpu: SimpleNamespace) -> None:
    import timing

    columns = timing.kernel_columns(mock.Mock(), torch.device("cuda"), budget=0.0)
    assert [*columns] == ["device ms", "device p20", "device p80", "repeats", "call ms", "call p20", "call p80"]
    assert columns["device ms"] == 2.0
    assert columns["repeats"] == 10
    assert timing.kernel_time(columns) == "device ms"

    pretended_gpu.fails = RuntimeError("operation not permitted when stream is capturing\nmore")
    columns = timing.kernel_columns(mock.Mock(), torch.device("cuda"), budget=0.0)
    assert columns["device ms"] is None
    assert columns["not captured"] == "operation not permitted when stream is capturing"
    assert timing.kernel_time(columns) == "call ms"

    pretended_gpu.fails = torch.cuda.OutOfMemoryError()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        timing.kernel_columns(mock.Mock(), torch.device("cuda"), budget=0.0)


def test_a_result_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    import timing

    path = tmp_path / "x.json"
    timing.write_json(path, {"device": "a CPU"}, [{"ms": 1.0}], finished=False)
    assert json.loads(path.read_text())["finished"] is False
    with pytest.raises(TypeError):
        timing.write_json(path, {"device": "a CPU"}, [{"ms": object()}])
    assert json.loads(path.read_text())["rows"] == [{"ms": 1.0}]


def test_benches_and_commands_run_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    for part in ("bench", "cpn_fast", "kernels", "pipelines", "configs"):
        shutil.copytree(
            BENCH.parent / part, tmp_path / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    libraries = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    environment = os.environ | {"PYTHONPATH": libraries}
    where = "import cpn_fast.kernels, cpn_fast.pipelines; print(cpn_fast.__path__[0], cpn_fast.kernels.__path__[0])"
    (tmp_path / "bench" / "where.py").write_text(f"import timing\nimport subprocess, sys\nchild = {where!r}\n"
        "subprocess.run([sys.executable, '-S', '-c', child], check=True, cwd='/')\nexec(child)\n")  # fmt: skip

    def printed(*command: str) -> list[str]:
        # -S: without site, so without an editable install
        given = [sys.executable, "-S", *command]
        return subprocess.run(given, check=True, cwd=tmp_path, env=environment, stdout=-1, text=True).stdout.split()

    assert printed("bench/where.py") == 2 * [str(tmp_path / "cpn_fast"), str(tmp_path / "cpn_fast/kernels")]
    assert "train" in printed("-m", "cpn_fast", "--help")


def test_the_pages_show_the_stored_results() -> None:
    import run_all

    places = run_all.devices()
    assert places
    tables = [run_all.table(place) for place in places]
    assert [(place / "table.md").read_text() for place in places] == tables
    for page, text in ((run_all.SPEED, "\n".join(tables)), (run_all.README, run_all.headlines(places))):
        assert run_all.in_page(page.read_text(), text) == page.read_text(), "run python bench/run_all.py --table"


def test_every_headline_is_a_row_of_the_stored_results() -> None:
    import run_all

    shown = run_all.headlines(run_all.devices())
    for name, bench in run_all.BENCHES.items():
        if bench.headline is not None:
            pattern = re.escape(bench.headline[1]).replace(re.escape("{what}"), ".+")
            assert re.search(rf"^\| {pattern}, ", shown, re.MULTILINE), name


def test_the_released_step_and_ours_agree() -> None:
    import train_step

    found = train_step.check(train_step.generated(2, 65, torch.device("cpu")), "narrow")
    assert all(error < 1e-3 for error in found.values()), found


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_convolution_costs_as_much_again_for_each_of_its_gradients(groups) -> None:
    import train_step

    images = torch.randn(2, 8, 15, 13)
    weight = torch.randn(8, 8 // groups, 3, 3, requires_grad=True)
    forward = 2 * (2 * 8 * 8 * 7) * 9 * 8 // groups  # one multiplication and one addition for each tap of each output

    def counted(images: torch.Tensor) -> int:
        convolve = functools.partial(F.conv2d, images, weight, stride=2, padding=1, groups=groups)
        return train_step.convolution_flops(lambda: convolve().sum().backward())

    assert counted(images) == 2 * forward
    assert counted(images.requires_grad_()) == 3 * forward


def test_a_training_step_is_measured_where_dali_is_missing(tmp_path: Path, monkeypatch) -> None:
    import run_all

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    path = tmp_path / "script.py"
    path.write_text("import sys; sys.modules['nvidia.dali'] = None; import train_step")
    outcome = run_all.run(path, [], 60)
    assert outcome.word == "done", outcome.why


def test_real_images_scores_every_config_seed_and_checkpoint(
    small_voc: Path, tiny_config, tmp_path: Path, capsys
) -> None:
    import real_images

    training, validation = Path("ImageSets/Segmentation/train.txt"), Path("ImageSets/Segmentation/val.txt")
    paths = [tiny_config(name="cpn"), tiny_config(name="seam", method="seam", model={"prcm": False})]
    some = tmp_path / "some.txt"  # training and scores are on different lists
    some.write_text("".join((small_voc / training).read_text().splitlines(keepends=True)[:5]))
    overrides = ["train.steps=4", f"data.train_list={some}", f"data.eval_list={training}"]
    runs = {("cpn", 0): "cpn", ("seam", 0): "seam", ("cpn", 3): "cpn_seed3", ("seam", 3): "seam_seed3"}

    def measured() -> str:
        real_images.run(paths, [0, 3], overrides, 2, validation, tmp_path, {"device": "CPU"})
        return (tmp_path / "real_images.json").read_text()

    first = measured()
    found = json.loads(first)
    assert [(row["config"], row["seed"], row["scales"]) for row in found["rows"]] == [
        (*run, scales) for run in runs for scales in ("0.5, 1", "1")
    ]
    for (config, seed), name in runs.items():
        assert load(tmp_path / "runs" / name / "config.yaml").train.seed == seed
        seeds = (tmp_path / "runs" / name / "cams").glob("train*/seeds/*")
        assert {path.stem for path in seeds} == set((small_voc / training).read_text().split())
        points = found["curves"][config][str(seed)]
        last = next(row for row in found["rows"] if (row["config"], row["seed"]) == (config, seed))
        assert points.keys() == {"2", "4"}
        assert points["4"] == last["validation, oracle"] >= last["validation"]

    summary = next(row for row in found["spread"] if (row["config"], row["scales"]) == ("cpn", "1"))
    one, other = (row["train"] for row in found["rows"] if (row["config"], row["scales"]) == ("cpn", "1"))
    assert one != other
    assert summary["seeds"] == 2
    assert summary["train"]["mean"] == pytest.approx((one + other) / 2)
    assert summary["train"]["spread"] == pytest.approx(abs(one - other) / 2**0.5)
    assert f"{(one + other) / 2:.2f} ± {abs(one - other) / 2**0.5:.2f}" in capsys.readouterr().out
    assert (tmp_path / "real_images.png").stat().st_size
    checkpoints = tmp_path / "runs/cpn/checkpoints"
    shutil.copy(checkpoints / "step-00000002.pt", checkpoints / "step-00000003.pt")  # as from a stopped run
    assert measured() == first

    # A new measurement replaces the old one; other rows stay.
    real_images.run(paths[1:], [3], overrides, 2, validation, tmp_path, {"device": "another CPU"})
    again = json.loads((tmp_path / "real_images.json").read_text())
    devices = {(row["config"], row["seed"]): row["device"] for row in again["rows"]}
    assert devices == dict.fromkeys(runs, "CPU") | {("seam", 3): "another CPU"}
    assert (again["curves"], again["spread"]) == (found["curves"], found["spread"])

    # A run from another machine has no checkpoints.
    carried = tmp_path / "elsewhere" / "cpn"
    carried.mkdir(parents=True)
    for name in ("model.safetensors", "metrics.jsonl"):
        shutil.copy(tmp_path / "runs/cpn" / name, carried)
    about = json.loads((tmp_path / "runs/cpn/environment.json").read_text()) | {"device": "a GPU"}
    (carried / "environment.json").write_text(json.dumps(about))
    out = tmp_path / "scores"
    out.mkdir()
    real_images.run(paths[:1], [0], [*overrides, f"out={carried.parent}"], 2, validation, out, {"device": "CPU"})
    scored = json.loads((out / "real_images.json").read_text())
    assert scored["rows"] == [row | {"trained on": "a GPU"} for row in found["rows"][:2]]
    assert scored["curves"] == {"cpn": {"0": {"4": found["curves"]["cpn"]["0"]["4"]}}}


def test_settings_are_compared_with_the_config_as_it_is(small_voc: Path, tiny_config, tmp_path: Path, capsys) -> None:
    import settings

    paths = [tiny_config(name="cpn"), tiny_config(name="seam", method="seam", model={"prcm": False})]
    training = Path("ImageSets/Segmentation/train.txt")
    overrides = [f"data.eval_list={training}"]
    tried = ("train.lr=0.5", "train.momentum=0.5")

    def measured(*tries: tuple[str, ...], steps: int = 2) -> list[dict[str, Any]]:
        settings.run(paths, tries, overrides, steps, tmp_path, {"device": "CPU"})
        return json.loads((tmp_path / "settings.json").read_text())["rows"]

    rows = measured(tried)
    assert [(row["config"], row["setting"]) for row in rows] == [
        *(("cpn", "as it is"), ("seam", "as it is")),
        *(("cpn", "train.lr=0.5 train.momentum=0.5"), ("seam", "train.lr=0.5 train.momentum=0.5")),
    ]
    assert [row["lead"] for row in rows] == [0, 0, *(rows[2 + at]["train"] - rows[at]["train"] for at in (0, 1))]
    assert "train.lr=0.5" in capsys.readouterr().out
    for config in ("cpn", "seam"):
        run = tmp_path / "runs" / f"{config}-2-steps-train.lr-0.5-train.momentum-0.5"
        assert (load(run / "config.yaml").train.lr, load(run / "config.yaml").train.steps) == (0.5, 2)
        # The validation list is not looked at.
        assert [folder.name for folder in (run / "cams").iterdir()] == ["train"]

    # Other lengths stand beside these rows, each against its own length.
    longer = measured(steps=3)
    assert longer[:4] == rows
    assert [(row["steps"], row["lead"]) for row in longer[4:]] == [(3, 0), (3, 0)]


def test_a_setting_may_multiply_the_inner_features() -> None:
    import settings

    backbone = MobileNetV2(stride=16).eval()
    images = torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        usual = backbone(images)
        with settings.inner_features(("train.lr=0.04", "features=0.5")):
            halved = backbone(images)
        with settings.inner_features(("train.lr=0.04",)):
            again = backbone(images)
    assert all(torch.equal(a, b) for a, b in zip(usual, again, strict=True))
    assert torch.equal(halved.last, usual.last)
    for inner in ("low", "middle"):
        torch.testing.assert_close(getattr(halved, inner), 0.5 * getattr(usual, inner))


def test_one_run_has_no_spread() -> None:
    import real_images

    row = {"config": "cpn", "seed": 0, "scales": "1", "train": 40.0, "threshold": 0.5, "validation": 39.0}
    (summary,) = real_images.spread([row | {"validation, oracle": 39.5}])
    assert summary["train"] == {"mean": 40.0, "spread": None}
    assert real_images.written(summary)["train"] == "40.00"


def test_segmenter_is_scored_on_both_lists_beside_its_masks(tiny_config, small_voc: Path, tmp_path: Path) -> None:
    import segmenter

    short = {"batch": 4, "steps": 4, "log_every": 2, "data_threads": 1}
    path = tiny_config(segment={"train": short, "augment": {"crop": 64}, "scales": [1.0]}, crf={"workers": 1})

    truth = small_voc / "SegmentationClass"
    background = tmp_path / "background"
    background.mkdir()
    for mask in truth.iterdir():
        write_mask(background / mask.name, np.zeros_like(read_mask(mask)))

    def rows(name: str, masks: Path, *overrides: str) -> list[dict[str, Any]]:
        segmenter.run(path, name, masks, overrides, tmp_path, {"device": "CPU"})
        return json.loads((tmp_path / "segmenter.json").read_text())["rows"]

    (first,) = rows("first", truth)
    assert first["its masks"] is None
    assert 0 < first["training"] < 100
    assert 0 < first["validation"] < 100
    assert first["with CRF"] is not None
    folders = tmp_path / "runs/first/segment"
    assert (folders / "val/crf").is_dir()
    assert not (folders / "train/crf").exists()

    kept, shorter = rows("shorter", background, "segment.train.steps=2", "segment.crf=null")
    assert (kept, shorter["steps"], shorter["with CRF"]) == (first, 2, None)
    assert shorter["first loss"] == shorter["last loss"]  # one line in metrics.jsonl
    assert 0 < shorter["its masks"] < 100 / len(DEMO_CLASSES)  # only background has an IoU above 0
    again = rows("first", truth)
    assert [row["run"] for row in again] == ["shorter", "first"]
    assert again[1] == first


def test_features_show_how_prcm_s_softmax_hardens_with_their_size(tiny_config, small_run: Path) -> None:
    import features

    settings = load(tiny_config())
    weights = small_run / "model.safetensors"
    small, large = features.run(settings, [weights], [0.1, 10.0], 3, torch.device("cpu"))
    assert small["weights"] == "small/model.safetensors"
    for name in ("low", "middle"):
        assert large[name] == pytest.approx(100 * small[name])
    assert (small["image"], small["zero"]) == (large["image"], large["zero"])
    assert small["spread"] < large["spread"]
    assert small["share"] < 0.5 < large["share"]
    plain = load(tiny_config(method="cam", model={"pcm": False, "prcm": False}, cam={"map": "raw"}))
    (row,) = features.run(plain, [weights], [1.0], 3, torch.device("cpu"))
    assert (row["spread"], row["share"]) == (None, None)


class ThinLayers:
    """``torch.nn`` with a sixteenth of the channels, for a ResNet38d that is small enough for float64."""

    Module = torch.nn.Module

    @staticmethod
    def Conv2d(inputs: int, outputs: int, *sizes: Any, **options: Any) -> torch.nn.Conv2d:
        return torch.nn.Conv2d(3 if inputs == 3 else inputs // 16, outputs // 16, *sizes, **options)

    @staticmethod
    def BatchNorm2d(channels: int) -> torch.nn.BatchNorm2d:
        return torch.nn.BatchNorm2d(channels // 16)


def thin(kind: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Return a network with random statistics and factors of batch normalisation."""
    from cpn_fast.models import resnet38d

    with mock.patch.object(resnet38d, "nn", ThinLayers):
        torch.manual_seed(0)
        net = kind().double().train()
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        for values, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5), (norm.running_var, 0.5, 2)):
            values.data.uniform_(low, high)
        norm.running_mean.uniform_(-0.5, 0.5)
    return net


def features_and_gradients(net: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)  # dropout
    features = net(images)
    weights = [torch.randn_like(feature) for feature in features]
    sum((feature * weight).sum() for feature, weight in zip(features, weights, strict=True)).backward()
    trained = [parameter.grad for parameter in net.parameters() if parameter.requires_grad]
    assert len(trained) == 35  # all convolutions from b3 on
    assert all(bool(gradient.any()) for gradient in trained)
    return [*features, *trained]


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> None:
    """The signature of ``F.conv2d``."""


@pytest.mark.parametrize("side", [(64, 96), (48, 80), (33, 57)], ids=["by 4", "by 2", "by none"])
@pytest.mark.parametrize("variant", ["InterleavedBlocks", "with_interleaved_convolutions"])
def test_a_variant_of_resnet38d_gives_its_features_and_gradients(variant: str, side: tuple[int, int]) -> None:
    import step_variants

    from cpn_fast.models.resnet38d import ResNet38d

    images = torch.randn(2, 3, *side, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected = features_and_gradients(thin(ResNet38d), images)
    with mock.patch.object(F, "conv2d", side_effect=F.conv2d) as convolve:
        found = features_and_gradients(thin(getattr(step_variants, variant)), images)
    calls = [inspect.signature(conv2d).bind(*call.args, **call.kwargs) for call in convolve.call_args_list]
    dilations = {np.max(call.arguments.get("dilation", 1)) for call in calls}
    by_2 = {1, 4} if variant == "with_interleaved_convolutions" else {1, 2, 4}
    # So the variant runs, not the plain form.
    assert dilations == {(64, 96): {1}, (48, 80): by_2, (33, 57): {1, 2, 4}}[side]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float(((one - other).abs().max() / other.abs().max()).detach()) < 1e-10


def test_the_schedule_goes_through_every_stage_of_the_chain(tiny_config, tmp_path: Path) -> None:
    import schedule
    import timing

    two = tmp_path / "two.txt"
    settings = load(tiny_config(data={"train_list": str(two)}, cam={"scales": [1.0]}, segment={"scales": [1.0]}))
    ids = (settings.data.root / "ImageSets/Segmentation/train.txt").read_text().split()[:2]
    for path in (two, schedule.long_list(two)):
        path.write_text("\n".join(ids))
    schedule.write_weights(settings, tmp_path)
    cpu = torch.device("cpu")
    stages = schedule.listed_stages(settings, tmp_path)
    took = {name: schedule.seconds(run, cpu) for name, run in stages.items()}
    for made in ("refine/labels", "refine/masks", "segment/two/masks"):
        assert list((settings.run / made).glob("*.png")), made
    images = schedule.work(load(timing.ROOT / "configs" / "voc.yaml"))
    trained = schedule.trainings(settings).keys()
    assert images.keys() == took.keys() | trained
    assert images["CPN, training"] == 8 * 10_582
    assert images["segmenter, training"] == 20_000 * 10


def test_the_schedule_adds_starts_and_rates_up_to_minutes() -> None:
    import schedule

    rate = schedule.listed_rate(10, 40, 7.0, 22.0)  # 2 images a second after 2 seconds
    assert rate == schedule.Rate(2.0, None, None, 2.0)
    with pytest.raises(ValueError, match=r"40 images took 7\.00 s and 10 took 7\.00: take more with --few"):
        schedule.listed_rate(10, 40, 7.0, 7.0)
    rows = schedule.rows_of({"a": 118, "b": 59}, {"a": rate, "b": rate})
    assert [row["minutes"] for row in rows] == pytest.approx([61 / 60, 31.5 / 60, 92.5 / 60])
    rows = schedule.rows_of({"a": 118, "b": 59}, {"a": rate})
    assert [row["minutes"] for row in rows[1:]] == [None, None]  # a sum needs all its parts


def test_the_schedule_takes_the_step_s_rate_of_the_same_device(tmp_path: Path) -> None:
    import schedule

    row = {"step": "+ whole step in a CUDA graph", "images/s": 80.0, "ms": 50.0, "ms p20": 40.0, "ms p80": 62.5}
    result = {"machine": {"device": "X"}, "batch": 4, "rows": [row | {"first s": 9.0}]}
    assert schedule.step_rate(tmp_path, "X") is None
    (tmp_path / "train_step.json").write_text(json.dumps(result))
    assert schedule.step_rate(tmp_path, "X") == schedule.Rate(80.0, 64.0, 100.0, 9.0)
    assert schedule.step_rate(tmp_path, "Y") is None


def test_differences_of_two_trainings_are_relative_to_the_cpu_s() -> None:
    import gpu_and_cpu

    random = np.random.default_rng(0)
    seeds = [Seed(np.array([3, 7]), random.random((2, 4, 5), np.float32)) for _ in range(2)]
    of_cpu = gpu_and_cpu.Result(np.array([4.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0]), seeds, 0.1)
    same = gpu_and_cpu.differences(of_cpu, of_cpu, 0.5)
    assert same.pop("CAM, correlation") == pytest.approx(1)
    assert set(same.values()) == {0.0}

    moved = [Seed(seed.classes, seed.cam.copy()) for seed in seeds]
    moved[0].cam[:, 0, 0] = 1 - moved[0].cam[:, 0, 0].round()  # one pixel of 40 changes its class or becomes background
    losses = np.array([2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 2.0])
    found = gpu_and_cpu.differences(gpu_and_cpu.Result(losses, moved, 0.1), of_cpu, 0.5)
    assert found["loss, first step, %"] == 50
    assert found["loss, a step (median), %"] == 0
    assert found["loss, last fifth, %"] == 50
    assert found["mask, other pixels, %"] == pytest.approx(2.5)
    change = np.abs(moved[0].cam - seeds[0].cam).sum() / 80
    assert found["CAM, mean difference"] == pytest.approx(change)
    assert 0 < found["CAM, correlation"] < 1


@pytest.mark.parametrize("gpu", [False, True])
def test_only_the_gpu_s_training_sees_a_gpu(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_and_cpu

    path = BENCH.parent / "configs/voc_mini.yaml"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    trainings = gpu_and_cpu.trainings(load(path, ["data.root=."]), gpu)
    assert [training.name for training in trainings] == ["cpu", "gpu" if gpu else "bf16", "other seed"]
    assert [training.on_gpu for training in trainings] == [False, gpu, False]
    configs = [load(path, ["data.root=.", *training.overrides]) for training in trainings]
    assert [config.train.precision for config in configs] == ["fp32", None if gpu else "bf16", "fp32"]
    assert configs[0].train.seed == configs[1].train.seed != configs[2].train.seed

    for training in trainings:
        with mock.patch.object(subprocess, "run", side_effect=KeyboardInterrupt) as called, suppress(KeyboardInterrupt):
            gpu_and_cpu.train(training, path, ["data.root=."], tmp_path / "few.txt", tmp_path)
        assert called.call_args.kwargs["env"]["CUDA_VISIBLE_DEVICES"] == ("0" if training.on_gpu else "")
