"""CAM seeds: one ``.npz`` per image, read without pickle, and exporters to the formats of the released code.

A file ``<id>.npz`` holds arrays:

- ``classes`` uint8 (k,): indices of the present foreground classes, ascending, from 0;
- ``cam`` uint16 (k, H, W): their scores on the unit scale times 65535;
- ``source`` uint8 (65,), only from the stage ``cam``: the provenance as text (``provenance.mark``);
- ``probabilities`` float32 (classes,), only from the stage ``cam``: the network's probability of each class, tagged or
  not.

Fixed point has an error of at most 1 / 131070 (7.7e-6) everywhere. float16 would make files 7 % smaller, with an error
of up to 2.4e-4 near 1. 500 x 375 pixels take about 230 kB a class.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpn_fast.data.provenance import archive_digest
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, is_unread, unread
from cpn_fast.runtime.files import claim, remove_partials, replacing
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.progress import track

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 65535
"""Steps of the stored fixed point between 0 and 1."""


LARGEST = 2**30
"""Most bytes of an array: a small file can expand to many zeros. It is enough for 8 classes of the largest image."""


@dataclass(frozen=True)
class Seed:
    """CAMs of the classes of an image's tags."""

    classes: np.ndarray
    """int64 (k,): foreground indices 0 to K - 1, ascending; k may be 0."""
    cam: np.ndarray
    """float32 (k, H, W) in [0, 1]."""

    def mask(self, threshold: float) -> np.ndarray:
        """Return uint8 (H, W): i + 1 if the score of the best class i exceeds ``threshold``, else 0.

        Of equal classes the lowest is the best.
        """
        if not len(self.classes):
            return np.zeros(self.cam.shape[1:], np.uint8)
        best = (self.classes[self.cam.argmax(0)] + 1).astype(np.uint8)
        best[self.cam.max(0) <= np.float32(threshold)] = 0
        return best


def unit_scale(cam: Tensor) -> Tensor:
    """Scale CAMs, summed over scales and flips, (k, H, W), to [0, 1] per class: the released min-max rule.

    CAMs are clamped at 0. A pixel within 1e-5 of its class's minimum scores 0, so a constant map is all background.
    """
    cam = cam.clamp(min=0)
    low = cam.amin((-2, -1), keepdim=True)
    high = cam.amax((-2, -1), keepdim=True)
    return ((cam - low - 1e-5) / (high - low + 1e-5)).clamp(min=0)


def write_seed(path: Path, seed: Seed, source: str = "", probabilities: np.ndarray | None = None) -> None:
    """Write a seed atomically, with its provenance and the probability of every class, (classes,) in [0, 1].

    Raises ValueError for classes or scores that the format cannot hold.
    """
    classes, cam = seed.classes, seed.cam
    if cam.ndim != 3 or classes.shape != cam.shape[:1]:
        raise ValueError(f"{path}: classes {classes.shape} and cam {cam.shape} are not (k,) and (k, H, W)")
    if not ((classes >= 0) & (classes < 255)).all() or not (np.diff(classes) > 0).all():
        raise ValueError(f"{path}: classes are not ascending indices from 0 to 254: {classes}")
    if not ((cam >= 0) & (cam <= 1)).all():
        raise ValueError(f"{path}: scores outside [0, 1] or NaN")
    arrays = {"classes": classes.astype(np.uint8), "cam": np.rint(cam * STEPS).astype(np.uint16)}
    if source:
        arrays["source"] = np.frombuffer(source.encode(), np.uint8)
    if probabilities is not None:
        arrays["probabilities"] = probabilities.astype(np.float32)
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


def read_seed(path: Path) -> Seed:
    """Read a seed that ``write_seed`` wrote. Raises UserError for a missing, damaged or foreign file."""
    with _explained(path), reading.opened(path, reading.SEED) as file, zipfile.ZipFile(file) as archive:
        classes, cam = _member(archive, "classes"), _member(archive, "cam")
    kinds = [classes.dtype, cam.dtype]
    if kinds != [np.uint8, np.uint16] or cam.ndim != 3 or classes.shape != cam.shape[:1]:
        raise UserError(_not_a_seed(path, f"types {kinds}, expected uint8 (k,) and uint16 (k, H, W)"))
    classes = classes.astype(np.int64)
    if not (np.diff(classes) > 0).all():
        raise UserError(_not_a_seed(path, f"classes not ascending: {classes}"))
    return Seed(classes, cam.astype(np.float32) / np.float32(STEPS))


