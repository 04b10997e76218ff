from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cpn_fast.runtime import owner, reading
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import (
    claim,
    create,
    read_json,
    read_note,
    remove_partials,
    replacing,
    with_checksum,
    write_json,
)
from cpn_fast.runtime.owner import lock


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


def test_what_is_created_replaces_no_other_content(tmp_path: Path) -> None:
    path = tmp_path / "new/a.bin"
    create(path, b"whole")
    create(path, b"whole")  # as a command does that was killed at its end and is repeated
    for other in (b"other", b"whole and more"):
        path.write_bytes(other)
        with pytest.raises(UserError, match=r"a\.bin: exists already; remove it or choose another name"):
            create(path, b"whole")
        assert path.read_bytes() == other
    assert list(path.parent.iterdir()) == [path]


def test_two_who_create_a_file_at_once_take_turns_and_one_says_for_what_it_waits(tmp_path: Path, monkeypatch) -> None:
    """Two ``convert`` commands behave so: a file is never half written, and never overwrites the other's."""
    path, said = tmp_path / "a.bin", []
    monkeypatch.setattr(owner, "SAID_AFTER", 0.1)
    monkeypatch.setattr(owner, "print", lambda words, **_: said.append(words), raising=False)
    first, second = [b"first" * 100, b"second" * 100]
    with ThreadPoolExecutor() as pool:
        with replacing(path) as file:
            waiting = pool.submit(create, path, second)
            while not said:
                time.sleep(0.01)
            assert not path.exists()
            file.write(first)
        with pytest.raises(UserError, match="exists already"):
            waiting.result()
    assert path.read_bytes() == first
    assert said == [f"Waiting for {path}: it is in use by another process"]


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


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_what_the_disk_refuses_names_the_file_and_keeps_the_old_one(tmp_path: Path, monkeypatch, code: int) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    def write() -> None:
        with replacing(path) as file:
            file.write(b"new")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"a\.npz: cannot be written: .*give the same command again"):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_file_s_error_keeps_its_name(tmp_path: Path) -> None:
    def copy() -> None:
        with replacing(tmp_path / "a.tar") as file:
            file.write((tmp_path / "image.jpg").read_bytes())

    with pytest.raises(UserError, match=r"image\.jpg: No such file"):
        copy()


def test_what_a_killed_process_left_is_written_over_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    left, live = tmp_path / ".a.json.cpn-fast.tmp", tmp_path / ".b.json.cpn-fast.tmp"
    left.write_bytes(b"[" * 9999)
    write_json(tmp_path / "a.json", {})
    assert not left.exists()
    assert read_note(tmp_path / "a.json") == {}
    left.touch()
    (tmp_path / ".of_another_program.json.tmp").touch()
    descriptor = lock(live)
    remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [live.name, ".of_another_program.json.tmp", "a.json"]
    assert descriptor is not None
    os.close(descriptor)


def test_a_name_that_leaves_no_room_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    write_json(path, [1])
    assert read_note(path) == [1]


def test_a_result_in_json_is_compared_with_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_json(path, with_checksum({"mean_iou": 0.61, "name": "photo\udce9.jpg", "by": {1: float("nan")}}))
    assert read_json(path)["mean_iou"] == 0.61
    path.write_text(path.read_text().replace("0.61", "0.71"))
    with pytest.raises(ValueError, match="checksum does not fit"):
        read_json(path)


def test_a_claimed_folder_loses_its_own_files_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    first = claim(tmp_path, {"alpha": 1})
    for name in ("a.png", "deep/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert claim(tmp_path, {"alpha": 1}) == first
    assert (tmp_path / "deep/b.png").exists()
    assert claim(tmp_path, {"alpha": 2}) != first
    assert "made anew, because these have changed: alpha" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_of_unknown_origin_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "drawn_by_hand.png").touch()
    with pytest.raises(UserError, match=r"holds drawn_by_hand\.png, but no made_by\.json"):
        claim(tmp_path, {"alpha": 1})
    assert (tmp_path / "drawn_by_hand.png").exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_note_that_the_system_cannot_read_costs_no_files(tmp_path: Path, monkeypatch, code: int) -> None:
    first = claim(tmp_path, {"alpha": 1})
    (tmp_path / "a.png").touch()

    def refuse(path: str, flags: int) -> int:
        raise OSError(code, os.strerror(code), path)

    with monkeypatch.context() as patched:
        patched.setattr(reading, "_without_waiting", refuse)
        with pytest.raises(UserError, match=r"made_by\.json: cannot be read: .*give the same command again"):
            claim(tmp_path, {"alpha": 1})
    assert (tmp_path / "a.png").exists()
    assert claim(tmp_path, {"alpha": 1}) == first
