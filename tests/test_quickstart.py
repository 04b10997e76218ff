"""docs/quickstart.ipynb runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs/quickstart.ipynb"


def shown(notebook: nbformat.NotebookNode) -> list[set[str]]:
    """Return the kinds of each cell's outputs, such as image/jpeg. An error is a kind too."""
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    return [{kind for output in cell for kind in output.get("data", {output.output_type: ""})} for cell in outputs]


def test_the_quickstart_runs_and_shows_what_it_was_committed_with(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed, notebook = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    folder = tmp_path / "notebook"
    folder.mkdir()
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
    ).execute()  # raises a cell's error
    for cell in notebook.cells:  # drop progress, which only slow machines print
        cell["outputs"] = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    assert shown(notebook) == shown(committed)
    assert sum("image/jpeg" in kinds for kinds in shown(notebook)) == 2


def test_the_quickstart_is_small_and_shows_no_machines_paths() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    assert "/home/" not in text
    assert "/tmp/" not in text
