"""SLIC superpixels (fast-slic): of one image, of a batch of crops, and cached on disk for a data set.

A cache folder holds ``manifest.json`` and one grayscale PNG per image, whose text chunk ``source`` tells which
image file it was made of. Builders take turns (a lock file); files are complete before they get their names, so
readers need no lock.
"""

from __future__ import annotations

import functools
import importlib.metadata
import io
import os
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from cpn_fast import ranks
from cpn_fast.config import Superpixels
from cpn_fast.dataset import Sample
from cpn_fast.errors import UserError
from cpn_fast.files import read_json, remove_partials, replacing, write_json
from cpn_fast.images import is_whole_png, opened
from cpn_fast.progress import track

FORMAT = 2
BEGINNING = 4096  # bytes


def read_image(path: Path, content: bytes | None = None) -> np.ndarray:
    """Decode a file, or ``content`` that ``path`` names, as uint8 RGB (H, W, 3), turned upright by its EXIF tag.

    Of 16 bits the upper 8 are taken. Raises UserError for a missing, truncated or otherwise unreadable file.
    """
    with opened(path, None if content is None else io.BytesIO(content)) as image:
        return upright(image)


def upright(image: Image.Image) -> np.ndarray:
    """Pixels of an opened image as ``read_image`` gives them."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):  # 16 bits of gray, which Pillow would cut off at 255
        turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
    return np.array(turned.convert("RGB"))


def segment(image: np.ndarray, config: Superpixels) -> np.ndarray:
    """Superpixels of an image, uint8 RGB (H, W, 3) -> uint16 (H, W).

    Labels run from 0 without gaps; each is one 4-connected region. There are at most ``config.count`` of them, and
    fewer in images with fewer pixels. The result is the same on every call, thread count and instruction set.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 (H, W, 3) with at least one pixel")
    height, width, _ = image.shape
    # More clusters than pixels would make fast-slic divide by a cell side of 0.
    count = min(config.count, height * width)
    slic = _slic()(num_components=count, compactness=config.compactness, num_threads=1)
    return slic.iterate(np.ascontiguousarray(image), config.iterations).astype(np.uint16)


def segment_batch(images: np.ndarray, config: Superpixels, threads: int) -> np.ndarray:
    """``segment`` for each image of a batch, uint8 RGB (B, H, W, 3) -> int32 (B, H, W)."""
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(lambda image: segment(image, config), images))).astype(np.int32)


def engine() -> str:
    """fast-slic's version and the instruction set in use, such as ``fast-slic 0.4.0 (x64/avx2)``."""
    return f"fast-slic {_version()} ({_slic().arch_name})"


