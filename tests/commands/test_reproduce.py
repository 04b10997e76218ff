from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cpn_fast import config_file
from cpn_fast.cli import main
from cpn_fast.commands import reproduce
from cpn_fast.commands.reproduce import RUNS, TABLES, Result
from cpn_fast.config import Config
from cpn_fast.data.scores import Curve, Scores
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import chain, train

ROOT = Path(__file__).parents[2]
VOC = ROOT / "configs/voc.yaml"
METHODS = {"cam": "cam", "seam": "seam", "seam-prcm": "seam_prcm"}


def planned(key: str, path: Path, overrides: tuple[str, ...] = ()) -> reproduce.Plan:
    return reproduce.plan(key, config_file.load(path, [*overrides]), path, [*overrides])


def differing(a: Config, b: Config) -> set[str]:
    """Return the keys whose values differ, such as train.batch."""

    def flat(tree: dict, prefix: str = "") -> dict:
        found: dict[str, Any] = {}
        for key, value in tree.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return found

    first, second = flat(a.model_dump()), flat(b.model_dump())
    return {key for key in first if first[key] != second[key]}


def test_every_run_of_every_table_is_a_valid_variant_of_the_shipped_recipe() -> None:
    assert {row.run for rows in TABLES.values() for row in rows} == RUNS.keys()
    names = {key: planned(key, VOC).config.name for key in RUNS}
    assert {key for key, name in names.items() if name == "voc"} == {"cpn", "hide-0.5", "superpixels-200"}
    beside = {"voc_cam", "voc_seam", "voc_seam_prcm", "voc_grid"}
    assert {name for key, name in names.items() if name not in ("voc", f"voc-{key}")} == beside
    ablation = [planned(row.run, VOC).config for row in TABLES["table2"]]
    assert [c.method for c in ablation] == ["cam", "cpn", "cpn", "cpn", "cpn"]
    assert [(c.loss.cpcr > 0, c.loss.hard_share, c.model.prcm) for c in ablation[1:]] == [
        (False, 0.2, False),
        (True, 1.0, False),
        (True, 0.2, False),
        (True, 0.2, True),
    ]


@pytest.mark.parametrize(("stem", "grid"), [("voc", "grid-56-112"), ("voc_mini", "grid-28-56")])
def test_other_methods_are_the_configs_beside_the_base(stem: str, grid: str) -> None:
    base = VOC.with_stem(stem)
    for key, method in {**METHODS, grid: "grid"}.items():
        beside = VOC.with_stem(f"{stem}_{method}")
        assert planned(key, base) == (beside, [], config_file.load(beside))
    given = ("train.batch=2", "name=other", "train.seed=1")
    for key, method in METHODS.items():
        expected = config_file.load(VOC.with_stem(f"{stem}_{method}"), [*given, f"name=other_{method}"])
        assert planned(key, base, given).config == expected
    other_grid = planned("grid-4-7", base)
    assert differing(other_grid.config, planned(grid, base).config) == {"name", "patches.grid_sizes"}


def test_a_base_alone_has_the_same_methods_by_overrides(tmp_path: Path) -> None:
    voc, mini = (Path(shutil.copy(VOC.with_stem(stem), tmp_path)) for stem in ("voc", "voc_mini"))
    for key, method in {**METHODS, "grid-56-112": "grid"}.items():
        variant = planned(key, voc)
        assert variant.config.name == f"voc-{key}"
        assert variant.file == voc
        assert config_file.load(voc, variant.overrides) == variant.config
        assert differing(variant.config, config_file.load(VOC.with_stem(f"voc_{method}"))) == {"name"}
        # A file may set thresholds and alphas of later stages, and the scale for its small crop.
        own = {"name", "cam.mask_threshold", "crf.low_alpha", "crf.high_alpha", "walk.alpha", "seam.scale"}
        if method != "grid":
            assert differing(planned(key, mini).config, config_file.load(VOC.with_stem(f"voc_mini_{method}"))) <= own
    assert planned("seam", voc, ("train.batch=2",)).config.train.batch == 2


@pytest.mark.parametrize("key", ["seam", "seam-prcm"])
def test_seam_beside_the_papers_equations_is_the_released_one(key: str) -> None:
    found = planned(key, VOC.with_stem("voc_paper")).config
    different = differing(found, config_file.load(VOC.with_stem(f"voc_{METHODS[key]}")))
    # SEAM reads neither patches and superpixels nor these terms of the loss.
    cpns = {"detach_refined_pair", "cpcr_target", "background", "refined_background", "hard_over"}
    read = {key for key in different if key.partition(".")[0] not in ("patches", "superpixels")}
    assert read == {"name", *(f"loss.{key}" for key in cpns)}


def test_a_config_beside_the_base_with_other_data_is_not_its_method(tmp_path: Path) -> None:
    base = Path(shutil.copy(VOC, tmp_path))
    (tmp_path / "voc_cam.yaml").write_text("base: voc.yaml\nname: webcam\ndata: {root: webcam}\n")
    with pytest.raises(UserError, match=r"voc_cam.yaml: data differ from .*voc.yaml's.*rename"):
        reproduce.commands("table2", base, [])


