"""A training run's folder: its config, the keys that may change, and its environment."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import yaml

import cpn_fast
from cpn_fast import config_file, kernels
from cpn_fast.config import Affinity, Config, Segment
from cpn_fast.models.weights import FINAL, note_of
from cpn_fast.runtime import precision, reading
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import remove_partials, replacing, write_json
from cpn_fast.training import checkpoint


def own_config(path: Path) -> str | None:
    """Return the config (YAML) in a .safetensors file or a checkpoint; None if it has none."""
    if path.suffix != ".safetensors":
        return checkpoint.config_of(path)
    config = note_of(path).get("config")
    return config if isinstance(config, str) and config else None


def run_config(run: Path) -> tuple[Path, str] | None:
    """Return the file that has the config of a run's training, and the config (YAML); None if no step was made.

    Checkpoints and weights have it. Without them it is ``config.yaml``.
    """
    for path in (*checkpoint.existing(run / "checkpoints"), run / FINAL):
        if path.exists() and (text := own_config(path)) is not None:
            return path, text
    path = run / "config.yaml"
    if path.exists() and (run / "metrics.jsonl").exists():  # without metrics no step was made
        return path, reading.read_bytes(path, reading.CONFIG).decode(errors="replace")
    return None


def require_classes(config: Config, weights: Path) -> None:
    """Raise UserError if a run's weights were trained on other classes, or on the same in another order."""
    text = own_config(weights)
    trained = config.classes if text is None else config_file.read(text, str(weights)).classes
    if trained != config.classes:
        raise UserError(
            f"{weights} was trained on the classes {', '.join(trained)}, and the config has "
            f"{', '.join(config.classes)}: set classes to the former, in this order"
        )


OWN = ("checkpoints", FINAL, "*.json", "*.jsonl", "config.yaml", "events.*")
"""Patterns of the files that training writes into a run's folder."""


def open_run(config: Config) -> None:
    """Make the run's folder; write its config."""
    remove_partials(config.run, config.run / "checkpoints")
    checkpoint.prune(config.run / "checkpoints", config.train.keep_checkpoints)
    with replacing(config.run / "config.yaml") as file:
        file.write(config_file.dump(config).encode())


def write_environment(config: Config, device: torch.device) -> None:
    """Write what the run trains with. A finished run keeps what it was trained with."""
    environment = {
        "cpn_fast": cpn_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "precision": config.train.precision or precision.default(device),
        "backends": _backends(config.train.precision, device),
    }
    write_json(config.run / "environment.json", environment, indent=2)


def _backends(name: str | None, device: torch.device) -> dict[str, str]:
    """Return the backend of each operation. On a GPU, backends other than Triton come with the reason."""
    choices = kernels.backends(device, precision.dtype(name, device))
    return {
        operation: f"{choice.backend}: {choice.reason}" if choice.reason and device.type == "cuda" else choice.backend
        for operation, choice in choices.items()
    }


LENGTH = ("train.steps", "train.epochs")
"""Keys that may be raised between two starts of one run."""

# Keys that may change between two starts of one run: the weights do not depend on them. Paths of data are among them,
# since list.json tells whether the data is the same.
FREE = {"out", "hook", "superpixels.cache", "cam", "evaluate", "crf", "affinity", "walk", "segment"} | {
    f"{section}.{key}"
    for section, keys in {
        "data": ("root", "images", "labels", "masks", "eval_list"),
        "train": (
            *("log_every", "checkpoint_every", "keep_checkpoints", "data_threads", "nonfinite"),
            *("validate_every", "use_weights"),
            *("compile", "cuda_graph", "checkpoint_activations"),
        ),
    }.items()
    for key in keys
}
MAY_MOVE = {"data.train_list", "data.shards", "model.weights"}
"""Keys of paths of which only the last part is compared."""


def part(config: Config, name: str, out: Path, section: Affinity | Segment) -> Config:
    """Return the config of the training run ``out/name``, a stage of ``config``'s run with options from ``section``."""
    changes = {
        "name": name,
        "out": out,
        "data": config.data.model_copy(update={"shards": None}),
        "augment": section.augment,
        "train": section.train,
    }
    return config.model_copy(update=changes)


def decisive(config: Config) -> dict[str, Any]:
    """Return key (``train.lr``) -> plain value for all keys that the weights depend on."""
    return _flat(yaml.safe_load(config_file.dump(config)))


def differing_keys(one: Config, other: Config) -> list[str]:
    """Return the ``decisive`` keys that differ. Keys that ``resume`` compares are left out."""
    before, now = decisive(one), decisive(other)
    keys = (before.keys() | now.keys()) - {*LENGTH, "data.train_list", "name"}  # a folder may be renamed
    return sorted(key for key in keys if before.get(key) != now.get(key))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in ((prefix + name, value) for name, value in tree.items() if prefix + name not in FREE):
        if key in MAY_MOVE and value is not None:
            values[key] = Path(value).name
        else:
            values |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return values
