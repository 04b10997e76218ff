"""The files in a user's folder of photos, without masks and what cpn-fast wrote there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cpn_fast.runtime.files import MADE_BY, read_note

_RESULTS = ({MADE_BY}, {"shards.json"}, {"config.yaml", "metrics.jsonl"})
"""Names of files that a folder of results has: of a stage, of shards, of a training."""
_CACHE = {"format", "count", "compactness", "iterations"}
"""Keys in the manifest.json of a cache of superpixels. Other programs write files of that name too."""
_MASKS = {"SegmentationClass", "SegmentationClassAug", "SegmentationObject"}
"""VOC's names of folders of masks, which ``data.masks`` has in a folder of photos too."""


def visible_files(folder: Path) -> list[Path]:
    """Return the files in a folder, its subfolders and linked folders, sorted.

    Hidden ones, subfolders of masks and of cpn-fast's results, and files of ``predict`` are left out; broken links are
    not. A warning on stderr names each folder that cannot be read.
    """

    def warn(error: OSError) -> None:
        print(f"Warning: {error.filename}: {error.strerror}; the files in it are left out", file=sys.stderr)

    files: list[Path] = []
    seen = set()
    for parent, folders, names in os.walk(folder, onerror=warn, followlinks=True):
        real = os.path.realpath(parent)
        # Links may lead here twice, or back to a folder above.
        if real in seen or (Path(parent) != folder and _holds_results(Path(parent), {*names})):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _MASKS]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if not _is_prediction(file))


def _holds_results(folder: Path, names: set[str]) -> bool:
    """Return whether cpn-fast wrote a folder; ``names`` are those of its files."""
    if any(marks <= names for marks in _RESULTS):
        return True
    note = read_note(folder / "manifest.json") if "manifest.json" in names else None
    return isinstance(note, dict) and note.keys() >= _CACHE


def is_summary(path: Path) -> bool:
    """Return whether a file is the JSON that ``predict`` writes for an image."""
    note = read_note(path)
    return isinstance(note, dict) and "made_of" in note


def _is_prediction(file: Path) -> bool:
    """Return whether a file is an overlay, a mask or a summary that ``predict`` wrote."""
    for ending in ("_overlay.png", "_mask.png", ".json"):
        if file.name.endswith(ending):
            return is_summary(file.with_name(file.name.removesuffix(ending) + ".json"))
    return False
