from __future__ import annotations

from pathlib import Path

import pytest

from cpn_fast.files import read_note, replacing, write_json


def test_a_written_file_appears_with_its_folder(tmp_path: Path) -> None:
    with replacing(tmp_path / "new" / "a.bin") as file:
        file.write(b"whole")
        assert not (tmp_path / "new" / "a.bin").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.bin"]
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"whole"


def test_an_interrupted_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with replacing(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("tree", [{"a": [1, None, "é"]}, {"name": "photo\udce9.jpg"}, []])
def test_what_is_written_is_read_again_also_the_names_of_files_that_are_no_text(tmp_path: Path, tree) -> None:
    write_json(tmp_path / "note.json", tree)
    assert read_note(tmp_path / "note.json") == tree


@pytest.mark.parametrize(
    "content",
    [None, b"", b'{"a": 1', b"\xff", b"[" * 100_000],
    ids=["missing", "empty", "cut short", "no text", "too deep"],
)
def test_a_note_that_is_missing_or_damaged_remembers_nothing(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "note.json"
    if content is not None:
        path.write_bytes(content)
    assert read_note(path) is None
