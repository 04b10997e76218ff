from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from typer.main import get_command

from cpn_fast.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_of_keys_is_the_schema() -> None:
    page = runpy.run_path(str(ROOT / "docs/config_reference.py"))["page"]()
    assert (ROOT / "docs/config.md").read_text() == page, "run python docs/config_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    linked = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    missing = [target for target in linked if not (page.parent / target).exists()]
    folders, endings = "cpn_fast|kernels|pipelines|configs|bench|docs|tests", "py|yaml|md|json|txt|png"
    named = re.findall(rf"`((?:{folders})/[\w./-]+\.(?:{endings}))`", text)
    missing += [target for target in named if not (ROOT / target).exists()]
    assert not missing


def test_the_table_of_commands_has_every_command_and_what_it_requires() -> None:
    table = (ROOT / "docs/commands.md").read_text().partition("| Command |")[2].partition("\n\n")[0]
    rows = [command.split() for line in table.splitlines() for command in re.findall("`([^`]+)`", line.split("|")[1])]
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert sorted(name for name, *_ in rows) == sorted(commands)
    for name, *arguments in rows:
        required = {parameter.opts[0] for parameter in commands[name].params if parameter.required}
        assert {option for option in required if option.startswith("--")} <= {*arguments}, name


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1500


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\((\w+\.md)\)", index)) == pages
