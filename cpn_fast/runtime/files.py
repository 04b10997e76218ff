"""Writing files whole or not at all, and folders whose files all have one origin."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.owner import LOCK, lock, lock_when_free

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes ``path``'s place, once on disk, when the block ends well, and vanishes when not.

    Until then it is ``.NAME.tmp`` and locked: what a killed process left of it is written over, and who wants to write
    the same file waits. Raises UserError, which names the file, for whatever the system refuses.
    """
    partial = _partial(path)
    with named(path, partial, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(lock_when_free(partial, path), "wb") as file:  # closing it ends the lock
            try:
                os.ftruncate(file.fileno(), 0)
                yield file
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise


def create(path: Path, content: bytes) -> None:
    """Write a file that must not be there yet; one of this very content is left, for a killed command is given again.

    Raises UserError for one of other content, and as ``replacing`` does.
    """
    with replacing(path) as file:  # while it is held nobody else creates it
        if path.exists() and not _holds(path, content):
            raise UserError(f"{path}: exists already; remove it or choose another name")
        file.write(content)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return reading.read_bytes(path, len(content)) == content
    except OSError:
        return False


@contextmanager
def named(path: Path, *aliases: Path) -> Iterator[None]:
    """What the system refuses in the block becomes a UserError that names ``path``, the file being written.

    An error that has a file's name already keeps it, unless that is an alias of ``path``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = system_error(error)
        if cause is None:
            raise
        if cause.filename is not None and Path(os.fsdecode(cause.filename)) not in (path, *aliases):
            raise UserError(f"{os.fsdecode(cause.filename)}: {refusal(cause)}") from None
        raise UserError(f"{path}: cannot be written: {refusal(cause)}") from None


def system_error(error: BaseException) -> OSError | None:
    """The system's error: this one, or of a disk the one that it followed, for writers of libraries raise their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (*_FULL, errno.EIO, errno.EROFS, errno.ESTALE):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def refusal(error: OSError) -> str:
    """What the system refused, and what to do."""
    reason = "the disk is full" if error.errno in _FULL else error.strerror or type(error).__name__
    remedy = "make room and" if error.errno in _FULL else "when that is mended,"
    return f"{reason}. What was complete stays as it was: {remedy} give the same command again"


def _partial(path: Path) -> Path:
    """Where ``path`` is while it is written. A name that leaves no room for more is shortened."""
    name = path.name if len(os.fsencode(path.name)) < 250 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(f".{name}.tmp")


def read_json(path: Path) -> Any:
    """Raises OSError or ValueError, and nothing else."""
    try:
        tree = json.loads(reading.read_bytes(path, reading.NOTE))
        if isinstance(tree, dict) and "checksum" in tree and tree.pop("checksum") != _checksum(tree):
            raise ValueError("its checksum does not fit: it was damaged, or edited without removing that key")
    except RecursionError:
        raise ValueError("brackets within brackets without end") from None
    return tree


def with_checksum(tree: dict[str, Any]) -> dict[str, Any]:
    """What is written of a result in JSON: ``read_json`` compares its last key and leaves it out."""
    return {**tree, "checksum": _checksum(json.loads(json.dumps(tree)))}


def _checksum(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


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
    for text in reading.read_bytes(path, reading.NOTE).splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            break
    return lines


def remove_partials(*folders: Path) -> None:
    """Remove what killed processes left half-written, and the folder's lock; those of a live one stay."""
    for folder in folders:
        for left in (*folder.glob(".*.tmp"), *folder.glob(LOCK)):
            descriptor = lock(left)
            if descriptor is not None:
                left.unlink(missing_ok=True)
                os.close(descriptor)


def claim(
    folder: Path, made_by: dict[str, Any], own: Sequence[str] = ("**/*.png",), *, free: Sequence[str] = ()
) -> str:
    """Make a folder whose files all come of ``made_by`` (plain values), removing its ``own`` when they come of another.

    ``own``: patterns of what a stage writes there; nothing else is ever removed. ``made_by.json`` remembers what it
    was, and what has changed since is said on stderr; ``free`` keys may change and nothing is removed. Returns a digest
    of ``made_by`` for what is made of these files in turn. Whoever calls it owns the folder (``owned``). Raises
    UserError if such files are there without that record.
    """
    text = (json.dumps(made_by, indent=2, sort_keys=True) + "\n").encode()
    manifest = folder / "made_by.json"
    before, now = read_note(manifest), json.loads(text)
    folder.mkdir(parents=True, exist_ok=True)
    if before != now:
        known = before if isinstance(before, dict) else {}
        changed = sorted(key for key in (known.keys() | now.keys()) - {*free} if known.get(key) != now.get(key))
        found = [path for pattern in own for path in sorted(folder.glob(pattern)) if path != manifest and changed]
        if found and not manifest.exists():
            raise UserError(
                f"{folder}: holds {found[0].name}, but no made_by.json, so it is not known to be cpn-fast's and would "
                "be lost: move or delete it"
            )
        if found and isinstance(before, dict):
            print(f"{folder} is made anew, for these have changed: {', '.join(changed)}", file=sys.stderr)
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        with replacing(manifest) as file:  # last: until then it says whose the rest is
            file.write(text)
    remove_partials(*(Path(place) for place, _, _ in os.walk(folder)))  # ids may hold folders
    return hashlib.sha256(text).hexdigest()
