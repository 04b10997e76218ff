"""CAM seeds: one ``.npz`` per image, read without pickle, and exporters to the forms of the released code.

A file ``<id>.npz`` holds arrays:

- ``classes`` uint8 (k,): indices of the present foreground classes, ascending, from 0;
- ``cam`` uint16 (k, H, W): their scores on the unit scale times 65535;
- ``source`` uint8 (65,), where the stage ``cam`` wrote it: as text, what it was made of (``provenance.mark``);
- ``probabilities`` float32 (classes,), likewise: what the network gives each class, tagged or not.

Fixed point errs by at most 1 / 131070 (7.7e-6) everywhere; float16 files, 7 % smaller, by up to 2.4e-4 near 1.
500 x 375 pixels take about 230 kB a class.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpn_fast.data.provenance import archive_digest
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import remove_partials, replacing
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.progress import track

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 65535
"""Steps of the stored fixed point between 0 and 1."""


LARGEST = 2**30
"""Bytes of an array: zeros of a small file may become many. So many hold 8 classes of the largest image."""


@dataclass(frozen=True)
class Seed:
    """CAMs of the classes that an image is tagged with."""

    classes: np.ndarray
    """int64 (k,): foreground indices 0 to K - 1, ascending; k may be 0."""
    cam: np.ndarray
    """float32 (k, H, W) in [0, 1]."""

    def mask(self, threshold: float) -> np.ndarray:
        """uint8 (H, W): i + 1 for the best class i (the lower of equals) if its score exceeds ``threshold``, else 0."""
        if not len(self.classes):
            return np.zeros(self.cam.shape[1:], np.uint8)
        best = (self.classes[self.cam.argmax(0)] + 1).astype(np.uint8)
        best[self.cam.max(0) <= np.float32(threshold)] = 0
        return best


def unit_scale(cam: Tensor) -> Tensor:
    """CAMs summed over scales and flips, (k, H, W), to [0, 1] per class: the released min-max rule, clamped at 0.

    A pixel within 1e-5 of its class's minimum scores 0, so a constant map is all background.
    """
    cam = cam.clamp(min=0)
    low = cam.amin((-2, -1), keepdim=True)
    high = cam.amax((-2, -1), keepdim=True)
    return ((cam - low - 1e-5) / (high - low + 1e-5)).clamp(min=0)


def write_seed(path: Path, seed: Seed, source: str = "", probabilities: np.ndarray | None = None) -> None:
    """Write a seed atomically, with what it was made of and the probability of every class, (classes,) in [0, 1].

    Raises ValueError for classes or scores that the format does not hold.
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
    """Read what ``write_seed`` wrote. Raises UserError for a missing, damaged or foreign file."""
    try:
        with reading.opened(path, reading.SEED) as file, zipfile.ZipFile(file) as archive:
            classes, cam = _member(archive, "classes"), _member(archive, "cam")
    except FileNotFoundError:
        raise UserError(f"{path}: no such seed; `cpn-fast cam` writes them") from None
    except Exception as error:  # a damaged archive can raise almost anything
        raise UserError(_not_a_seed(path, str(error))) from None
    kinds = [classes.dtype, cam.dtype]
    if kinds != [np.uint8, np.uint16] or cam.ndim != 3 or classes.shape != cam.shape[:1]:
        raise UserError(_not_a_seed(path, f"types {kinds}, expected uint8 (k,) and uint16 (k, H, W)"))
    classes = classes.astype(np.int64)
    if not (np.diff(classes) > 0).all():
        raise UserError(_not_a_seed(path, f"classes not ascending: {classes}"))
    return Seed(classes, cam.astype(np.float32) / np.float32(STEPS))


def seed_source(path: Path) -> str | None:
    """What a seed says it was made of; None if it is damaged or says nothing."""
    try:
        with reading.opened(path, reading.SEED) as file, zipfile.ZipFile(file) as archive:
            return _member(archive, "source").tobytes().decode()
    except Exception:  # a damaged archive can raise almost anything
        return None


