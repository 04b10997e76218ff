"""Old names of modules, from before they had folders. Until 0.2 they still work, with a warning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

FOLDERS = {
    "runtime": ("errors", "files", "reading", "owner", "terminal", "progress", "precision"),
    "data": ("dataset", "labels", "images", "masks", "seeds", "provenance"),
    "training": ("step", "checkpoint", "batch_size", "hook", "resume", "validation"),
    "stages": ("train", "cam", "evaluate", "refine", "segment"),
    "commands": ("predict", "annotations", "report", "doctor", "init", "demo", "demo_data", "reproduce", "information"),
    "refinement": ("crf", "affinity"),
    "models": ("weights",),
    "methods": ("patches",),
}
MOVED = {name: f"{folder}.{name}" for folder, names in FOLDERS.items() for name in names} | {
    "coco": "commands.import_coco",
    "finite": "training.nonfinite",
    "gallery": "training.previews",
    "meter": "training.metrics",
    "ranks": "runtime.distributed",
    "run": "stages.chain",
    "signals": "runtime.interrupts",
}
"""Old name -> new name, both below cpn_fast."""


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module by its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return importlib.machinery.ModuleSpec(fullname, self) if package == "cpn_fast" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = f"cpn_fast.{MOVED[module.__name__.removeprefix('cpn_fast.')]}"
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)  # the import returns this entry
