"""Writing files whole or not at all, and folders whose files all have one origin."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes ``path``'s place, once on disk, when the block ends well, and vanishes when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def claim(folder: Path, made_by: dict[str, Any]) -> str:
    """Make a folder whose files all come of ``made_by`` (plain values), emptying it when it holds those of another.

    ``made_by.json`` in it remembers that. Returns a digest of ``made_by`` for what is made of these files in turn.
    """
    text = json.dumps(made_by, indent=2, sort_keys=True) + "\n"
    manifest = folder / "made_by.json"
    if folder.exists() and not (manifest.exists() and manifest.read_text() == text):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".*.tmp"):  # of killed processes
        partial.unlink()
    with replacing(manifest) as file:
        file.write(text.encode())
    return hashlib.sha256(text.encode()).hexdigest()
