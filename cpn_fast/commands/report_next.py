"""The commands that a report suggests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpn_fast.commands.agreement import Found
from cpn_fast.commands.trained_model import Model, Segmenter
from cpn_fast.config import Config, Train
from cpn_fast.config_file import override
from cpn_fast.data.dataset import load_samples
from cpn_fast.models.weights import FINAL
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.terminal import command_line
from cpn_fast.stages.chain import check


def next_step(folder: Path, config: Config, model: Model | None, overrides: list[str]) -> tuple[str, str]:
    """Return the reason for the next step, and its command."""
    config_path = str(folder / "config.yaml")
    run_overrides = _run_overrides(folder, config, overrides)
    if model is None:
        why = "The training is not finished. This command continues it:"
        return why, command_line("train", config_path, overrides=run_overrides)
    photo = _photo(config)
    if isinstance(model, Segmenter):
        return _PREDICT, command_line("predict", photo, "--model", folder)
    segmenter = folder / "segment/deeplab"
    if (segmenter / FINAL).is_file():
        return _PREDICT, command_line("predict", photo, "--model", segmenter)
    if not any(folder.glob("cams/*/seeds")):
        why = "See what the network found in the photos:"
        return why, command_line("cam", config_path, overrides=run_overrides)
    try:
        check(config, 1)
    except UserError:  # a later stage lacks something, for example its list
        return _PREDICT, command_line("predict", photo, "--model", folder)
    why = (
        "Get sharper masks, and a segmenter that needs no tags. The command refines the seeds, for which AffinityNet "
        f"trains for {_length(config.affinity.train)}, and trains the segmenter for {_length(config.segment.train)}. "
        f"The finished training had {_length(config.train)}."
    )
    return why, command_line("run", config_path, overrides=run_overrides)


def _length(train: Train) -> str:
    return f"{train.steps:,} steps" if train.steps else f"{train.epochs:,} epochs"


_PREDICT = "Make masks of other photos. Replace this photo with yours, or with a folder of photos:"


def _run_overrides(folder: Path, config: Config, overrides: list[str]) -> list[str]:
    """Return the overrides with which the config in a run's folder names this folder."""
    path = folder.absolute()
    if config.run.absolute() == path:
        return overrides
    name = [] if config.name == path.name else [override("name", Path(path.name))]
    return [*overrides, override("out", path.parent), *name]


def _photo(config: Config) -> Path:
    """Return a photo, if possible one that is not trained on."""
    for list_path in (config.segment.eval_list, config.data.eval_list, config.data.train_list):
        try:
            return load_samples(config.data, config.classes, list_path, labels=False, masks=False)[0].image
        except UserError:
            continue
    return Path("photo.jpg")


def scoring_command(folder: Path, config: Config, results: Sequence[Found], overrides: list[str]) -> str | None:
    """Return the command that scores a list's seeds, or None if no list has ground truth of all its images."""
    for result in results:
        if result.kind == "cams" and all(photo.sample.mask is not None for photo in result.photos):
            words = ("evaluate", folder / "config.yaml", "--cams", result.folder / "seeds", "--list", result.listed)
            return command_line(*words, overrides=_run_overrides(folder, config, overrides))
    return None