def seed_probabilities(path: Path) -> np.ndarray | None:
    """The probability of every class, float32 (classes,), without reading scores; None of files that do not say it.

    Raises UserError for a missing or damaged file.
    """
    try:
        with reading.opened(path, reading.SEED) as file, zipfile.ZipFile(file) as archive:
            if "probabilities.npy" not in archive.namelist():
                return None
            found = _member(archive, "probabilities")
    except FileNotFoundError:
        raise UserError(f"{path}: no such seed; `cpn-fast cam` writes them") from None
    except Exception as error:  # a damaged archive can raise almost anything
        raise UserError(_not_a_seed(path, str(error))) from None
    if found.dtype != np.float32 or found.ndim != 1:
        raise UserError(_not_a_seed(path, f"probabilities {found.dtype}{found.shape}, expected float32 (classes,)"))
    return found


def seed_digest(path: Path) -> str:
    """The identity of a seed's content, without reading it. Raises UserError for a missing or damaged file."""
    try:
        return archive_digest(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such seed; `cpn-fast cam` writes them") from None
    except Exception as error:
        raise UserError(_not_a_seed(path, str(error))) from None


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an ``.npz``. Unlike np.load, reserves memory for what is there and not for what a header claims."""
    with archive.open(f"{name}.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is of a newer format")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        content = file.read(LARGEST + 1)  # to the end, where checksums are compared
    if len(content) > LARGEST:
        raise ValueError(f"{name} has more than {LARGEST} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C")


def export_seeds(folder: Path, destination: Path, form: str) -> int:
    """Write every seed of ``folder`` to ``destination/<id>.npy`` as another code base reads it; returns the count.

    - ``cpn``: dict of class index -> float32 (H, W), halved as CPN's ``infer_cam.py`` saves it;
    - ``seam``: the same dict on the unit scale;
    - ``irn``: dict of ``keys`` (int64 tensor), ``cam`` (float32 tensor on the stride-4 grid) and ``high_res``
      (float32 array), divided by each class's maximum + 1e-5.

    These are pickles by nature: other tools read them with ``allow_pickle=True``, nothing here reads them.
    """
    if form not in _FORMS:
        raise UserError(f"unknown form {form!r}: give one of {', '.join(_FORMS)}")
    paths = sorted(folder.rglob("*.npz"))
    if not paths:
        raise UserError(f"{folder}: no CAM seeds (*.npz) there; `cpn-fast cam` writes them")
    with owned(destination):
        places = [(destination / path.relative_to(folder)).with_suffix(".npy") for path in paths]
        remove_partials(*{destination, *(place.parent for place in places)})
        for path, place in track(list(zip(paths, places, strict=True)), f"exporting to {form}", total=len(paths)):
            seed = read_seed(path)
            with replacing(place) as file:
                np.save(file, np.array(_FORMS[form](seed)), allow_pickle=True)
    return len(paths)


def _seam(seed: Seed) -> dict[Any, Any]:
    return {int(index): plane for index, plane in zip(seed.classes, seed.cam, strict=True)}


def _cpn(seed: Seed) -> dict[Any, Any]:
    return {index: plane / 2 for index, plane in _seam(seed).items()}


def _irn(seed: Seed) -> dict[Any, Any]:
    import torch  # here alone: reading seeds must not wait for it

    high = torch.from_numpy(seed.cam)
    high = high / (high.amax((-2, -1), keepdim=True) + 1e-5)
    size = [(side - 1) // 4 + 1 for side in high.shape[-2:]]
    low = high.new_zeros(0, *size)
    if len(high):
        low = torch.nn.functional.interpolate(high[None], size=size, mode="bilinear", align_corners=False)[0]
    return {"keys": torch.from_numpy(seed.classes), "cam": low, "high_res": high.numpy()}


_FORMS = {"cpn": _cpn, "seam": _seam, "irn": _irn}


def _not_a_seed(path: Path, found: str) -> str:
    return f"{path}: damaged, or not a CAM seed of cpn-fast ({found}); delete it and run `cpn-fast cam` again"
