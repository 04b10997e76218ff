"""The hook that gets every line of metrics.jsonl."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from several_processes import run_in_processes

from cpn_fast import config, config_file
from cpn_fast.commands import doctor
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import chain, train
from cpn_fast.training import hook

PLAIN = {"method": "cam", "model": {"pcm": False, "prcm": False}, "cam": {"map": "raw"}}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the lines that ``logger.backend:log`` gets."""
    lines: list[dict[str, Any]] = []

    def log(line: dict[str, Any]) -> None:
        lines.append(dict(line))
        line.clear()  # the function owns its line

    package, module = types.ModuleType("logger"), types.ModuleType("logger.backend")
    module.log = log  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "logger", package)
    monkeypatch.setitem(sys.modules, "logger.backend", module)
    hook.load.cache_clear()
    return lines


def lines_of(settings: config.Config) -> list[dict[str, Any]]:
    told = {"run": settings.name, "stage": "train"}
    return [told | json.loads(line) for line in (settings.run / "metrics.jsonl").read_text().splitlines()]


def test_the_hook_gets_every_line_with_run_and_stage(told, tiny_config) -> None:
    settings = config_file.load(tiny_config(**PLAIN, hook="logger.backend:log"))
    train.run(settings)
    assert [line["step"] for line in told] == [2, 4, 6]
    assert told == lines_of(settings)
    train.run(settings)  # the run is finished
    assert len(told) == 3


def test_a_finished_run_gives_its_lines_to_a_hook_that_comes_later(told, tiny_config) -> None:
    settings = config_file.load(tiny_config(**PLAIN))
    train.run(settings)
    train.run(config_file.load(tiny_config(**PLAIN, hook="logger.backend:log")))
    assert told == lines_of(settings)


def test_a_continued_run_gives_no_line_twice(told, tiny_config, monkeypatch) -> None:
    settings = config_file.load(tiny_config(**PLAIN, hook="logger.backend:log", train={"log_every": 1}))

    class Killed(Exception):
        pass

    real, dying = hook.Hook.give, 0

    def give_then_die(self, lines) -> None:
        real(self, lines)
        if [line["step"] for line in lines][-1:] == [dying]:
            raise Killed

    monkeypatch.setattr(hook.Hook, "give", give_then_die)
    for last in (5, 4):  # the checkpoint is of step 3; in round two the file ends before the lines that the hook got
        dying = last
        with pytest.raises(Killed):
            train.run(settings)
    assert [line["step"] for line in told] == [1, 2, 3, 4, 5]
    monkeypatch.undo()
    train.run(settings)
    assert [line["step"] for line in told] == [1, 2, 3, 4, 5, 6]


def test_lines_wait_while_the_hook_fails(tiny_config, tmp_path, capsys) -> None:
    """A server may be away for a while."""
    file = tmp_path / "server.py"
    file.write_text(
        "taken, tries = [], 0\n"
        "def log(line):\n"
        "    global tries\n"
        "    tries += 1\n"
        "    if 2 <= tries <= 3:\n"
        "        raise ConnectionError('no route')\n"
        "    taken.append(line['step'])\n"
    )
    name = f"{file}:log"
    train.run(config_file.load(tiny_config(**PLAIN, hook=name, train={"log_every": 1})))
    assert hook.load(name).__globals__["taken"] == [1, 2, 3, 4, 5, 6]
    said = capsys.readouterr().err
    assert said.count("Warning") == 1  # one warning for an outage
    assert f"hook {name} failed at step 2: ConnectionError: no route ({file}, line 6)" in said


def test_a_hook_that_never_works_does_not_end_the_training(tiny_config, tmp_path, capsys) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def log(line):\n    line['no such figure']\n")
    settings = config_file.load(tiny_config(**PLAIN, hook=f"{file}:log"))
    assert train.run(settings).is_file()
    assert not (settings.run / "hook.json").exists()
    said = capsys.readouterr().err
    assert "failed at step 2: KeyError: 'no such figure'" in said
    assert "has not taken 3 lines, from step 2 on" in said

    file.write_text("def log(line):\n    print('got', line['step'])\n")
    hook.load.cache_clear()
    train.run(settings)  # the same command
    assert capsys.readouterr().out.split() == ["got", "2", "got", "4", "got", "6"]


