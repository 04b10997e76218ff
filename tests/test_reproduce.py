from __future__ import annotations

import json
import shlex

import pytest

from cpn_fast import config, reproduce, train
from cpn_fast.cli import main
from cpn_fast.errors import UserError
from cpn_fast.reproduce import RUNS, TABLES


def test_every_run_of_every_table_is_a_valid_variant_of_the_shipped_recipe() -> None:
    from test_config import CONFIGS

    voc = next(path for path in CONFIGS if path.stem == "voc")
    base = config.load(voc)
    assert {row.run for rows in TABLES.values() for row in rows} == RUNS.keys()
    names = {key: reproduce.run_config(key, base, voc, []).name for key in RUNS}
    assert {key for key, name in names.items() if name == "voc"} == {"cpn", "hide-0.5", "superpixels-200"}
    assert all(name in ("voc", f"voc-{key}") for key, name in names.items())
    ablation = [reproduce.run_config(row.run, base, voc, []) for row in TABLES["table2"]]
    assert [c.method for c in ablation] == ["cam", "cpn", "cpn", "cpn", "cpn"]
    assert [(c.loss.cpcr > 0, c.loss.hard_share, c.model.prcm) for c in ablation[1:]] == [
        (False, 0.2, False),
        (True, 1.0, False),
        (True, 0.2, False),
        (True, 0.2, True),
    ]


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
    assert found[0]["ours"] != found[1]["ours"]  # scale 0.5 and 1 of one network
    assert "57.43" in capsys.readouterr().out
    runs = picture.parent.parent
    assert {"tiny/model.safetensors", "tiny-cam/model.safetensors"} == {
        str(weights.relative_to(runs)) for weights in runs.rglob("model.safetensors")
    }
    monkeypatch.setattr(train, "TrainingPipeline", None)  # a second training would need it
    assert reproduce.run("table1", path, []) == picture


def test_both_kinds_of_patches_are_timed(tiny_config) -> None:
    superpixels = config.load(tiny_config())
    grid = superpixels.model_copy(update={"patches": config.Patches(kind="grid", grid_sizes=(16,))})
    assert reproduce.seconds_of_patches(grid) > 0
    assert reproduce.seconds_of_patches(superpixels) > 0


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
    monkeypatch.setattr(train, "TrainingPipeline", None)  # nothing is left to train
    assert reproduce.run("table1", path, ["train.seed=3"]).exists()


def test_the_whole_chain_is_one_command() -> None:
    from test_config import CONFIGS

    voc = next(path for path in CONFIGS if path.stem == "voc")
    assert reproduce.commands("table5", voc, []) == [f"cpn-fast run {voc}"]
    assert len(reproduce.commands("fig7", voc, [])) == 7  # CPN's own and six grids
