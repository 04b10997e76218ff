from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cpn_fast import cli
from cpn_fast.commands import reproduce
from cpn_fast.runtime import progress
from cpn_fast.runtime.progress import Progress, track


@pytest.fixture(autouse=True)
def _as_before():
    yield
    progress.use("text")


def run(monkeypatch, *arguments: object) -> object:
    """Run a command, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["cpn-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_a_log_gets_a_line_now_and_then_and_no_bar(capfd, monkeypatch) -> None:
    assert list(track(range(5), "short", 5)) == [0, 1, 2, 3, 4]
    assert capfd.readouterr() == ("", "")
    monkeypatch.setitem(progress.EVERY, "text", 0)
    with Progress("long", 9, done=3) as stage:
        stage.advance(2, note="loss 0.5")
    assert capfd.readouterr() == ("", "long 5/9  loss 0.5\n")


def test_a_terminal_gets_a_bar_beside_the_results(capfd, monkeypatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Progress("stage", 4) as stage:
        stage.advance(4, note="loss 0.5")
    out, errors = capfd.readouterr()
    assert out == ""
    assert "4/4" in errors
    assert "loss 0.5" in errors


def test_quiet_leaves_results_and_errors(tiny_config, capfd, monkeypatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert not run(monkeypatch, "--quiet", "superpixels", path := tiny_config())
    out, errors = capfd.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["Superpixels", "Next:"]
    assert errors == ""
    assert "no such config" in str(run(monkeypatch, "--quiet", "train", path.with_name("nowhere.yaml")))


def test_programs_get_json_alone(tiny_config, capfd, monkeypatch) -> None:
    path = tiny_config(train={"steps": 2})
    assert not run(monkeypatch, "--json", "train", path)
    out, errors = capfd.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert {event["event"] for event in events[:-1]} == {"progress"}
    stages: dict[str, list[int]] = {}
    for event in events[:-1]:
        stages.setdefault(event["stage"], []).append(event["done"])
        assert event["done"] <= event["total"]
    assert stages["train tiny"] == [0, 2]
    assert len(stages) == 3  # with the checks and superpixels
    last = events[-1]
    assert (last["event"], last["command"]) == ("done", "train")
    assert last["weights"].endswith("runs/tiny/model.safetensors")
    assert last["next"].startswith("cpn-fast cam")
    assert "Weights are in" in errors

    assert run(monkeypatch, "--json", "train", path, "--set", "train.ephocs=3")
    (event,) = map(json.loads, capfd.readouterr().out.splitlines())
    assert event["event"] == "error"
    assert "did you mean epochs?" in event["message"]
    assert not run(monkeypatch, "--json", "reproduce", "table4", "--config", path, "--commands")
    *commands, last = map(json.loads, capfd.readouterr().out.splitlines())
    assert last == {"event": "done", "command": "reproduce"}
    assert [event["event"] for event in commands] == 5 * ["command"]
    assert [event["command"] for event in commands] == reproduce.commands("table4", path, [])
    assert run(monkeypatch, "--json", "--quiet", "train", path)
    assert sys.stdout is not sys.stderr


def test_scores_are_told_to_programs(tiny_config, small_run, capfd, monkeypatch) -> None:
    seeds, val = small_run / "cams/val/seeds", "ImageSets/Segmentation/val.txt"
    assert not run(monkeypatch, "--json", "evaluate", tiny_config(), "--cams", seeds, "--list", val)
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    (oracle,) = last["results"]
    assert oracle["kind"] == "oracle"
    assert json.loads(Path(last["evaluation"]).read_text())["results"][0]["mean_iou"] == oracle["mean_iou"]


@pytest.mark.parametrize(("world", "said"), [("2", ""), ("1", "stage 4/4\n")])
def test_other_processes_of_torchrun_are_silent(world: str, said: str, capfd, monkeypatch) -> None:
    """A single process reports, even with a RANK that is left over from a job."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setitem(progress.EVERY, "text", 0)
    with Progress("stage", 4) as stage:
        stage.advance(4)
    assert capfd.readouterr() == ("", said)
