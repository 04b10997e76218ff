from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_killed_in_every_stage_a_chain_ends_bit_equal() -> None:
    """SIGKILL when a stage has written a few files more, whole or half, and a moment later; see kill.py."""
    script = Path(__file__).with_name("kill.py")
    command = [sys.executable, str(script), "--minutes", "0", "--kills", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    kills = re.search(r"1 chains, (\d+) kills", done.stdout)
    assert kills, done.stdout
    assert int(kills[1]) >= 7  # of ten stages, one or another may be through before it is noticed
