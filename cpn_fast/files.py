"""Writing files whole or not at all, and folders whose files all have one origin."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cpn_fast.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes ``path``'s place, once on disk, when the block ends well, and vanishes when not.

    Raises UserError if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"{path}: cannot be written, for the disk is full. What was complete stays as it was: make room and give "
            "the same command again"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Raises OSError or ValueError, and nothing else."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("brackets within brackets without end") from None


def read_note(path: Path) -> Any:
    """What a JSON file remembers; None of a file that is missing or damaged, for it remembers nothing."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def write_json(path: Path, tree: Any, *, indent: int | None = None) -> None:
    """Raises UserError if the disk is full. Names of files need not be text: what is none is escaped."""
    text = json.dumps(tree, ensure_ascii=False, indent=indent) + "\n"
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to the first that is torn (a killed run's last one) or damaged."""
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            break
    return lines


def remove_partials(*folders: Path) -> None:
    """Remove what killed processes left half-written."""
    for folder in folders:
        for partial in folder.glob(".*.tmp"):
            partial.unlink(missing_ok=True)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it followed (writers of libraries raise their own), says that."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


def claim(folder: Path, made_by: dict[str, Any]) -> str:
    """Make a folder whose files all come of ``made_by`` (plain values), emptying it when it holds those of another.

    ``made_by.json`` in it remembers that, and what has changed since is said on stderr. Returns a digest of
    ``made_by`` for what is made of these files in turn.
    """
    text = (json.dumps(made_by, indent=2, sort_keys=True) + "\n").encode()
    manifest = folder / "made_by.json"
    before, now = read_note(manifest), json.loads(text)
    if before != now:
        if isinstance(before, dict):
            changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            print(f"{folder} is made anew, for these have changed: {', '.join(changed)}", file=sys.stderr)
        if folder.exists():
            shutil.rmtree(folder)
        with replacing(manifest) as file:
            file.write(text)
    remove_partials(folder, *(place for place in folder.iterdir() if place.is_dir()))
    return hashlib.sha256(text).hexdigest()
