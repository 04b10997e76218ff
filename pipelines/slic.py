"""Superpixels of one image by fast-slic, and the process that makes them, which imports NumPy, Pillow and little else.

A crash of native code ends its process. If pip builds fast-slic with its own copy of libstdc++, it crashes in every
process that has loaded torch's copy. So no training process calls this module; ``workers`` starts separate processes.
"""

from __future__ import annotations

import functools
import io
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cpn_fast.data.images import read_image
from cpn_fast.runtime.errors import UserError

SIDE = 2**15 - 1
"""fast-slic keeps coordinates in 16 bits with a sign (context.cpp, ``cluster_x``)."""
SUM = 2**31 - 1
"""fast-slic keeps the sum of a cluster's coordinates in 32 bits (``cluster_acc_vec``)."""
PADDED = 2**26
"""Pixels of an image with a border of one cluster's size on each side; they take 0.5 GB. At eight times as many pixels
fast-slic's index overflows (simd-helper.hpp, ``AlignedArray``)."""
ROWS = 3
"""fast-slic reads every third row in a round of k-means (``subsample_stride``)."""


@dataclass(frozen=True)
class Settings:
    """The keys of the same names in the config's ``superpixels``."""

    count: int
    compactness: float
    iterations: int


def segment(image: np.ndarray, settings: Settings) -> np.ndarray:
    """Segment an image, uint8 RGB (H, W, 3), into superpixels, uint16 (H, W).

    Labels run from 0 without gaps. Each is one 4-connected region. There are at most ``settings.count`` labels, and
    fewer in images with fewer pixels. The result is the same on every call, thread count and instruction set.

    An image that is too large for fast-slic's integers (``shrink``) is segmented at a half, a third ... of its size,
    and a pixel of that map covers 2 x 2, 3 x 3 ... pixels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 (H, W, 3) with at least one pixel")
    height, width, _ = image.shape
    factor = shrink(height, width, settings.count)
    if factor > 1:
        image = np.asarray(Image.fromarray(image).reduce(factor))
    # More clusters than pixels would make fast-slic divide by a cell side of 0.
    count = min(settings.count, image.shape[0] * image.shape[1])
    slic = _slic()(num_components=count, compactness=settings.compactness, num_threads=1)
    labels = slic.iterate(np.ascontiguousarray(image), settings.iterations).astype(np.uint16)
    if factor > 1:
        labels = labels.repeat(factor, 0)[:height].repeat(factor, 1)[:, :width]
    return labels


def shrink(height: int, width: int, count: int) -> int:
    """Return the smallest integer by which height and width must be divided so that fast-slic can hold the image."""
    factor = 1
    while not _fits(-(-height // factor), -(-width // factor), count):
        factor += 1
    return factor


def _fits(height: int, width: int, count: int) -> bool:
    cell = int((height * width / min(count, height * width)) ** 0.5)
    window = 2 * cell + 1  # side of the square that holds all pixels of a cluster
    members = -(-min(height, window) // ROWS) * min(width, window)
    return (
        max(height, width) <= SIDE
        and (height + 2 * cell) * (width + 2 * cell) <= PADDED
        and members * max(height, width) <= SUM
    )


def png_of_file(path: Path, settings: Settings, bits: int, source: str) -> bytes:
    """Return ``png`` of an image file's superpixels."""
    return png(segment(read_image(path), settings), bits, source)


def png(labels: np.ndarray, bits: int, source: str) -> bytes:
    """Encode superpixels as a gray PNG of 8 or 16 ``bits`` with a text chunk ``source``."""
    text, file = PngInfo(), io.BytesIO()
    text.add_text("source", source)
    Image.fromarray(labels.astype({8: np.uint8, 16: np.uint16}[bits])).save(file, "PNG", pnginfo=text)
    return file.getvalue()


def instruction_set() -> str:
    """Return fast-slic's instruction set in use, such as ``x64/avx2``."""
    return str(_slic().arch_name)


@functools.cache
def _slic() -> Any:
    """Return fast-slic's fastest class on this machine. Imported late: a foreign build may crash on import."""
    from fast_slic import Slic, supported_archs

    if "x64/avx2" not in supported_archs:
        return Slic
    # Then all of fast-slic is compiled for AVX2, even Slic: without AVX2 the process would die of SIGILL.
    if "avx2" not in _cpu_flags():
        raise UserError(
            "fast-slic was built with AVX2, which this CPU lacks. Rebuild it here: pip install --force-reinstall "
            "--no-cache-dir --no-build-isolation --no-deps fast-slic"
        )
    from fast_slic.avx2 import SlicAvx2

    return SlicAvx2


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, flags = line.partition(":")
        if name.strip() == "flags":
            return set(flags.split())
    return set()


def serve(descriptor: int) -> None:
    """Answer requests, (function of this module, arguments), until the other end of the socket is closed.

    An answer is (True, result) or (False, exception). The end of the parent ends this process at once, even in the
    middle of an image. This process ignores Ctrl-C and SIGTERM, which reach all processes of a command; the parent acts
    on them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(descriptor)
    requests: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                requests.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        function, arguments = requests.get()
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, ExceptionWithTraceback(error, error.__traceback__)
        try:
            connection.send(answer)
        except OSError:
            sys.exit()
