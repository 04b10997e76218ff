from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

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
    named = re.findall(r"`((?:cpn_fast|kernels|pipelines|configs|bench|docs|tests)/[\w./]+\.(?:py|yaml|md))`", text)
    missing += [target for target in named if not (ROOT / target).exists()]
    assert not missing


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1500


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\((\w+\.md)\)", index)) == pages
