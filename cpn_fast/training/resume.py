"""How a run continues: whether it is finished, or trains longer or on more images than before.

A longer run continues from its last checkpoint, as if its schedule had always had the new number of steps. So its
learning rate, which had fallen to 0, rises again.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpn_fast import config_file
from cpn_fast.config import Config, Train
from cpn_fast.data.dataset import Sample
from cpn_fast.data.provenance import image_digests
from cpn_fast.models.weights import content_of, training_of
from cpn_fast.pipelines.shards import Shards
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import read_note, with_checksum, write_json
from cpn_fast.training.run_folder import own_config
from cpn_fast.training.step import rate_factor


class Change(NamedTuple):
    """The difference between a training list and the list that a run was trained on."""

    before: int
    """Number of images that the run was trained on."""
    added: int
    """Number of new images, if all other images are unchanged."""
    others: list[str]
    """All other differences, in words."""


class Continuation(NamedTuple):
    """The result of ``compare``."""

    finished: bool
    remarks: list[str]
    """Sentences on how the run continues."""
    list_note: dict[str, Any]
    """``described`` of the list, if the run is trained on it from now on; else empty."""


def number_of_steps(train: Train, images: int) -> int:
    """Return the number of optimiser steps of a whole training on ``images`` images."""
    assert train.batch != "auto"
    return train.steps or (train.epochs or 0) * (images // train.batch) // train.accumulate


def compare(
    config: Config,
    samples: Sequence[Sample],
    shards: Shards | None,
    state: dict[str, Any] | None,
    final: Path | None,
    section: str,
) -> Continuation:
    """Compare a run with the config: its newest checkpoint (``state``), its intact final weights, or both.

    Warns on stderr about changes of the list that the run does not learn. Raises UserError if the run has made more
    steps than the config asks for, if it needs a checkpoint to continue and has none, for another training list under
    another name, and for other pretrained weights under the same name.
    """
    text = state["config"] if state is not None else own_config(final) if final is not None else None
    last = config_file.read(text or "", f"{config.run}: its newest checkpoint")
    note = described(config, samples, shards)
    _require_same_start(config, note)
    change = _changed(config.run, samples, note)
    grown = change is not None and change.added > 0
    if config.data.train_list.name != last.data.train_list.name and (change is None or change.others):
        raise UserError(
            f"{config.run} was trained on {last.data.train_list}, but {config.data.train_list} does not extend this "
            "list. Give this run another name, or delete that folder"
        )
    steps = number_of_steps(config.train, len(samples))
    final_step = training_of(final).get("step") if final is not None else None
    done = max(final_step or 0, state["step"] if state is not None else 0)
    finished = final is not None and _is_finished(config, final, last, steps, done, change)
    _warn(config.run, change, steps if finished else None, section)
    if finished:
        return Continuation(True, [], note)
    if steps < done:
        raise _fewer_steps(config, steps, done, len(samples), section)
    if state is None:
        raise UserError(
            f"{config.run} has made {done:,} steps of {steps:,}, but its checkpoints are gone, so it cannot continue. "
            "Set its length back to the old value, or start another run from its weights: give another name and "
            f"model.weights={final}"
        )
    remarks = []
    if grown and change is not None:
        remarks.append(f"The list has {change.added} more images than before: the run trains on them from now on")
    before = number_of_steps(last.train, change.before if change is not None else len(samples))
    if before != steps:
        rate, was = (config.train.lr * rate_factor(state["step"], end, config.train) for end in (steps, before))
        remarks.append(
            f"Going on after step {state['step']:,}: the run now has {steps:,} steps, before it had {before:,}. The "
            f"learning rate is now {rate:.3g}, before it was {was:.3g}, and it falls to 0 at step {steps:,}"
        )
    return Continuation(False, remarks, note if grown else {})


def _is_finished(config: Config, final: Path, last: Config, steps: int, done: int, change: Change | None) -> bool:
    """Return whether the final weights end the training that the config asks for, on the list as it was.

    ``last`` is their config if they have none.
    """
    text = own_config(final)
    final_train = (last if text is None else config_file.read(text, str(final))).train
    same_length, final_step = _length(final_train) == _length(config.train), training_of(final).get("step")
    if final_step is None:  # earlier versions did not write it
        return same_length and (change is None or not change.added)
    other_list = change is None or bool(change.others)
    return bool(final_step == steps or (same_length and other_list and final_step == done))


def _fewer_steps(config: Config, steps: int, done: int, images: int, section: str) -> UserError:
    key, value = ("steps", config.train.steps) if config.train.steps else ("epochs", config.train.epochs)
    meaning = "" if key == "steps" else f", which means {steps:,} steps with {images} images"
    remedy = f"Set it to {done} to stop there, or higher to continue" if key == "steps" else "Raise it to continue"
    return UserError(
        f"{section}.{key} is {value}{meaning}, but {config.run} has made {done:,} steps, which cannot be taken "
        f"back. {remedy}, or give the run another name to train anew"
    )


def _length(train: Train) -> tuple[int | None, int | None]:
    return train.steps, train.epochs


# The training list


def described(config: Config, samples: Sequence[Sample], shards: Shards | None) -> dict[str, Any]:
    """Return digests of what a run learns from, for list.json in its folder: images, tags and pretrained weights."""
    loose = [sample for sample in samples if sample.image.is_file()]
    contents = dict(zip((s.id for s in loose), image_digests([s.image for s in loose]), strict=True))
    return {
        "images": len(samples),
        "sha256": _digest(samples),
        "contents": contents,
        "shards": None if shards is None else shards.images,
        "pretrained": content_of(config.model.weights),
    }


def remember(run: Path, note: dict[str, Any]) -> None:
    """Write the note of ``described`` to the run's list.json."""
    write_json(run / "list.json", with_checksum(note))


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(os.fsencode(sample.id) + b"\0")
        digest.update(b"" if sample.label is None else np.packbits(sample.label).tobytes())
    return digest.hexdigest()


