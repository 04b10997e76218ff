from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_commands_that_are_killed_at_file_events_end_bit_equal_and_leave_nothing() -> None:
    """A few kills of the commands that take least; ``python tests/kill.py`` kills them all."""
    script = str(Path(__file__).with_name("kill.py"))
    names = ("init", "import-coco", "superpixels", "shards", "segment")
    chosen = [word for name in names for word in ("--command", name)]
    done = subprocess.run(
        [sys.executable, script, "--kills", "10", *chosen], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 kills, 0 failures" in done.stdout
    for name in names:
        assert re.search(rf"^{name}: [1-9]\d* kills", done.stdout, re.M), done.stdout
