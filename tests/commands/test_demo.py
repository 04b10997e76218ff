from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cpn_fast.cli import app
from cpn_fast.commands import demo
from cpn_fast.commands.demo_data import generate


def test_the_demo_leaves_runs_that_can_be_looked_at_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = (
        *("train.steps=2", "train.batch=4", "train.log_every=1", "cam.scales=[1.0]"),
        *(f"{stage}.train.{key}" for stage in ("affinity", "segment") for key in ("steps=1", "batch=4")),
    )
    whole = demo._config
    monkeypatch.setattr(demo, "_config", lambda name, out, *overrides: whole(name, out, *overrides, *short))
    monkeypatch.setattr(demo, "generate", partial(generate, train=8, val=2))

    def cpn_fast(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    said = cpn_fast("demo", "--out", tmp_path)
    assert all(row in said for row in demo.ROWS)
    assert all(stage in said for stage in ("pseudo-masks", "segmenter and CRF"))
    assert (tmp_path / "demo.jpg").exists()
    assert f"Next: cpn-fast report {tmp_path / 'demo'}" in said
    cpn_fast("report", tmp_path / "demo")
    html = (tmp_path / "demo/report.html").read_text()
    assert "cams-train-seeds on train" in html
    assert "cams-val-seeds on val" in html
    photo = next((tmp_path / "data/JPEGImages").iterdir())
    cpn_fast("predict", photo, "--model", tmp_path / "demo", "--out", tmp_path / "masks")
    assert (tmp_path / "masks" / f"{photo.stem}_mask.png").exists()