def test_a_hook_that_ends_the_program_does_not_end_the_training(tiny_config, tmp_path, capsys) -> None:
    file = tmp_path / "ending.py"
    file.write_text("import sys\ndef log(line):\n    sys.exit()\n")
    assert train.run(config_file.load(tiny_config(**PLAIN, hook=f"{file}:log"))).is_file()
    assert "failed at step 2: SystemExit" in capsys.readouterr().err


def test_a_file_may_have_the_name_of_a_package_that_it_imports(tmp_path) -> None:
    file = tmp_path / "colorsys.py"
    file.write_text("import colorsys\ndef log(line):\n    return colorsys.rgb_to_hsv(1, 0, 0)\n")
    sys.modules.pop("colorsys", None)
    assert hook.load(f"{file}:log")({}) == (0.0, 1.0, 1)


def test_a_file_may_hold_dataclasses(tmp_path) -> None:
    file = tmp_path / "with_dataclass.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Line:\n    step: int\ndef log(line):\n    return Line(line['step'])\n"
    )
    assert repr(hook.load(f"{file}:log")({"step": 3})) == "Line(step=3)"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("{folder}/later.py:log", "later.py:log is async, and nothing would wait for it"),
        ("no_such_module:log", "hook: no_such_module:log cannot be imported: ModuleNotFoundError"),
        ("nowhere/hook.py:log", "hook.py is no file"),
        ("logger.backend:lag", "hook: logger.backend has no function lag; its functions are log"),
        ("{folder}/faulty.py:log", "faulty.py:log cannot be imported: ZeroDivisionError"),
        ("{folder}/ending.py:log", "ending.py:log cannot be imported: SystemExit"),
        ("{folder}/two.py:log", "must take one argument, the line as a dict"),
        ("{folder}/two:log", "did you mean {folder}/two.py:log?"),
    ],
)
def test_a_wrong_name_is_said_before_the_first_step(name, expected, told, tiny_config, tmp_path) -> None:
    (tmp_path / "faulty.py").write_text("1 / 0\n")
    (tmp_path / "ending.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "later.py").write_text("async def log(line): ...\n")
    (tmp_path / "two.py").write_text("def log(line, step): ...\n")
    settings = config_file.load(tiny_config(**PLAIN, hook=name.format(folder=tmp_path)))
    for begin in (train.run, lambda settings: chain.check(settings, 1)):
        with pytest.raises(UserError) as caught:
            begin(settings)
        assert expected.format(folder=tmp_path) in str(caught.value)
    assert not (settings.run / "config.yaml").exists()
    found = doctor.examine(lambda: doctor.hook(settings))
    assert found.state == "broken"


@pytest.mark.parametrize("name", ["log", "logger:", ":log", "logger:log()", "logger.log", ""])
def test_what_names_no_function_is_no_value_of_the_key(name, tiny_config) -> None:
    with pytest.raises(UserError, match=r"hook: expected package.module:function or FILE.py:function, found"):
        config_file.load(tiny_config(hook=name))


def test_the_hook_may_change_in_a_run_and_gets_the_lines_before(told, tiny_config, tmp_path) -> None:
    (tmp_path / "other.py").write_text("taken = []\ndef log(line):\n    taken.append(line['step'])\n")
    other = f"{tmp_path}/other.py:log"
    train.run(config_file.load(tiny_config(**PLAIN, hook="logger.backend:log")))
    train.run(config_file.load(tiny_config(**PLAIN, hook=other)))
    assert hook.load(other).__globals__["taken"] == [2, 4, 6]


def trained(path: Path, folder: Path) -> list[str]:
    train.run(config_file.load(path))
    return sorted(file.name for file in folder.glob("told-*"))


def test_of_several_processes_the_first_alone_calls_the_hook(tiny_config, tmp_path) -> None:
    (tmp_path / "ranks.py").write_text(
        "import os\nfrom pathlib import Path\n"
        "def log(line):\n"
        "    Path(__file__).with_name(f\"told-{os.environ['RANK']}-{line['step']}\").touch()\n"
    )
    path = tiny_config(**PLAIN, hook=f"{tmp_path}/ranks.py:log")
    run_in_processes(2, trained, path, tmp_path)
    assert sorted(file.name for file in tmp_path.glob("told-*")) == ["told-0-2", "told-0-4", "told-0-6"]