def _changed(run: Path, samples: Sequence[Sample], now: dict[str, Any]) -> Change | None:
    """Compare the list with list.json; None if the run has none, or that of an earlier version."""
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
    replaced = [id_ for id_, digest in now["contents"].items() if known.get(id_, digest) != digest]
    if replaced:
        others.append(f"{len(replaced)} other images under the same names ({some(replaced)})")
    if None not in (before.get("shards"), now["shards"]) and before["shards"] != now["shards"]:
        others.append("shards that were packed from other images")
    return Change(before["images"], added, others)


def _require_same_start(config: Config, now: dict[str, Any]) -> None:
    """Raise UserError if the file of pretrained weights has another content than at the run's start.

    If it is gone, ``now`` keeps what is known of it.
    """
    before = read_note(config.run / "list.json")
    known = before.get("pretrained") if isinstance(before, dict) else None
    now["pretrained"] = now["pretrained"] or known
    if known is not None and known != now["pretrained"]:
        raise UserError(
            f"model.weights: {config.model.weights} has another content than the file of this name from which "
            f"{config.run} was trained. Give the run another name to start from the new file, or delete that folder"
        )


def _warn(run: Path, change: Change | None, finished: int | None, section: str) -> None:
    """Warn about a changed list. ``finished``: the steps of a finished run, which does not train any more."""
    if change is None:
        return
    if change.others:
        print(
            f"Warning: {run} was trained on {' and on '.join(change.others)} (list.json), and its weights are "
            "kept. To train on the present list, give the run another name or delete its folder",
            file=sys.stderr,
        )
    elif change.added and finished is not None:
        print(
            f"Warning: the list has {change.added} more images than {run} was trained on, and all its {finished:,} "
            f"steps are made. Raise {section}.steps to train on them too",
            file=sys.stderr,
        )