class SuperpixelCache:
    """The superpixels of a data set's images, one PNG per image id, in ``parent / slic-n200-c10-i10-v2``.

    PNGs have 8 bits where ``config.count`` is at most 256, otherwise 16 (``dtype``).
    """

    def __init__(self, parent: Path, config: Superpixels) -> None:
        self.config = config
        self.folder = parent / f"slic-n{config.count}-c{config.compactness:g}-i{config.iterations}-v{FORMAT}"
        self.dtype = np.dtype(np.uint8 if config.count <= 256 else np.uint16)

    @property
    def made_by(self) -> dict[str, Any]:
        """What the entries follow from, beside their images."""
        parameters = {key: getattr(self.config, key) for key in ("count", "compactness", "iterations")}
        return {"format": FORMAT, "fast_slic": _version(), **parameters}

    def path(self, id: str) -> Path:
        """Where the superpixels of an image are. Raises UserError for an id that would leave the folder."""
        if not Path(id).parts or Path(id).is_absolute() or ".." in Path(id).parts[:-1]:
            raise UserError(f"image id {id!r}: expected a name inside the folder")
        return self.folder / f"{id}.png"

    def missing(self, samples: Sequence[Sample]) -> list[Sample]:
        """Samples without an intact entry: absent, unreadable, truncated, or made from a file of another size.

        Compares checksums and decodes nothing (about 0.1 ms each).
        Raises UserError if the folder was built with other parameters or another fast-slic.
        """
        if not self._has_manifest():
            return list(samples)
        return [sample for sample in samples if not _is_intact(self.path(sample.id), sample.image)]

    def build(self, samples: Sequence[Sample], workers: int) -> int:
        """Make the missing entries with ``workers`` threads and return how many there were.

        May be interrupted and run again, and run by several processes at once (one works, the others wait). Under
        torchrun, where all must call it, each process makes its share of them.
        Raises UserError for an unreadable image, an unwritable folder, or a folder of other parameters.
        """
        rank = ranks.join()
        if not any(rank.gather(bool(self.missing(rank.share(samples))))):
            return 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock") if rank.first else nullcontext():  # the first holds it for all
                if rank.first:
                    self._claim()
                rank.wait()
                made = self._make(self.missing(rank.share(samples)), workers)
                return sum(rank.gather(made))
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write superpixels: {error}. Set superpixels.cache") from None

    def _has_manifest(self) -> bool:
        path = self.folder / "manifest.json"
        try:
            found = read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError) as error:
            found = f"no readable JSON ({error})"
        if found != self.made_by:
            raise UserError(
                f"{path}: expected {self.made_by}, found {found}. "
                f"Delete {self.folder} to build it anew, or set superpixels.cache to another folder"
            )
        return True

    def _claim(self) -> None:
        """Write the manifest of a new folder, and remove what killed builders left unfinished."""
        remove_partials(self.folder)
        if self._has_manifest():
            return
        if any(self.folder.glob("*.png")):
            raise UserError(f"{self.folder}: expected manifest.json beside the PNGs, found none. Delete the folder")
        write_json(self.folder / "manifest.json", self.made_by, indent=2)

    def _make(self, samples: list[Sample], workers: int) -> int:
        pool = ThreadPoolExecutor(workers)
        try:
            futures = [pool.submit(self._make_one, sample) for sample in samples]
            for future in track(as_completed(futures), f"superpixels, {engine()}", total=len(futures)):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
        return len(samples)

    def _make_one(self, sample: Sample) -> None:
        if self.path(sample.id).exists():
            print(f"Warning: {self.path(sample.id)} is damaged or of another image, and made again", file=sys.stderr)
        labels = segment(read_image(sample.image), self.config).astype(self.dtype)
        source = PngInfo()
        source.add_text("source", _identity(sample.image))
        with replacing(self.path(sample.id)) as file:
            Image.fromarray(labels).save(file, "PNG", pnginfo=source)


def _is_intact(path: Path, image: Path) -> bool:
    try:
        if not is_whole_png(path.read_bytes()):
            return False
    except OSError:
        return False
    with opened(path) as png:
        return png.info.get("source") == _identity(image)


def _identity(path: Path) -> str:
    """A file's size and a checksum of its beginning, where its EXIF orientation is; copies of a file have the same."""
    with path.open("rb") as file:
        return f"{os.fstat(file.fileno()).st_size} {zlib.crc32(file.read(BEGINNING)):08x}"


def _version() -> str:
    return importlib.metadata.version("fast-slic")


@functools.cache
def _slic() -> Any:
    """fast-slic's fastest class on this machine; imported late since a foreign build may crash on import."""
    from fast_slic import Slic, supported_archs

    if "x64/avx2" not in supported_archs:
        return Slic
    # All of fast-slic is compiled for AVX2 then, Slic too: without AVX2 the process would die of SIGILL.
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise UserError(
            "fast-slic was built with AVX2, which this CPU lacks. Rebuild it here: pip install --force-reinstall "
            "--no-cache-dir --no-build-isolation --no-deps fast-slic"
        )
    from fast_slic.avx2 import SlicAvx2

    return SlicAvx2
