"""Folders of results: one per list, with one file per image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from cpn_fast.config import Config
from cpn_fast.data.dataset import Sample
from cpn_fast.runtime.distributed import Rank
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import MADE_BY, claim, read_note, write_json
from cpn_fast.runtime.owner import owned

LISTED = "listed.json"
"""Names the list, in the folder of its results."""
SUFFIXES = {"seed": ".npz", "mask": ".png"}


@contextmanager
def list_folder(parent: Path, config: Config, list_path: Path, rank: Rank) -> Iterator[Path]:
    """Own the folder of a list's results, and yield it. All processes must call this."""
    folder = parent / config.list_name(list_path)
    with owned(folder, rank):
        if rank.first:
            write_json(folder / LISTED, {"list": str(list_path)})
        yield folder


def claim_once(
    rank: Rank,
    folder: Path,
    made_by: Callable[[], dict[str, Any]],
    patterns: Sequence[str] = ("**/*.png",),
    *,
    free: Sequence[str] = (),
    check: Callable[[], None] = lambda: None,
) -> str:
    """Claim a folder (``files.claim``) in the first process; return the digest. All processes must call this.

    Only the first process calls ``made_by``, which may read many files, and ``check``.
    """
    return rank.gather(claim(folder, made_by(), patterns, free=free, check=check) if rank.first else "")[0]


def require_classes(folder: Path, classes: Sequence[str]) -> None:
    """Raise UserError if a folder's seeds or masks, or those of its parent, are of other classes or in another order.

    Folders of other programs do not say their classes.
    """
    for path in (folder / MADE_BY, folder.parent / MADE_BY):
        note = read_note(path)
        made = note.get("classes") if isinstance(note, dict) else None
        if isinstance(made, list) and made != list(classes):
            raise UserError(
                f"{folder}: its files are of the classes {', '.join(map(str, made))} ({path.name}), and the config has "
                f"{', '.join(classes)}. Set classes to the former, in this order, or make the files again"
            )


def require_results(
    folder: Path, kind: Literal["seed", "mask"], samples: Sequence[Sample], list_path: Path, remedy: str
) -> None:
    """Raise UserError if images of the list have no ``folder/ID.npz`` (seed) or ``folder/ID.png`` (mask)."""
    missing = [sample.id for sample in samples if not (folder / f"{sample.id}{SUFFIXES[kind]}").exists()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the {len(samples)} images of {list_path} have no {kind} there "
            f"({some(missing, 3)}). {remedy}"
        )
