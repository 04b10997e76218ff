"""All readers: for every kind of file a reader ends at once and names the file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors
import torch

from cpn_fast import config_file
from cpn_fast.commands import import_coco, report
from cpn_fast.commands.trained_model import load
from cpn_fast.config import Data, Superpixels
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.images import read_image
from cpn_fast.data.labels import listed_in, read_labels
from cpn_fast.data.masks import mask_source, read_mask
from cpn_fast.data.provenance import image_digest
from cpn_fast.data.seeds import read_seed, seed_digest, seed_source
from cpn_fast.models.weights import is_whole, note_of, read_weights
from cpn_fast.pipelines.decode import read_encoded
from cpn_fast.pipelines.superpixels import SuperpixelCache
from cpn_fast.runtime import files, owner, reading
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import evaluate
from cpn_fast.training import checkpoint

CLASSES = ("cat", "dog")


def in_a_list(path: Path) -> None:
    load_samples(Data(root=path.parent), CLASSES, Path(path.name), labels=False, masks=False)


def as_base(path: Path) -> None:
    other = path.with_name("other.yaml")
    other.write_text(f"base: {path.name}\n")
    config_file.load(other)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "image": ("a.jpg", read_image),
    "image on its way to DALI": ("a.jpg", read_encoded),
    "identity of an image": ("a.jpg", image_digest),
    "mask": ("a.png", read_mask),
    "list": ("list.txt", in_a_list),
    "list that is a table": ("list.csv", lambda path: listed_in(path, ["a"])),
    "VOC XML": ("a.xml", lambda path: read_labels(path.parent, ["a"], CLASSES)),
    "CSV": ("a.csv", lambda path: read_labels(path, ["a"], CLASSES)),
    "JSON": ("a.json", lambda path: read_labels(path, ["a"], CLASSES)),
    "cls_labels.npy": ("a.npy", lambda path: read_labels(path, ["a"], CLASSES)),
    "config": ("a.yaml", config_file.load),
    "base of a config": ("a.yaml", as_base),
    "COCO's instances": ("a.json", import_coco._read),
    "seed": ("a.npz", read_seed),
    "identity of a seed": ("a.npz", seed_digest),
    "source of a mask": ("a.png", mask_source),
    "trained model": ("model.safetensors", lambda path: load(path.parent, "cpu")),
    "evaluation": ("evaluation.json", lambda path: evaluate.held_out_threshold(path, [])),
    "result": ("a.json", files.read_json),
    "checkpoint": ("a.pt", lambda path: checkpoint.read(path, torch.device("cpu"))),
    **{f"weights {end}": (f"a{end}", read_weights) for end in (".safetensors", ".pth", ".pt", ".params")},
}


def unreadable(path: Path) -> None:
    path.write_bytes(b"x")
    path.chmod(0)


def too_large(path: Path) -> None:
    path.touch()
    os.truncate(path, reading.WEIGHTS + 1)


KINDS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "a file that may not be read": unreadable,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "an empty file": Path.touch,
    "a file too large for its kind": too_large,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.fixture(autouse=True)
def in_a_minute() -> Iterator[None]:
    """Fail after a minute instead of a hang, as from opening a FIFO. A reader takes milliseconds."""

    def late(*_: object) -> None:
        raise AssertionError("still at it")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


SOUND = {
    *(("VOC XML", "a link to nothing"), ("CSV", "an empty file"), ("list that is a table", "an empty file")),
    *((reader, "a folder") for reader in ("CSV", "JSON", "cls_labels.npy", "list that is a table")),
}
"""Sources without the image's file or line, which the data set reports, or a folder, which is VOC XML."""


