from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several_processes import start_command

from cpn_fast import cli, config_file
from cpn_fast.runtime.interrupts import EXIT_CODE, Stopped, acted_on, noted
from cpn_fast.stages import train
from cpn_fast.training import checkpoint


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cpn_fast", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_steps(run: Path, running: Callable[[], bool], count: int) -> None:
    """Wait until the run has logged ``count`` more steps, or its process has ended."""
    log = run / "metrics.jsonl"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    while running() and (not log.exists() or len(log.read_text().splitlines()) < before + count):
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_keeps_it_and_has_an_exit_code_of_its_own(number: int, tiny_config) -> None:
    steps = {"steps": 400, "log_every": 1, "checkpoint_every": 1000}
    settings = config_file.load(path := tiny_config(train=steps))
    process = start(path)
    wait_for_steps(settings.run, lambda: process.poll() is None, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == EXIT_CODE, errors
    (kept,) = (settings.run / "checkpoints").glob("*.pt")
    done = json.loads((settings.run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert int(kept.stem.removeprefix("step-")) == done
    assert f"stopped after step {done} of 400" in errors
    assert "The same command goes on" in errors


def test_a_signal_in_the_last_step_is_not_lost(tiny_config, monkeypatch) -> None:
    settings, write = config_file.load(tiny_config(train={"steps": 1})), checkpoint.write

    def write_in_time(*arguments: Any, **options: Any) -> Path:
        signal.raise_signal(signal.SIGTERM)
        return write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "write", write_in_time)
    with pytest.raises(Stopped, match="stopped after all 1 steps"):
        train.run(settings)
    assert train.run(settings).exists()


def test_a_signal_within_a_finalizer_is_not_lost(capfd) -> None:
    class Slow:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def work() -> None:
        with acted_on():
            Slow()
            time.sleep(10)

    with pytest.raises(Stopped):
        work()
    assert "Traceback" not in capfd.readouterr().err


STOPPED_IN = [
    ("cpn_fast.pipelines.superpixels", "SuperpixelCache._make"),
    ("cpn_fast.stages.cam", "summed_cams"),
    ("cpn_fast.stages.evaluate", "evaluate_cams"),
    ("cpn_fast.stages.refine", "write_label_maps"),
    ("cpn_fast.stages.refine", "walked_scores"),
    ("cpn_fast.stages.segment", "mean_logits"),
]
"""Functions of stages, in the order of a chain."""


def test_a_signal_ends_any_other_stage_in_good_order(short_chain, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "argv", ["cpn-fast", "run", str(short_chain)])
    for (module, name), number in zip(STOPPED_IN, itertools.cycle([signal.SIGTERM, signal.SIGINT]), strict=False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{module}.{name}", lambda *_, number=number, **__: signal.raise_signal(number))
            with pytest.raises(SystemExit) as ended:
                cli.main()
        errors = capfd.readouterr().err
        assert ended.value.code == EXIT_CODE, (module, name)
        assert "stopped; finished files are kept. The same command goes on from there." in errors
        assert "Traceback" not in errors
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert not list(short_chain.parent.rglob("*.tmp"))


def test_killed_again_and_again_it_ends_bit_equal(tiny_config) -> None:
    """SIGKILL comes at random moments: during checks of data, superpixels, steps and checkpoints."""
    steps = {"steps": 12, "log_every": 1, "checkpoint_every": 2}
    expected = load_file(train.run(config_file.load(tiny_config(name="whole", train=steps))))
    settings = config_file.load(path := tiny_config(name="killed", train=steps, superpixels={"cache": "own"}))
    dice = random.Random(0)
    kills = 0
    for _ in range(40):
        process = start_command("train", str(path))
        wait_for_steps(settings.run, process.is_alive, dice.randint(2, 5))
        time.sleep(dice.random() * 0.05)
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    found = load_file(settings.run / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_second_interrupt_acts_at_once_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with noted() as stopping:
        assert not stopping()
        signal.raise_signal(signal.SIGINT)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
