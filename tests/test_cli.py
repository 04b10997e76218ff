"""Whole commands, run as a user would."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cpn_fast import cli
from cpn_fast.cli import app
from cpn_fast.stages import train


@pytest.fixture
def entered(monkeypatch, capsys):
    """Run the entry point in this process, which has imported everything, and return its output; nothing may raise."""

    def enter(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["cpn-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        message = ended.value.code if isinstance(ended.value.code, str) else ""  # Python prints it and exits with 1
        said = message + "".join(capsys.readouterr())
        assert (1 if message else ended.value.code or 0) == code, said
        return said

    return enter


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_change_nothing(closed: str, small_run: Path, tmp_path: Path) -> None:
    seeds, out = small_run / "cams/val/seeds", tmp_path / "exported"
    command = [sys.executable, "-m", "cpn_fast", "export", str(seeds), str(out), "--form", "seam"]
    done = subprocess.run(["sh", "-c", f"exec {shlex.join(command)} {closed}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in out.glob("*.npy")} == {path.stem for path in seeds.glob("*.npz")}


def test_from_images_and_tags_to_a_score(tiny_config, entered) -> None:
    path = tiny_config(cam={"map": "refined"})
    runs = path.parent / "runs"
    assert "cpn-fast train" in entered("superpixels", path)
    missing = entered("cam", path, code=1)
    assert "model.safetensors: no such file; `cpn-fast train" in missing
    entered("train", path, "--set", "model.weights=nowhere.pth", code=1)  # leaves the folder free for another config
    override = ("--set", "train.data_threads=2")
    said = entered("train", path, *override)
    weights = runs / "tiny" / "model.safetensors"
    assert f"Next: cpn-fast cam {path} --checkpoint {weights} --set train.data_threads=2" in said
    val = Path("ImageSets/Segmentation/val.txt")
    entered("cam", path)
    entered("cam", path, "--checkpoint", runs / "tiny/checkpoints/step-00000006.pt", "--list", val)
    assert "did you mean" in entered("evaluate", path, "--cams", runs / "tiny/cams/train", code=1)
    said = entered("evaluate", path, "--cams", runs / "tiny/cams/train/seeds")
    assert "oracle" in said
    assert f"Next: cpn-fast report {runs / 'tiny'}" in said
    assert str(runs / "tiny") in entered("report", runs, code=1)
    held_out = next((runs / "tiny").rglob("evaluation.json"))
    curve = json.loads(held_out.read_text())
    assert curve
    seeds = runs / "tiny/cams/val/seeds"
    entered("evaluate", path, "--cams", seeds, "--list", val, "--threshold-from", held_out)
    entered("evaluate", path, "--masks", runs / "tiny/cams/val/masks", "--list", val)
    for form in ("cpn", "seam", "irn"):
        assert "4 seeds" in entered("export", seeds, path.parent / form, "--form", form)
    released = path.parent / "released.pth"
    entered("convert", weights, released)
    entered("cam", path, "--checkpoint", released)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "no such config"),
        (["trian", "CONFIG"], "'train'"),
        (["train", "CONFIG", "--ste", "x=1"], "--set"),
        (["reproduce", "table9", "--config", "CONFIG"], "table5"),
        (["export", "nowhere", "there", "--form", "cpm"], "cpn"),
        (["train", "CONFIG", "--set", "train.ephocs=3"], "did you mean epochs?"),
        (["train", "CONFIG", "--set", "data.root=nowhere"], "nowhere"),
        (["cam", "CONFIG", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["cam", "CONFIG", "--checkpoint", "CONFIG"], "tiny.yaml"),
        (["evaluate", "CONFIG", "--cams", "nowhere"], "nowhere"),
        (["evaluate", "CONFIG"], "--masks"),
        (["convert", "nowhere.params", "x.safetensors"], "nowhere.params"),
    ],
)
def test_what_a_user_can_mend_is_said(arguments, message, tiny_config, entered) -> None:
    path = tiny_config()
    code = 2 if message in ("'train'", "--set") else 1  # an error in the command line
    assert message in entered(*[path if argument == "CONFIG" else argument for argument in arguments], code=code)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
        RuntimeError("[/opt/dali/x.cc:1] CUDA allocation failed: out of memory"),  # from DALI
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_full_memory_is_said_with_what_needs_less(error: Exception, tiny_config, entered, monkeypatch) -> None:
    def full(config: object) -> None:
        raise error

    monkeypatch.setattr(train, "run", full)
    said = entered("train", tiny_config(), code=1)
    assert "the memory is full (" in said
    assert "cam.pixels" in said
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        entered("train", tiny_config())


def test_a_process_says_it_on_stderr_without_a_traceback_and_exits_with_1() -> None:
    command = [sys.executable, "-m", "cpn_fast", "train", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: nowhere.yaml: no such config")
    assert "Traceback" not in done.stderr


COMMANDS = [command.callback.__name__.replace("_", "-") for command in app.registered_commands if command.callback]


def test_help_says_what_every_command_and_each_of_its_arguments_is() -> None:
    runner = CliRunner()
    overview = runner.invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    seen = 0
    for name in COMMANDS:
        assert name in overview
        page = runner.invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for line in page.splitlines():
            described = re.fullmatch(r"│ [* ]+ (\S+) +<[^>]+> +(?:\[required\])?(.*)│", line)
            if described:
                seen += 1
                assert described[2].strip(), line
    assert seen > len(COMMANDS)


def test_shells_complete_commands_and_options() -> None:
    def complete(words: str) -> list[str]:
        place = {"_CPN_FAST_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        # A shell calls the installed script, whose name gives typer the variable to read.
        script = Path(sys.executable).with_name("cpn-fast")
        done = subprocess.run([script], env={**os.environ, **place}, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert complete("cpn-fast ev") == ["evaluate"]
    assert complete("cpn-fast cam x.yaml --ch") == ["--checkpoint"]


def test_home_is_expanded_behind_an_equals_sign(tmp_path: Path, entered, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    said = entered("predict", tmp_path / "p.png", "--model=~/no-run", code=1)
    assert f"{tmp_path}/no-run: no such file of weights" in said
    said = entered("predict", tmp_path / "p.png", "--model=~nobody-of-this-name/x", code=1)
    assert "no home folder of ~nobody-of-this-name is known" in said


def test_a_command_that_shares_no_work_is_refused_under_torchrun(tmp_path: Path, entered, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = entered("predict", tmp_path, "--model", tmp_path, code=1)
    assert "predict works in one process, but WORLD_SIZE is 2: start it without torchrun" in said
    assert {command.name or command.callback.__name__ for command in app.registered_commands} > cli.SHARED
