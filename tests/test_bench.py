"""The benches' own machinery: what they compare is checked here, how fast it is only when they run."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cpn_fast.config import load

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
        ("import time; time.sleep(600)", "out of time", "stopped after 1 s"),
    ],
)
def test_a_bench_ends_in_one_of_four_ways(script: str, word: str, why: str, tmp_path: Path) -> None:
    import run_all

    path = tmp_path / "script.py"
    path.write_text(script)
    outcome = run_all.run(path, [], 1 if word == "out of time" else 60, dict(os.environ))
    assert outcome.word == word
    assert why in outcome.why


def test_ours_is_compared_with_the_fastest_peer() -> None:
    import run_all

    def row(backend: str, ms: float, size: str = "a") -> dict:
        return {"size": size, "pass": "forward", "backend": backend, "ms": ms}

    rows = [row("eager", 9), row("compiled eager", 6), row("tiled", 3), row("triton", 2), row("eager", 8, "b")]
    ((what, own, peer, ratio),) = run_all.compared("affinity_kernel", {"rows": rows})  # "b" has none of ours
    assert (what, own["backend"], peer["backend"], ratio) == ("a, forward", "triton", "compiled eager", 3)
    steps = [{"step": "as released", "images/s": 2}, {"step": "+ a", "images/s": 3}, {"step": "+ b", "images/s": 8}]
    ((_, own, peer, ratio),) = run_all.compared("train_step", {"rows": steps})
    assert (own["step"], peer["step"], ratio) == ("+ b", "as released", 4)


def test_readme_shows_the_stored_results() -> None:
    import run_all

    places = sorted(path.parent for path in run_all.RESULTS.glob("*/table.md"))
    assert places
    tables = [run_all.table(place) for place in places]
    assert [(place / "table.md").read_text() for place in places] == tables
    readme = run_all.README.read_text()
    assert run_all.in_readme(readme, tables) == readme


def test_the_released_step_and_ours_agree() -> None:
    import train_step

    found = train_step.check(train_step.generated(2, 65, torch.device("cpu")), "narrow")
    assert all(error < 1e-3 for error in found.values()), found


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_convolution_costs_as_much_again_for_each_of_its_gradients(groups) -> None:
    import train_step

    images = torch.randn(2, 8, 15, 13)
    weight = torch.randn(8, 8 // groups, 3, 3, requires_grad=True)
    forward = 2 * (2 * 8 * 8 * 7) * 9 * 8 // groups  # a multiplication and an addition for each tap of each output

    def counted(images: torch.Tensor) -> int:
        convolve = functools.partial(F.conv2d, images, weight, stride=2, padding=1, groups=groups)
        return train_step.convolution_flops(lambda: convolve().sum().backward())

    assert counted(images) == 2 * forward
    assert counted(images.requires_grad_()) == 3 * forward


def test_a_training_step_is_measured_where_dali_is_missing(tmp_path: Path) -> None:
    import run_all

    path = tmp_path / "script.py"
    path.write_text("import sys; sys.modules['nvidia.dali'] = None; import train_step")
    outcome = run_all.run(path, [], 60, os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert outcome.word == "done", outcome.why


def test_real_images_scores_every_config_seed_and_checkpoint(tiny_config, tmp_path: Path, capsys) -> None:
    import real_images

    validation = Path("ImageSets/Segmentation/val.txt")
    paths = [tiny_config(name="cpn"), tiny_config(name="seam", method="seam", model={"prcm": False})]
    runs = {("cpn", 0): "cpn", ("cpn", 3): "cpn_seed3", ("seam", 0): "seam", ("seam", 3): "seam_seed3"}

    def measured() -> str:
        real_images.run(paths, [0, 3], ["train.steps=4"], 2, validation, tmp_path, {"device": "CPU"})
        return (tmp_path / "real_images.json").read_text()

    first = measured()
    found = json.loads(first)
    assert [(row["config"], row["seed"], row["scales"]) for row in found["rows"]] == [
        (*run, scales) for run in runs for scales in ("0.5, 1", "1")
    ]
    for (config, seed), name in runs.items():
        assert load(tmp_path / "runs" / name / "config.yaml").train.seed == seed
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
    shutil.copy(checkpoints / "step-00000002.pt", checkpoints / "step-00000003.pt")  # as a stop leaves one
    assert measured() == first

    # What is measured again takes its place, and the rest stays.
    real_images.run(paths[1:], [3], ["train.steps=4"], 2, validation, tmp_path, {"device": "another CPU"})
    again = json.loads((tmp_path / "real_images.json").read_text())
    devices = {(row["config"], row["seed"]): row["device"] for row in again["rows"]}
    assert devices == dict.fromkeys(runs, "CPU") | {("seam", 3): "another CPU"}
    assert (again["curves"], again["spread"]) == (found["curves"], found["spread"])


def test_one_run_has_no_spread() -> None:
    import real_images

    row = {"config": "cpn", "seed": 0, "scales": "1", "train": 40.0, "threshold": 0.5, "validation": 39.0}
    (summary,) = real_images.spread([row | {"validation, oracle": 39.5}])
    assert summary["train"] == {"mean": 40.0, "spread": None}
    assert real_images.written(summary)["train"] == "40.00"


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