def seed_source(path: Path) -> str | None:
    """Return the provenance in a seed, or None if the file is damaged or has none.

    Raises UserError if the system cannot read it: an outdated seed must not pass for one without provenance.
    """
    try:
        with reading.opened(path, reading.SEED) as file, zipfile.ZipFile(file) as archive:
            return _member(archive, "source").tobytes().decode()
    except Exception as error:  # a damaged archive can raise almost anything
        if is_unread(error):
            raise unread(path, error) from None
        return None


def seed_probabilities(path: Path) -> np.ndarray | None:
    """Read the probability of every class, float32 (classes,), without the scores. None if the file has none.

    Raises UserError for a missing or damaged file.
    """
    with _explained(path), reading.opened(path, reading.SEED) as file, zipfile.ZipFile(file) as archive:
        if "probabilities.npy" not in archive.namelist():
            return None
        probabilities = _member(archive, "probabilities")
    if probabilities.dtype != np.float32 or probabilities.ndim != 1:
        kind = f"{probabilities.dtype}{probabilities.shape}"
        raise UserError(_not_a_seed(path, f"probabilities {kind}, expected float32 (classes,)"))
    return probabilities


def seed_digest(path: Path) -> str:
    """Return a digest of a seed's content without reading it. Raises UserError for a missing or damaged file."""
    with _explained(path):
        return archive_digest(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn any error of reading a seed into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such seed; `cpn-fast cam` writes seeds") from None
    except Exception as error:  # a damaged archive can raise almost anything
        if is_unread(error):
            raise unread(path, error) from None
        raise UserError(_not_a_seed(path, str(error))) from None


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array of an ``.npz``. Unlike np.load, reserve memory for the actual bytes, not for the header's claim."""
    with archive.open(f"{name}.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is of a newer format")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        content = file.read(LARGEST + 1)  # up to the end: only there zipfile checks the checksum
    if len(content) > LARGEST:
        raise ValueError(f"{name} has more than {LARGEST} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C")


def export_seeds(folder: Path, destination: Path, form: str) -> int:
    """Write every seed of ``folder`` to ``destination/<id>.npy`` in the ``form`` of another code base.

    Returns the number of seeds. Raises UserError for an unknown form and for missing or damaged seeds.

    - ``cpn``: dict of class index -> float32 (H, W), halved as CPN's ``infer_cam.py`` saves it;
    - ``seam``: dict of class index -> float32 (H, W) on the unit scale;
    - ``irn``: dict of ``keys`` (int64 tensor), ``cam`` (float32 tensor on the stride-4 grid) and ``high_res``
      (float32 array), divided by each class's maximum + 1e-5.

    These files are pickles: other tools read them with ``allow_pickle=True``. cpn-fast never reads them.
    """
    if form not in _FORMS:
        raise UserError(f"unknown form {form!r}: give one of {', '.join(_FORMS)}")
    paths = sorted(folder.rglob("*.npz"))
    if not paths:
        raise UserError(f"{folder}: no CAM seeds (*.npz) there; `cpn-fast cam` writes seeds")
    with owned(destination):
        claim(destination, {"form": form}, ("**/*.npy",))
        targets = [(destination / path.relative_to(folder)).with_suffix(".npy") for path in paths]
        remove_partials(*{destination, *(target.parent for target in targets)})
        for path, target in track(list(zip(paths, targets, strict=True)), f"exporting to {form}", total=len(paths)):
            seed = read_seed(path)
            with replacing(target) as file:
                np.save(file, np.array(_FORMS[form](seed)), allow_pickle=True)
    return len(paths)


def _seam(seed: Seed) -> dict[Any, Any]:
    return {int(index): plane for index, plane in zip(seed.classes, seed.cam, strict=True)}


def _cpn(seed: Seed) -> dict[Any, Any]:
    return {index: plane / 2 for index, plane in _seam(seed).items()}


def _irn(seed: Seed) -> dict[Any, Any]:
    import torch  # not at the top: reading seeds must not wait for it

    high = torch.from_numpy(seed.cam)
    high = high / (high.amax((-2, -1), keepdim=True) + 1e-5)
    size = [(side - 1) // 4 + 1 for side in high.shape[-2:]]
    low = high.new_zeros(0, *size)
    if len(high):
        low = torch.nn.functional.interpolate(high[None], size=size, mode="bilinear", align_corners=False)[0]
    return {"keys": torch.from_numpy(seed.classes), "cam": low, "high_res": high.numpy()}


_FORMS = {"cpn": _cpn, "seam": _seam, "irn": _irn}


def _not_a_seed(path: Path, reason: str) -> str:
    return f"{path}: damaged, or not a CAM seed of cpn-fast ({reason}); delete it and run `cpn-fast cam` again"
