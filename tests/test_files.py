from __future__ import annotations

from pathlib import Path

import pytest

from cpn_fast.files import replacing


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
