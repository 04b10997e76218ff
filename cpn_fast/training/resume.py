"""From where a run goes on: whether it is at its end, or is to train longer or on more images than before.

A run that was raised in length goes on from its last checkpoint as if its schedule had always had the new number of
steps, so its learning rate, which had fallen to 0, rises again.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpn_fast import config_file
from cpn_fast.config import Config, Train
from cpn_fast.data.dataset import Sample
from cpn_fast.data.provenance import image_digests
from cpn_fast.models.weights import training_of
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import read_note, with_checksum, write_json
from cpn_fast.training.run_folder import own_config
from cpn_fast.training.step import rate_factor


class Change(NamedTuple):
    """How a training list differs from the one that a run was trained on."""

    before: int
    """Images of the list then."""
    added: int
    """Images that are new, where all others are the same."""
    others: list[str]
    """Anything else, in words."""


class Resumed(NamedTuple):
    """What ``resumed`` found."""

    finished: bool
    remarks: list[str]
    """Sentences on how the run goes on."""
    listed: dict[str, Any]
    """What ``described`` makes of the list that the run is trained on from now."""


def number_of_steps(train: Train, images: int) -> int:
    """Optimiser steps of a whole training on a list of ``images``."""
    assert train.batch != "auto"
    return train.steps or (train.epochs or 0) * (images // train.batch) // train.accumulate


def resumed(
    config: Config, samples: Sequence[Sample], state: dict[str, Any] | None, final: Path | None, section: str
) -> Resumed:
    """Compare a run's newest checkpoint (``state``) and whole final weights, one of them at least, with the config.

    What differs in the list, and is not learned, is warned of on stderr. Raises UserError for a run that has made more
    steps than it is to have, for one that shall go on and has no checkpoint, and for another list under another name.
    """
    text = state["config"] if state is not None else own_config(final) if final is not None else None
    last = config_file.read(text or "", f"{config.run}: its newest checkpoint")
    now = described(samples)
    change = _changed(config.run, samples, now)
    grown = change is not None and change.added > 0
    if config.data.train_list.name != last.data.train_list.name and (change is None or change.others):
        raise UserError(
            f"{config.run} was trained on {last.data.train_list}, which {config.data.train_list} is not with more "
            "images. Give this run another name, or delete that folder"
        )
    steps = number_of_steps(config.train, len(samples))
    made = training_of(final).get("step") if final is not None else None
    done = max(made or 0, state["step"] if state is not None else 0)
    finished = False
    if final is not None:
        of_final = config_file.read(own_config(final) or text or "", str(final)).train
        same_length = _length(of_final) == _length(config.train)
        if made is None:  # an earlier version's
            finished = same_length and not grown
        else:
            other_list = change is None or bool(change.others)
            finished = made == steps or (same_length and other_list and made == done)
    _warn(config.run, change, steps if finished else None, section)
    if finished:
        return Resumed(True, [], now)
    if steps < done:
        key, value = ("steps", config.train.steps) if config.train.steps else ("epochs", config.train.epochs)
        makes = "" if key == "steps" else f", which makes {steps:,} steps of {len(samples)} images"
        mend = f"Set it to {done} to end there, to more to go on" if key == "steps" else "Raise it to go on"
        raise UserError(
            f"{section}.{key} is {value}{makes}, but {config.run} has made {done:,} steps, which cannot be taken back. "
            f"{mend}, or give the run another name to train anew"
        )
    if state is None:
        raise UserError(
            f"{config.run} has made {done:,} steps of {steps:,}, but its checkpoints are gone, and with them what "
            f"training goes on from. Leave its length as it was, or start another run from its weights: another name, "
            f"and model.weights={final}"
        )
    before = number_of_steps(last.train, change.before if change is not None else len(samples))
    remarks = []
    if grown and change is not None:
        remarks.append(f"The list has {change.added} images more than before: they are trained on from here on")
    if before != steps:
        rate, was = (config.train.lr * rate_factor(state["step"], end, config.train) for end in (steps, before))
        remarks.append(
            f"Going on after step {state['step']:,}: the run now has {steps:,} steps, before it had {before:,}. The "
            f"learning rate goes on at {rate:.3g}, where it had come to {was:.3g}, and falls to 0 at step {steps:,}"
        )
    return Resumed(False, remarks, now if grown else {})


def _length(train: Train) -> tuple[int | None, int | None]:
    return train.steps, train.epochs


# The training list


def described(samples: Sequence[Sample]) -> dict[str, Any]:
    """Images and tags of a list, as list.json in a run's folder remembers them.

    Images in shards are not looked at: shards say themselves what they were packed of.
    """
    loose = [sample for sample in samples if sample.image.is_file()]
    contents = dict(zip((s.id for s in loose), image_digests([s.image for s in loose]), strict=True))
    return {"images": len(samples), "sha256": _digest(samples), "contents": contents}


def remember(run: Path, listed: dict[str, Any]) -> None:
    """Note which images and tags a run is trained on."""
    write_json(run / "list.json", with_checksum(listed))


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.id.encode() + b"\0")
        digest.update(b"" if sample.label is None else np.packbits(sample.label).tobytes())
    return digest.hexdigest()


def _changed(run: Path, samples: Sequence[Sample], now: dict[str, Any]) -> Change | None:
    """None of a run that noted nothing, as earlier versions' did."""
    before = read_note(run / "list.json")
    if not isinstance(before, dict) or not isinstance(before.get("images"), int):
        return None
    known = before.get("contents")
    known = known if isinstance(known, dict) else {}
    added, others = 0, []
    if any(before.get(key) != now[key] for key in ("images", "sha256")):
        if known and before.get("sha256") == _digest([sample for sample in samples if sample.id in known]):
            added = len(samples) - before["images"]
        else:
            others.append("another list or other tags")
    replaced = [id_ for id_, found in now["contents"].items() if known.get(id_, found) != found]
    if replaced:
        others.append(f"{len(replaced)} other images under the same names ({some(replaced)})")
    return Change(before["images"], added, others)


def _warn(run: Path, change: Change | None, finished: int | None, section: str) -> None:
    """``finished``: the steps of a run at its end, which learns nothing more."""
    if change is None:
        return
    if change.others:
        print(
            f"Warning: {run} was trained on {' and on '.join(change.others)} (list.json), and what it learned is kept: "
            "to train on what the list is now, give the run another name or delete its folder",
            file=sys.stderr,
        )
    elif change.added and finished is not None:
        print(
            f"Warning: the list has {change.added} images more than {run} was trained on, and all its {finished:,} "
            f"steps are made: raise {section}.steps, and it goes on with them",
            file=sys.stderr,
        )
