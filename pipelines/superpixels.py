"""SLIC superpixels of one image or of a batch of crops, and a cache on disk for a data set.

There are two engines: fast-slic (``slic``), in separate processes (``workers``), and ``cpn_fast.kernels.slic``, in this
process and on its GPU. A cache folder holds ``manifest.json`` and one grayscale PNG per image. The PNG's name and text
chunk ``source`` identify the image by its content, so data sets may share a folder, and a moved image keeps its
superpixels. One process at a time builds a cache (``owner``). A file is complete before it gets its name, so readers
need no lock.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpn_fast.config import Superpixels
from cpn_fast.data.dataset import Sample
from cpn_fast.data.images import UnreadableImage, opened, read_image
from cpn_fast.data.png import is_whole_png
from cpn_fast.data.provenance import image_digest
from cpn_fast.pipelines import slic
from cpn_fast.pipelines.workers import Workers
from cpn_fast.runtime import distributed, reading
from cpn_fast.runtime.errors import UserError, is_unread, unread
from cpn_fast.runtime.files import read_json, remove_partials, replacing, write_json
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.progress import track

if TYPE_CHECKING:
    import torch

FORMAT = 2
"""Version of the maps."""
LAYOUT = 3
"""Version of the folder."""
LONGEST = 128
"""Most bytes of an image's name in its superpixels' name. The rest of a file name's 255 is for the digest."""


def engine(config: Superpixels, device: torch.device | None = None) -> str:
    """Return ``config``'s engine on a device, ``fast-slic`` or ``kernel``. The default device is a GPU if there is one.

    Raises UserError if the config wants fast-slic and it is not installed.
    """
    installed = importlib.util.find_spec("fast_slic") is not None
    if config.engine == "fast-slic" and not installed:
        raise UserError(
            "superpixels.engine is fast-slic, which is not installed: pip install --no-build-isolation fast-slic "
            "(docs/install.md has the flags), or set superpixels.engine to auto or kernel"
        )
    if config.engine == "auto":
        return "fast-slic" if installed and (device or _device()).type == "cpu" else "kernel"
    return config.engine


def described(config: Superpixels) -> str:
    """Return the engine with its version, such as ``fast-slic 0.4.0 (x64/avx2)`` or ``kernel 1 (cpu)``."""
    if engine(config) == "fast-slic":
        return f"fast-slic {_version()} ({_shared(1).call('fast-slic', slic.instruction_set)})"
    return f"kernel {_definition()} ({_device().type})"


def segment(image: np.ndarray, config: Superpixels, device: torch.device | None = None) -> np.ndarray:
    """Segment an image, uint8 RGB (H, W, 3), into superpixels, uint16 (H, W): 4-connected regions, from 0 on.

    The kernel runs on ``device``, by default the process's GPU. Raises ValueError for another kind of array.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 RGB (H, W, 3), found {image.dtype} {image.shape}")
    if engine(config) == "fast-slic":
        return _shared(1).call("an image", slic.segment, image, _settings(config))
    import torch

    pixels = torch.from_numpy(np.array(image)).to(device or _device()).permute(2, 0, 1)
    return _by_kernel(pixels[None], config)[0].cpu().numpy().astype(np.uint16)


def segment_batch(
    images: torch.Tensor, config: Superpixels, processes: int, names: Sequence[object] | None = None
) -> torch.Tensor:
    """Segment RGB images (B, 3, H, W), uint8 or floats from 0 to 255: int32 (B, H, W) on the same device.

    The kernel works on the images' device. fast-slic gets copies on the CPU, in this many ``processes``, which stay for
    the next batch; ``names`` are for its errors.
    """
    if engine(config, images.device) == "kernel" or not len(images):  # of no images, both engines make the same
        return _by_kernel(images, config)
    import torch

    pixels = images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    workers, settings = _shared(processes), _settings(config)
    with ThreadPoolExecutor(processes) as pool:
        named = names or [f"image {number} of a batch" for number in range(len(pixels))]
        maps = pool.map(lambda name, image: workers.call(name, slic.segment, image, settings), named, pixels)
        return torch.from_numpy(np.stack(list(maps)).astype(np.int32)).to(images.device)


def _by_kernel(images: torch.Tensor, config: Superpixels) -> torch.Tensor:
    from cpn_fast import kernels

    return kernels.slic(images, count=config.count, compactness=config.compactness, iterations=config.iterations)


def _device() -> torch.device:
    """Return the device on which this process runs the kernel."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _shared(count: int) -> Workers:
    return Workers(count)


def _settings(config: Superpixels) -> slic.Settings:
    return slic.Settings(config.count, config.compactness, config.iterations)


