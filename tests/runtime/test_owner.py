from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from several_processes import run_in_processes

from cpn_fast import config_file
from cpn_fast.commands import predict
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.seeds import export_seeds
from cpn_fast.pipelines.shards import pack
from cpn_fast.runtime import owner
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.owner import lock, owned
from cpn_fast.stages import cam, refine, segment, train

HOLD = """
import sys, time
from pathlib import Path
from cpn_fast.runtime.owner import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(600)
"""


@contextmanager
def another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that owns a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_second_is_told_who_owns_a_folder_and_a_dead_owner_s_is_taken_over_at_once(tmp_path: Path) -> None:
    with another(tmp_path / "run") as process:
        said = rf"run: in use by `-c .*/run` \(process {process.pid} of .* since 20"
        with pytest.raises(UserError, match=said), owned(tmp_path / "run"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with owned(tmp_path / "run"):
            assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert not list((tmp_path / "run").iterdir())


def test_the_same_process_may_own_it_again(tmp_path: Path) -> None:
    with owned(tmp_path), owned(tmp_path):
        descriptor = lock(tmp_path / ".lock")
        assert descriptor is None
    descriptor = lock(tmp_path / ".lock")
    assert descriptor is not None
    os.close(descriptor)


def test_parts_of_a_folder_have_owners_of_their_own(tmp_path: Path) -> None:
    with owned(tmp_path, part="table1"), owned(tmp_path, part="table2"), owned(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".table1.lock", ".table2.lock", ".lock"}


def test_who_owns_something_waits_for_more_and_says_for_what(tmp_path: Path, capfd, monkeypatch) -> None:
    """A stage of ``run`` is such an owner: another command must not stop it."""
    monkeypatch.setattr(owner, "SAID_AFTER", 0.2)
    with owned(tmp_path / "run"), another(tmp_path / "run/cams") as process:
        began = time.monotonic()
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
        with owned(tmp_path / "run/cams"):
            assert time.monotonic() - began > 0.5
    said = capfd.readouterr().err
    assert f"Waiting for {tmp_path / 'run/cams'}: it is in use by `-c" in said
    assert said.count("Waiting") == 1


def test_a_file_system_without_locks_is_an_error(tmp_path: Path, monkeypatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = r"\.lock: this file system cannot lock files \(Function not impl"
    with pytest.raises(UserError, match=said), owned(tmp_path):
        pass


def test_a_lock_that_the_disk_refuses_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    def refuse(path: Path, *_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"\.lock: the disk is full.*make room"), owned(tmp_path):
        pass


def test_a_forked_process_owns_nothing(tmp_path: Path) -> None:
    with owned(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        descriptor = lock(tmp_path / ".lock")
        assert descriptor is not None
        os.close(descriptor)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_damaged_name_of_the_owner_is_no_error(tmp_path: Path) -> None:
    descriptor = lock(tmp_path / ".lock")
    assert descriptor is not None
    for content in (b"", b"\xff", b"[]", b'{"command": 1}', b"3"):
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(UserError, match="in use by another process"), owned(tmp_path):
            pass
    (tmp_path / ".lock").write_bytes(b'{"command": "\\u001b[2J", "pid": 1, "user": "", "host": "", "since": ""}')
    with pytest.raises(UserError, match=r"in use by `\?\[2J`"), owned(tmp_path):
        pass
    os.close(descriptor)


def owns(folder: Path) -> str:
    from cpn_fast.runtime import distributed

    try:
        with owned(folder, distributed.join()):
            return "owned"
    except UserError as error:
        return str(error)


def test_under_torchrun_it_is_one_claim(tmp_path: Path) -> None:
    assert run_in_processes(2, owns, tmp_path / "run") == ["owned", "owned"]
    descriptor = lock(tmp_path / "run/.lock")
    first, second = run_in_processes(2, owns, tmp_path / "run")
    assert "in use by another process" in first
    assert first == second
    assert descriptor is not None
    os.close(descriptor)


def test_every_stage_owns_the_folder_that_it_writes_into(tiny_config, small_run: Path, tmp_path: Path) -> None:
    settings = config_file.load(tiny_config())
    val = Path("ImageSets/Segmentation/val.txt")
    samples = load_samples(settings.data, settings.classes, val, labels=True, masks=True)
    weights, seeds, out = small_run / "model.safetensors", small_run / "cams/val/seeds", tmp_path / "out"
    stages: dict[Path, Callable[[], object]] = {
        settings.run: lambda: train.run(settings),
        settings.run / "cams/val": lambda: cam.run(settings, weights, val),
        settings.run / "refine": lambda: refine.run(settings),
        settings.run / "segment/deeplab": lambda: segment.run(settings, settings.data.root / "SegmentationClass"),
        settings.run / "segment/val": lambda: segment.segment(settings, weights, val),
        tmp_path / "seam": lambda: export_seeds(seeds, tmp_path / "seam", "seam"),
        out: lambda: predict.run(small_run, [samples[0].image], out, None),
        tmp_path / "packed": lambda: pack(samples, settings.classes, None, tmp_path / "packed", seed=0, workers=1),
    }
    for folder, stage in stages.items():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = lock(folder / ".lock")
        assert descriptor is not None
        with pytest.raises(UserError, match=f"{folder}: in use by another process"):
            stage()
        assert [path.name for path in folder.iterdir() if path.is_file()] == [".lock"], folder
        os.close(descriptor)
        (folder / ".lock").unlink()
