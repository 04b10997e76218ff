"""Write files whole or not at all, and keep folders whose files all have one origin."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import FULL, UserError, is_unread, refusal, unread
from cpn_fast.runtime.owner import LOCK, lock, lock_when_free

_PARTIAL = ".cpn-fast.tmp"
"""Ending of temporary files. Those of other programs stay in a folder that both write to."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that replaces ``path`` when the block succeeds, once it is on disk. An error removes it.

    Until then it is ``.NAME.cpn-fast.tmp`` and locked. It overwrites a file that a killed process left there. Another
    process that writes the same file waits. Raises UserError, which names the file, for every error of the system.
    """
    partial = _partial(path)
    with named(path, partial, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(lock_when_free(partial, path), "wb") as file:  # its close ends the lock
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
    """Write a file that must not exist. A file with the same content is fine, because a killed command is repeated.

    Raises UserError for a file with other content, and as ``replacing`` does.
    """
    with replacing(path) as file:  # its lock keeps other processes from creating the file
        if path.exists() and not holds(path, content):
            raise UserError(f"{path}: exists already; remove it or choose another name")
        file.write(content)


def holds(path: Path, content: bytes) -> bool:
    """Return whether a file has this content."""
    try:
        return reading.read_bytes(path, len(content)) == content
    except OSError:
        return False


@contextmanager
def named(path: Path, *aliases: Path) -> Iterator[None]:
    """Turn the system's errors in the block into a UserError that names ``path``, the file that is written.

    An error that already names a file keeps this name, unless it is one of the ``aliases`` of ``path``.
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
    """Return the system's error: ``error`` itself, or the disk's error behind it. None if there is none.

    Libraries raise their own exceptions after a disk's error.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (*FULL, errno.EIO, errno.EROFS, errno.ESTALE):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _partial(path: Path) -> Path:
    """Return the temporary path of ``path``. A name near the file system's limit becomes a hash."""
    name = path.name if len(os.fsencode(path.name)) < 240 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(f".{name}{_PARTIAL}")


def read_json(path: Path) -> Any:
    """Read a JSON file and check its checksum, if it has one. Raises only OSError or ValueError."""
    try:
        tree = json.loads(reading.read_bytes(path, reading.NOTE))
        if isinstance(tree, dict) and "checksum" in tree and tree.pop("checksum") != _checksum(tree):
            raise ValueError("its checksum does not fit: it was damaged, or edited without removing the key checksum")
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    return tree


def with_checksum(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with a last key ``checksum``, which ``read_json`` checks and removes."""
    return {**tree, "checksum": _checksum(json.loads(json.dumps(tree)))}


def _checksum(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def read_note(path: Path) -> Any:
    """Read a JSON file, or return None if it is missing or damaged.

    Raises UserError if the system cannot read it. Such a note may be whole, and claims and counts depend on it.
    """
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        if is_unread(error):
            raise unread(path, error) from None
        return None


def write_json(path: Path, tree: Any, *, indent: int | None = None) -> None:
    """Write a JSON file. Undecodable bytes in names of files are escaped. Raises UserError if the disk is full."""
    text = json.dumps(tree, ensure_ascii=False, indent=indent) + "\n"
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl before the first incomplete (a killed run's last) or damaged one."""
    lines: list[dict[str, Any]] = []
    for text in reading.read_bytes(path, reading.NOTE).splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            break
    return lines


def remove_partials(*folders: Path) -> None:
    """Remove the temporary files and the locks of killed processes. Those of a live process stay."""
    for folder in folders:
        for path in (*folder.glob(f".*{_PARTIAL}"), *folder.glob(LOCK)):
            descriptor = lock(path)
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)


MADE_BY = "made_by.json"
"""Names what a folder's files come from (``claim``)."""


def claim(
    folder: Path,
    made_by: dict[str, Any],
    patterns: Sequence[str] = ("**/*.png",),
    *,
    free: Sequence[str] = (),
    check: Callable[[], None] = lambda: None,
) -> str:
    """Make a folder whose files all come from ``made_by`` (plain values), and remove stale files.

    ``patterns`` match the files that the stage writes there. Only these are ever removed, when ``made_by`` differs from
    ``made_by.json``, which keeps the values of the last call. The changed keys are named on stderr. A change of
    ``free`` keys removes nothing. If a file is to be removed, ``check`` is called first; if it raises, nothing is
    removed. Returns a digest of ``made_by``, for results that are made from these files. The caller must own the folder
    (``owned``). Raises UserError if the folder has such files without ``made_by.json``.
    """
    text = (json.dumps(made_by, indent=2, sort_keys=True) + "\n").encode()
    manifest = folder / MADE_BY
    before, now = read_note(manifest), json.loads(text)
    folder.mkdir(parents=True, exist_ok=True)
    if before != now:
        known = before if isinstance(before, dict) else {}
        changed = sorted(key for key in (known.keys() | now.keys()) - {*free} if known.get(key) != now.get(key))
        stale = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path != manifest and changed]
        if stale and not manifest.exists():
            raise UserError(
                f"{folder}: holds {stale[0].name}, but no made_by.json. The file may not be cpn-fast's, and would be "
                "lost: move or delete it"
            )
        if stale:
            check()
        if stale and isinstance(before, dict):
            print(f"{folder} is made anew, because these have changed: {', '.join(changed)}", file=sys.stderr)
        for path in stale:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        with replacing(manifest) as file:  # last: until then the old one describes the files that are left
            file.write(text)
    remove_partials(*(Path(subfolder) for subfolder, _, _ in os.walk(folder)))  # ids may hold folders
    return hashlib.sha256(text).hexdigest()
