from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from cpn_fast.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_is_the_module_with_a_warning(old: str) -> None:
    sys.modules.pop(f"cpn_fast.{old}", None)
    new = importlib.import_module(f"cpn_fast.{MOVED[old]}")
    with pytest.warns(DeprecationWarning, match=rf"cpn_fast\.{old} is now cpn_fast\.{MOVED[old]}"):
        assert importlib.import_module(f"cpn_fast.{old}") is new
    assert new.__spec__ is not None
    assert new.__spec__.name == f"cpn_fast.{MOVED[old]}"


def test_every_way_of_importing_works() -> None:
    script = "import cpn_fast.meter as meter; from cpn_fast.meter import Meter; from cpn_fast import meter as again\n"
    script += "from cpn_fast.training import metrics; assert meter is again is metrics and Meter is metrics.Meter"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_no_module_of_ours_takes_an_old_name() -> None:
    script = "import sys, cpn_fast.cli, cpn_fast.stages.chain, cpn_fast.commands.predict, cpn_fast.commands.reproduce\n"
    script += "from cpn_fast.moved import MOVED; assert not {f'cpn_fast.{old}' for old in MOVED} & sys.modules.keys()"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