class SuperpixelCache:
    """A cache of superpixels, one PNG for each image, in ``parent / fast-slic-n200-c10-i10-v3`` or ``kernel-...``.

    PNGs have 8 bits if ``config.count`` is at most 256, otherwise 16 (``dtype``).
    """

    def __init__(self, parent: Path, config: Superpixels) -> None:
        self.config, self.engine = config, engine(config)
        self.folder = parent / f"{self.engine}-n{config.count}-c{config.compactness:g}-i{config.iterations}-v{LAYOUT}"
        self.dtype = np.dtype(np.uint8 if config.count <= 256 else np.uint16)

    @property
    def made_by(self) -> dict[str, Any]:
        """The provenance of all entries: versions and settings. Each entry also depends on its image."""
        made_by = {"fast_slic": _version()} if self.engine == "fast-slic" else {"kernel": _definition()}
        return {"format": FORMAT, **made_by, **dataclasses.asdict(_settings(self.config))}

    def path(self, sample: Sample) -> Path:
        """Return the path of an image's superpixels, ``NAME-DIGEST.png``. The digest is of the image's content.

        Raises UserError for an image that cannot be read.
        """
        name = os.fsencode(Path(sample.id).name)[:LONGEST].decode(errors="ignore")
        return self.folder / f"{name}-{image_digest(sample.image)[:16]}.png"

    def missing(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return samples without an intact entry: absent, unreadable, truncated, or made from another image.

        It compares checksums and decodes nothing (about 0.2 ms for each sample). Raises UserError if the folder was
        built with other parameters or another engine, or if an image cannot be read.
        """
        if not self._has_manifest():
            return list(samples)
        return [sample for sample in samples if not _is_intact(self.path(sample), sample.image)]

    def build(self, samples: Sequence[Sample], workers: int | None = None) -> int:
        """Make the missing entries with ``workers`` processes, by default one for each core. Returns their number.

        It may be interrupted and run again. Several commands may run it at once: one works, the others wait. Under
        torchrun all processes must call it, and each makes its share of the entries. Raises UserError for an unreadable
        image, an image that crashes its process, an unwritable folder, or a folder of other parameters.
        """
        rank = distributed.join()
        if not any(rank.gather(bool(self.missing(rank.share(samples))))):
            if rank.first:
                with suppress(OSError):  # a complete cache may be read-only
                    remove_partials(self.folder)
            return 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with owned(self.folder, rank, waits=True):
                if rank.first:
                    self._claim()
                rank.wait()
                made = self._make(self.missing(rank.share(samples)), workers or rank.cores, rank)
                return sum(rank.gather(made))
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write superpixels: {error}. Set superpixels.cache") from None

    def _has_manifest(self) -> bool:
        path = self.folder / "manifest.json"
        try:
            manifest = read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError) as error:
            if is_unread(error):
                raise unread(path, error) from None
            manifest = f"no readable JSON ({error})"
        if manifest != self.made_by:
            raise UserError(
                f"{path}: expected {self.made_by}, found {manifest}. "
                f"Delete {self.folder} to build it anew, or set superpixels.cache to another folder"
            )
        return True

    def _claim(self) -> None:
        """Write the manifest of a new folder, and remove unfinished files of killed builders."""
        remove_partials(self.folder)
        if self._has_manifest():
            return
        if any(self.folder.glob("*.png")):
            raise UserError(f"{self.folder}: expected manifest.json beside the PNGs, found none. Delete the folder")
        write_json(self.folder / "manifest.json", self.made_by, indent=2)

    def _make(self, samples: Sequence[Sample], count: int, rank: distributed.Rank) -> int:
        distinct = {self.path(sample): sample.image for sample in samples}  # copies of an image share an entry
        bits = 8 * self.dtype.itemsize
        with ExitStack() as stack:
            if self.engine == "fast-slic":
                stage = f"superpixels, fast-slic {_version()}"
                workers = stack.enter_context(Workers(min(count, len(distinct) or 1)))
                settings = _settings(self.config)

                def png(image: Path) -> bytes:
                    return workers.call(image, slic.png_of_file, image, settings, bits, image_digest(image))
            else:
                stage = f"superpixels, {described(self.config)}"
                device = rank.device  # by its number: in a new thread, CUDA's current device is GPU 0

                def png(image: Path) -> bytes:
                    return slic.png(segment(read_image(image), self.config, device), bits, image_digest(image))

            pool = ThreadPoolExecutor(count)
            try:
                futures = [pool.submit(_write, path, image, png) for path, image in distinct.items()]
                for future in track(as_completed(futures), stage, total=len(futures)):
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)
        return len(distinct)


def _write(path: Path, image: Path, png: Callable[[Path], bytes]) -> None:
    if path.exists():
        print(f"Warning: {path} is damaged and made again", file=sys.stderr)
    content = png(image)
    with replacing(path) as file:
        file.write(content)


def _is_intact(path: Path, image: Path) -> bool:
    try:
        content = reading.read_bytes(path, reading.MASK)
        if not is_whole_png(content):
            return False
        with opened(path, io.BytesIO(content)) as png:
            source = png.info.get("source")
    except (OSError, UnreadableImage):
        return False
    return bool(source == image_digest(image))


def _definition() -> int:
    from cpn_fast.kernels.slic_eager import DEFINITION

    return DEFINITION


def _version() -> str:
    return importlib.metadata.version("fast-slic")