@pytest.fixture(autouse=True)
def without_privileges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse files without permission to read even for root, who may read every file."""
    open_at_once = reading._without_waiting

    def refuse(path: str, flags: int) -> int:
        if not os.stat(path).st_mode & 0o444:  # noqa: PTH116
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return open_at_once(path, flags)

    monkeypatch.setattr(reading, "_without_waiting", refuse)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_names_what_is_no_file_of_its_kind(reader: str, kind: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "JPEGImages").mkdir()
    KINDS[kind](folder / name)
    if (reader, kind) in SOUND:
        assert not read(folder / name)
    elif reader in ("identity of an image", "source of a mask") and kind == "an empty file":
        read(folder / name)
    else:
        with pytest.raises((UserError, OSError, ValueError)) as error:
            read(folder / name)
        if isinstance(error.value, UserError):
            assert name in str(error.value)
        elif isinstance(error.value, OSError):  # the command line prints the file's name of this error
            assert name in str(error.value.filename)


@pytest.mark.parametrize("kind", KINDS)
def test_who_asks_what_a_file_remembers_gets_an_answer_at_once(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "a")
    for read in (seed_source, files.read_note):
        if kind == "a file that may not be read":  # it may be whole
            with pytest.raises(UserError, match="a: cannot be read: Permission denied"):
                read(tmp_path / "a")
        else:
            assert read(tmp_path / "a") is None
    assert owner._owner(tmp_path / "a") == "another process"


def test_a_run_whose_weights_or_config_are_no_file_is_named(small_run: Path, tmp_path: Path) -> None:
    """The error does not call it missing."""
    for name in ("model.safetensors", "config.yaml"):
        run = tmp_path / name
        shutil.copytree(small_run, run)
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises((UserError, OSError), match="a FIFO, where a regular file is expected"):
            report.run(run)


@pytest.mark.parametrize("reader", ["seed", "source of a seed", "checkpoint", "superpixels", "weights", "note"])
def test_what_the_system_cannot_read_is_not_taken_for_damage(
    reader: str, small_run: Path, tmp_path: Path, monkeypatch
) -> None:
    """Else a retried command would make it again, or its message would say to delete it."""
    seed = next(small_run.glob("cams/*/seeds/*.npz"))
    checkpoints, final = small_run / "checkpoints", small_run / "model.safetensors"
    cache = SuperpixelCache(tmp_path, Superpixels(count=30))
    cache.folder.mkdir()
    (cache.folder / "manifest.json").write_text(json.dumps(cache.made_by))
    read: dict[str, Callable[[], object]] = {
        "seed": lambda: read_seed(seed),
        "source of a seed": lambda: seed_source(seed),
        "checkpoint": lambda: checkpoint.newest(checkpoints, torch.device("cpu")),
        "superpixels": lambda: cache.missing([]),
        "weights": lambda: is_whole(final),
        "note": lambda: note_of(final),
    }

    def refuse(path: str, *_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    def refuse_without_number(path: Path, framework: str) -> None:
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: Too many open files (24)")

    read[reader]()
    if reader in ("weights", "note"):
        monkeypatch.setattr(safetensors, "safe_open", refuse_without_number)
    else:
        monkeypatch.setattr(reading, "_without_waiting", refuse)
    with pytest.raises(UserError, match=r": cannot be read: .*Too many open files.*give the same") as error:
        read[reader]()
    assert "delete" not in str(error.value).lower()


def test_a_file_that_grows_is_read_as_it_was_when_it_was_opened(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"x" * 100)
    fstat = os.fstat

    def before_it_grows(descriptor: int) -> os.stat_result:
        found = fstat(descriptor)
        with path.open("ab") as file:
            file.write(b"y" * 10)
        return found

    monkeypatch.setattr(os, "fstat", before_it_grows)
    assert reading.read_bytes(path, 1000) == b"x" * 100 + b"y" * 10  # it grew once more after its size was read


def test_an_xml_of_three_million_pieces_takes_no_minutes(tmp_path: Path) -> None:
    """expat delivers each line end separately. Appending them to a text took quadratic time."""
    name = "cat" + "\n" * 3_000_000
    (tmp_path / "a.xml").write_text(f"<annotation><object><name>{name}</name></object></annotation>")
    assert read_labels(tmp_path, ["a"], CLASSES)["a"].tolist() == [True, False]