def test_tables_hold_the_papers_figures() -> None:
    best = {name: max(row.paper or 0 for row in rows) for name, rows in TABLES.items() if name != "table3"}
    assert best == {"table1": 57.43, "table2": 57.43, "table4": 57.43, "table5": 67.8, "fig6": 57.43, "fig7": 57.43}


def test_a_table_is_trained_scored_and_drawn_once(tiny_config, monkeypatch, capsys) -> None:
    path = tiny_config(train={"steps": 2}, cam={"scales": [1.0]})
    rows = [row for row in TABLES["table1"] if row.run in ("cam", "cpn") and row.scale in (0.5, None)]
    monkeypatch.setitem(TABLES, "table1", tuple(rows))
    picture = reproduce.run("table1", path, [])
    assert picture.stat().st_size > 10_000
    found = json.loads(picture.with_suffix(".json").read_text())
    assert [row["name"] for row in found] == [row.name for row in TABLES["table1"]]
    assert all(0 <= row["ours"] <= 100 for row in found)
    assert found[0]["config"] == str(path)
    assert "method=cam" in found[0]["overrides"]
    assert found[0]["ours"] != found[1]["ours"]  # scale 0.5 and 1 of one network
    assert "57.43" in capsys.readouterr().out
    runs = picture.parent.parent
    assert {"tiny/model.safetensors", "tiny-cam/model.safetensors"} == {
        str(weights.relative_to(runs)) for weights in runs.rglob("model.safetensors")
    }
    monkeypatch.setattr(train, "TrainingPipeline", None)  # a second training would need it
    assert reproduce.run("table1", path, []) == picture


def scores(value: float) -> Scores:
    """Return scores whose mIoU, background IoU and foreground mIoU are about ``value``."""
    hits = round(1000 * value)
    misses = 1000 - hits
    return Scores(np.array([[2 * hits, misses], [misses, 2 * hits]]))


@pytest.fixture
def faked(monkeypatch) -> Counter:
    """Replace training, scoring and timing. The counter counts calls by kind and the run's name."""
    calls: Counter = Counter()

    def trained(config: Config) -> Path:
        calls["train", config.name] += 1
        return config.run / "model.safetensors"

    def seeds(config: Config, weights: Path, list_path: Path) -> SimpleNamespace:
        calls["seeds", config.name] += 1
        oracle = scores(0.3 + 0.04 * len(calls))
        confusion = np.stack([scores(value).confusion for value in (0.2, 0.4)])
        return SimpleNamespace(oracle=oracle, curve=Curve(np.array([0.1, 0.6]), Scores(confusion)))

    def chained(config: Config) -> list[chain.Stage]:
        calls["run", config.name] += 1
        return [
            chain.Stage(name, Path("val.txt"), miou)
            for name, miou in zip(reproduce.CHAIN, (0.5, 0.6, None), strict=True)
        ]

    monkeypatch.setattr(train, "run", trained)
    monkeypatch.setattr(chain, "run", chained)
    monkeypatch.setattr(reproduce, "scored_seeds", seeds)
    monkeypatch.setattr(reproduce, "seconds_of_patches", lambda config: 0.5)
    return calls


@pytest.mark.parametrize(
    ("name", "trained", "scored", "chains"),
    [
        ("table1", 4, 20, 0),
        ("table2", 5, 5, 0),
        ("table3", 3, 3, 0),
        ("table4", 5, 5, 0),
        ("table5", 0, 0, 1),
        ("fig6", 7, 7, 0),
        ("fig7", 7, 7, 0),
    ],
)
def test_a_run_is_opened_and_scored_once_for_all_rows(name, trained, scored, chains, tiny_config, faked) -> None:
    picture = reproduce.run(name, tiny_config(), [])
    assert set(faked.values()) == {1}
    made = Counter(what for what, _ in faked)
    assert (made["train"], made["seeds"], made["run"]) == (trained, scored, chains)
    found = json.loads(picture.with_suffix(".json").read_text())
    assert [row["run"] for row in found] == [row.run for row in TABLES[name]]
    if name == "table5":
        assert [row["ours"] for row in found] == [50, 60, None]


@pytest.mark.parametrize(
    ("name", "labels", "known"),
    [
        ("fig6", ["5", "50", "100", "200", "500", "1000", "8000"], {3: 57.43, 6: 55.79}),
        ("fig7", ["4, 7", "14, 28", "28, 56", "56, 112", "112, 224", "224, 448"], {0: 55.67, 3: 57.07, 5: 55.80}),
    ],
)
def test_a_figure_draws_ours_and_the_papers_over_what_changes(name, labels, known) -> None:
    curve = Curve(np.array([0.5]), Scores(scores(0.4).confusion[None]))
    results = [Result(50.0 + i, curve) for i, _ in enumerate(TABLES[name])]
    _, over, thresholds = reproduce._plot(name, TABLES[name], results).axes
    assert over.get_xscale() == "log"
    assert [label.get_text() for label in over.get_xticklabels()] == labels
    assert all(np.all(np.diff(line.get_xdata()) > 0) for line in over.lines if line.get_label() == "ours")
    heights = {line.get_label(): np.asarray(line.get_ydata()) for line in over.lines}
    assert list(heights["ours"]) == [50.0 + i for i in range(len(labels))]
    assert {i: value for i, value in enumerate(heights["paper"]) if not np.isnan(value)} == known
    levels = {label: values[0] for label, values in heights.items() if label not in ("ours", "paper")}
    assert levels == ({} if name == "fig6" else {"superpixels, ours": 56.0, "superpixels, paper": 57.43})
    assert len(thresholds.lines) == sum(row.measure == "seeds" for row in TABLES[name])


