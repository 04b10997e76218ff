"""Training checkpoints: written atomically, readable with ``weights_only=True``.

Shuffling, augmentation, hiding and dropout all follow from (seed, step). So the step also restores the random
generators and the data pipeline.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, is_unread, unread
from cpn_fast.runtime.files import replacing

_NAME = re.compile(r"step-([0-9]{8,})\.pt")


def write(
    folder: Path,
    step: int,
    *,
    keep: int,
    model: dict[str, Any],
    optimizer: dict[str, Any],
    scaler: dict[str, Any],
    config: str,
) -> Path:
    """Write ``step-NNNNNNNN.pt`` atomically; remove all checkpoints but the newest ``keep``."""
    path = folder / f"step-{step:08d}.pt"
    with replacing(path) as file:
        state = {"step": step, "model": model, "optimizer": optimizer, "scaler": scaler, "config": config}
        torch.save(state, file)
    prune(folder, keep)
    return path


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints. ``write`` does so too, unless it is killed before."""
    for old in existing(folder)[keep:]:
        old.unlink()


def existing(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first. The user's copies, which have other names, are none."""
    steps = {path: int(name[1]) for path in folder.glob("step-*.pt") if (name := _NAME.fullmatch(path.name))}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def newest(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """Return the state of the newest readable checkpoint; None if there is no checkpoint.

    Damaged newer ones are named on stderr. Raises UserError if all are damaged.
    """
    damaged: list[UserError] = []
    for path in existing(folder):
        try:
            state = read(path, device)
        except UserError as error:
            damaged.append(error)
            continue
        for problem in damaged:
            print(f"Warning: {problem}. Going on from {path.name}", file=sys.stderr)
        return state
    for problem in damaged:
        if problem.__cause__ is not None:  # the system could not read it, and it may be whole
            raise problem
    if damaged:
        raise UserError(f"{damaged[0]}. There is no other checkpoint: delete {folder} to start again")
    return None


def config_of(path: Path) -> str | None:
    """Return the config (YAML) in a checkpoint without reading its tensors; None if it cannot be read."""
    try:
        reading.require_regular(path, reading.WEIGHTS)
        with zipfile.ZipFile(path) as records:
            (pickled,) = (name for name in records.namelist() if name.endswith("data.pkl"))
            records.read(pickled)  # compares the checksum
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # unpickling raises exceptions of many types
        return None
    config = state.get("config") if isinstance(state, dict) else None
    return config if isinstance(config, str) else None


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """Return the state that ``write`` saved. Raises UserError for a damaged or foreign file."""
    try:
        reading.require_regular(path, reading.WEIGHTS)
        with zipfile.ZipFile(path) as records:  # torch writes checksums, but does not compare them
            broken = records.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"checksum of {broken}")
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # unpickling raises exceptions of many types
        if is_unread(error):
            raise unread(path, error) from error
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from None
    if not isinstance(state, dict) or not {"step", "model", "optimizer", "config"} <= state.keys():
        raise UserError(f"{path}: not a training checkpoint; expected keys step, model, optimizer and config")
    return state
