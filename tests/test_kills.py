from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import kill
import yaml

from cpn_fast import config_file
from cpn_fast.cli import app


def test_commands_that_are_killed_at_file_events_end_bit_equal_and_leave_nothing() -> None:
    """Kill the fastest commands a few times; ``python tests/kill.py`` kills all commands."""
    names = ("init", "import-coco", "superpixels", "shards", "segment")
    chosen = [word for name in names for word in ("--command", name)]
    command = [sys.executable, str(Path(kill.__file__)), "--kills", "10", *chosen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 kills, 0 failures" in done.stdout
    for name in names:
        assert re.search(rf"^{name}: [1-9]\d* kills", done.stdout, re.M), done.stdout


def test_every_command_that_writes_can_be_killed() -> None:
    known = {command.words.split()[0] for command in kill.COMMANDS.values()}
    callbacks = [command.callback for command in app.registered_commands if command.callback is not None]
    assert {callback.__name__.replace("_", "-") for callback in callbacks} - {"doctor"} == known


def test_the_configs_of_the_killed_commands_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(kill.CONFIG))
    for command in kill.COMMANDS.values():
        words = command.words.split()
        config_file.load(path, [words[at + 1] for at, word in enumerate(words) if word == "--set"])