@pytest.mark.parametrize("kind", ["superpixel", "grid"])
def test_patches_are_timed_on_one_thread_after_a_first_call(kind, tiny_config, monkeypatch) -> None:
    settings = config_file.load(tiny_config(patches={"kind": kind, "grid_sizes": [16]}))
    lengths = [1000.0, 16.0, 8.0, 800.0]  # the first call does not count; the median of the others is 16
    clock = (time for length in lengths for time in (0, length))
    seen = []

    def split(images, superpixels, *_, **__) -> None:
        assert (superpixels is None) == (kind == "grid")
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(reproduce, "complementary_pair", split)
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert reproduce.seconds_of_patches(settings, images=8, times=3) == 2
        assert torch.get_num_threads() == 2
        with pytest.raises(StopIteration):  # from the clock
            reproduce.seconds_of_patches(settings)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == 4 * [1]


@pytest.mark.parametrize(("name", "method", "message"), [("table9", "cpn", "fig6"), ("table4", "cam", "CPN's config")])
def test_what_cannot_be_reproduced_is_said(name, method, message, tiny_config) -> None:
    changes = (
        {"method": "cam", "model": {"pcm": False, "prcm": False}, "cam": {"map": "raw"}} if method == "cam" else {}
    )
    with pytest.raises(UserError, match=message):
        reproduce.run(name, tiny_config(**changes), [])


def test_the_runs_of_a_table_can_be_made_elsewhere(tiny_config, tmp_path, monkeypatch, capsys) -> None:
    path = tiny_config(train={"steps": 1}, cam={"scales": [1.0]})
    rows = [row for row in TABLES["table1"] if row.run in ("cam", "cpn") and row.scale is None]
    monkeypatch.setitem(TABLES, "table1", tuple(rows))
    lines = reproduce.commands("table1", path, ["train.seed=3"])
    assert lines == [
        f"cpn-fast train {path} --set train.seed=3 --set method=cam --set model.pcm=false --set model.prcm=false "
        "--set cam.map=raw --set name=tiny-cam",
        f"cpn-fast train {path} --set train.seed=3",
    ]
    for line in lines:
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
    monkeypatch.setattr(train, "TrainingPipeline", None)  # every run is trained already
    assert reproduce.run("table1", path, ["train.seed=3"]).exists()


def test_the_whole_chain_is_one_command() -> None:
    assert reproduce.commands("table5", VOC, []) == [f"cpn-fast run {VOC}"]
    assert len(reproduce.commands("fig7", VOC, [])) == 7  # CPN and six grids


@pytest.mark.parametrize("name", TABLES)
def test_a_launcher_gets_every_run_as_it_is_meant(name: str, tmp_path: Path) -> None:
    (launcher,) = re.findall(
        r"^    cpn-fast reproduce .* --commands \| (xargs .*)$", (ROOT / "docs/voc.md").read_text(), re.M
    )
    folder = tmp_path / "my configs"
    shutil.copytree(VOC.parent, folder)
    got, programs = tmp_path / "got", tmp_path / "bin"
    got.mkdir()
    programs.mkdir()
    for program, script in (
        ("cpn-fast", """printf '%s\\n' "$@" > "$(mktemp "$GOT/XXXXXX")\""""),
        ("srun", """[ "$1 $2 $3" = "-N 1 --exclusive" ] && shift 3 && exec "$@\""""),
    ):
        (programs / program).write_text(f"#!/bin/sh\n{script}\n")
        (programs / program).chmod(0o755)
    path = folder / "voc.yaml"
    given = ["augment.long_side=[100, 200]", """data.root=Martin's "pictures" $HOME"""]
    lines = "\n".join(reproduce.commands(name, path, given)) + "\n"
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "GOT": str(got)}
    subprocess.run(["sh", "-c", launcher], input=lines, text=True, env=environment, check=True, timeout=300)

    started = set()
    for file in got.iterdir():
        command, given_config, *options = file.read_text().splitlines()
        assert command == ("run" if name == "table5" else "train")
        assert options[::2] == ["--set"] * (len(options) // 2)
        started.add(config_file.load(Path(given_config), options[1::2]))
    assert started == {planned(row.run, path, tuple(given)).config for row in TABLES[name]}


def test_overrides_of_runs_need_no_quotes_against_spaces() -> None:
    assert not [word for run in RUNS.values() for word in (*run.overrides, *run.released) if " " in word]
