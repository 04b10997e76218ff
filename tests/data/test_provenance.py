from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from cpn_fast.data import provenance
from cpn_fast.data.provenance import image_digest
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError


@pytest.fixture(autouse=True)
def remember_at_once(monkeypatch) -> None:
    monkeypatch.setattr(provenance, "SETTLED", -1)
    monkeypatch.setattr(provenance, "_known", {})


def test_every_byte_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    content = bytearray(os.urandom(3 * provenance.CHUNK // 2))
    digests = set()
    for at in (0, 5000, provenance.CHUNK, len(content) - 1):
        content[at] ^= 1
        path.write_bytes(content)
        digests.add(image_digest(path))
    path.write_bytes(content[:-1])
    assert len(digests | {image_digest(path)}) == 5
    assert all(len(digest) == 32 for digest in digests)


def test_a_copy_elsewhere_is_the_same_image(tmp_path: Path) -> None:
    path, copy = tmp_path / "x.jpg", tmp_path / "y.png"
    path.write_bytes(os.urandom(10_000))
    copy.write_bytes(path.read_bytes())
    os.utime(copy, (1, 1))
    assert image_digest(path) == image_digest(copy)


def test_is_read_once_and_again_when_it_changed(tmp_path: Path, monkeypatch) -> None:
    path, other = tmp_path / "x.jpg", tmp_path / "other.jpg"
    path.write_bytes(b"a" * 1000)
    other.write_bytes(b"b" * 1000)
    reads = []
    opened = reading.opened
    monkeypatch.setattr(reading, "opened", lambda *given: reads.append(given) or opened(*given))
    first = image_digest(path)
    assert (image_digest(path), len(reads)) == (first, 1)
    shutil.copystat(path, other)  # same size and modification time, as after `cp -p` or `rsync -t`
    other.replace(path)
    assert image_digest(path) != first
    assert len(reads) == 2


def test_a_file_changed_just_now_is_not_remembered(tmp_path: Path, monkeypatch) -> None:
    """If times are coarse, it may change again without a change of its times."""
    monkeypatch.setattr(provenance, "SETTLED", 3600)
    path = tmp_path / "x.jpg"
    path.write_bytes(b"a")
    image_digest(path)
    assert not provenance._known


@pytest.mark.parametrize("kind", ["missing", "link to nothing", "folder", "fifo", "device"])
def test_what_is_no_file_is_named_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.jpg"
    make = {
        "missing": lambda: None,
        "link to nothing": lambda: path.symlink_to("/nonexistent/x.jpg"),
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    make[kind]()
    with pytest.raises(UserError, match=r"x\.jpg: expected a readable image, found"):
        image_digest(path)


def test_errors_while_reading_name_the_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(b"a")

    class Broken:
        def update(self, chunk: bytes) -> None:
            raise OSError(5, "Input/output error")  # without a name, as from read()

    monkeypatch.setattr(hashlib, "sha256", Broken)
    with pytest.raises(UserError, match=r"x\.jpg.*Input/output error"):
        image_digest(path)
