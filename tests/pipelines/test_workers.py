from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpn_fast.config import Superpixels
from cpn_fast.data.dataset import Sample
from cpn_fast.pipelines import slic
from cpn_fast.pipelines.superpixels import SuperpixelCache
from cpn_fast.pipelines.workers import Workers
from cpn_fast.runtime.errors import UserError

SETTINGS = slic.Settings(30, 10.0, 10)


def test_a_worker_has_neither_torch_nor_dali_nor_pydantic() -> None:
    with Workers(1) as workers:
        workers.call("x", slic.segment, np.zeros((9, 9, 3), np.uint8), SETTINGS)
        modules = workers.call("x", eval, "[*__import__('sys').modules]")
        libraries = workers.call("x", eval, "open('/proc/self/maps').read()")
    assert {"numpy", "PIL", "fast_slic"} <= {name.partition(".")[0] for name in modules}
    assert not {"torch", "nvidia", "pydantic", "cv2"} & {name.partition(".")[0] for name in modules}
    assert "libtorch" not in libraries


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGILL, signal.SIGBUS])
def test_a_death_by_signal_names_the_image_and_the_next_call_works(number: signal.Signals) -> None:
    with Workers(1) as workers:
        with pytest.raises(UserError, match=rf"^a/b\.jpg: the process .* was ended by {number.name}\. \w"):
            workers.call("a/b.jpg", signal.raise_signal, number)
        assert workers.call("c.jpg", max, 1, 2) == 2


def test_an_exit_names_the_image() -> None:
    with Workers(1) as workers, pytest.raises(UserError, match=r"^x\.jpg: .* ended with 3"):
        workers.call("x.jpg", os._exit, 3)


def test_exceptions_come_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(b"no image")
    with Workers(1) as workers:
        with pytest.raises(UserError, match=r"x\.jpg: expected a readable image"):
            workers.call(path, slic.png_of_file, path, SETTINGS, 8, "")
        with pytest.raises(ValueError, match="expected uint8"):
            workers.call(path, slic.segment, np.zeros(3), SETTINGS)
        assert workers.call(path, max, 1, 2) == 2


def test_threads_share_the_processes() -> None:
    with Workers(2) as workers, ThreadPoolExecutor(5) as pool:
        assert list(pool.map(lambda number: workers.call("x", max, 0, number), range(40))) == list(range(40))
        assert len(set(pool.map(lambda _: workers.call("x", os.getpid), range(20)))) <= 2


def test_an_image_that_kills_its_worker_stops_the_build_and_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    samples = [Sample(f"image_{number}", tmp_path / f"image_{number}.png", None, None) for number in range(4)]
    for number, sample in enumerate(samples):
        Image.fromarray(np.full((20, 30, 3), number, np.uint8)).save(sample.image)
    cache = SuperpixelCache(tmp_path / "cache", Superpixels(count=30, engine="fast-slic"))
    call = Workers.call

    def call_or_die(self, what, function, *arguments):
        if what == samples[2].image:
            function, arguments = os.abort, ()
        return call(self, what, function, *arguments)

    monkeypatch.setattr(Workers, "call", call_or_die)
    with pytest.raises(UserError, match=r"image_2\.png: .*SIGABRT"):
        cache.build(samples, workers=1)
    assert cache.missing(samples[:3]) == [samples[2]]
    monkeypatch.undo()
    assert cache.build(samples, workers=1) in (1, 2)
    assert cache.missing(samples) == []


PARENT = """
import sys, time; sys.path[:] = {path!r}
from threading import Thread
from cpn_fast.pipelines import slic
from cpn_fast.pipelines.workers import Workers
import os
workers = Workers(2)
first = workers._idle.get()
second = workers._idle.get()
print(first.call("x", os.getpid), second.call("x", os.getpid), flush=True)
Thread(target=first.call, args=("x", time.sleep, 600)).start()  # at work
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(path=sys.path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    numbers = [int(word) for word in parent.stdout.readline().split()]
    assert len(numbers) == 2
    parent.send_signal(number)
    if number == signal.SIGINT:  # the waiting thread keeps this parent alive until its worker is gone
        parent.kill()
    parent.communicate(timeout=300)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and any(is_alive(number) for number in numbers):
        time.sleep(0.05)
    assert not any(is_alive(number) for number in numbers)


def is_alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
