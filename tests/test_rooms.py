"""Imports go one way: a module imports from its folder and from the folders below it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (
    *("cli", "commands", "stages", "training", "methods", "refinement", "models", "pipelines", "kernels", "data"),
    *("config_file", "config", "runtime"),
)
"""From the top to the bottom."""
MODULES = {
    path.relative_to(ROOT / "cpn_fast").with_suffix("").parts: path
    for folder in (ROOT / "cpn_fast").iterdir()
    for path in ([folder] if folder.suffix == ".py" else folder.rglob("*.py"))
    if not path.name.startswith("__") or path.parent != ROOT / "cpn_fast"
}


def imported(path: Path) -> Iterator[str]:
    """Yield the folder or module directly below cpn_fast for every import, at any depth of the code."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "cpn_fast":
            names = [f"cpn_fast.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            if name.startswith("cpn_fast."):
                yield name.split(".")[1]


@pytest.mark.parametrize("parts", MODULES, ids=".".join)
def test_imports_go_down(parts: tuple[str, ...]) -> None:
    level = ORDER.index(parts[0]) if parts[0] in ORDER else len(ORDER)
    for room in imported(MODULES[parts]):
        assert room in ORDER[level:] or room.startswith("__"), f"{'.'.join(parts)} imports {room}, which is above it"


def test_every_module_can_be_imported_first_and_none_brings_dynamo() -> None:
    """Two modules that import each other work in only one order. Dynamo takes more than a second to import."""
    names = sorted(".".join(("cpn_fast", *parts)).removesuffix(".__init__") for parts in MODULES)
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    ours = [n for n in sys.modules if n.startswith('cpn_fast') and '.kernels' not in n]\n"
        "    for loaded in ours:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    finished = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]


def test_contributing_names_every_folder_from_the_top_down() -> None:
    table = re.findall(r"^\| `(?:cpn_fast/)?(\w+)(?:/|\.py)`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [name for name in table if name in ORDER] == list(ORDER)
