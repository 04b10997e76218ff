"""A training run's folder: which config and which list it belongs to, and on what it ran."""

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
from cpn_fast.runtime.files import remove_partials, replacing, write_json
from cpn_fast.training import checkpoint


def own_config(path: Path) -> str | None:
    """The config (YAML) of the run that wrote a .safetensors file or a checkpoint; None of others."""
    if path.suffix != ".safetensors":
        return checkpoint.config_of(path)
    found = note_of(path).get("config")
    return found if isinstance(found, str) and found else None


def run_config(run: Path) -> tuple[Path, str] | None:
    """The config (YAML) that a run was trained with, and the file that says so; None if nothing was trained there.

    Checkpoints and weights know theirs; ``config.yaml`` is asked where neither is there.
    """
    for path in (*checkpoint.existing(run / "checkpoints"), run / FINAL):
        if path.exists() and (text := own_config(path)) is not None:
            return path, text
    path = run / "config.yaml"
    if path.exists() and (run / "metrics.jsonl").exists():  # else no step was made, as with missing weights
        return path, reading.read_bytes(path, reading.CONFIG).decode(errors="replace")
    return None


OWN = ("checkpoints", FINAL, "*.json", "*.jsonl", "config.yaml", "events.*")
"""What training writes into a run's folder, for runs that are part of another."""


def open_run(config: Config, device: torch.device) -> None:
    """Make the run's folder, with its config and its environment."""
    remove_partials(config.run, config.run / "checkpoints")
    checkpoint.prune(config.run / "checkpoints", config.train.keep_checkpoints)
    with replacing(config.run / "config.yaml") as file:
        file.write(config_file.dump(config).encode())
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


def _backends(wanted: str | None, device: torch.device) -> dict[str, str]:
    """What each of our operations runs on; on a GPU, where it is not Triton, with the reason."""
    chosen = kernels.backends(device, precision.dtype(wanted, device))
    reasons = {name: f": {own.reason}" if own.reason and device.type == "cuda" else "" for name, own in chosen.items()}
    return {name: f"{own.backend}{reasons[name]}" for name, own in chosen.items()}


LENGTH = ("train.steps", "train.epochs")
"""Keys that may change between two starts of one run, upwards."""

# What may change between two starts of one run: nothing that the weights of a sound run depend on. Where the data lies
# may, for list.json tells whether it is the same.
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
"""Keys of files and folders whose last name counts alone."""


def part(config: Config, name: str, out: Path, section: Affinity | Segment) -> Config:
    """The config of a training run ``out/name`` that is a stage of ``config``'s, as a section says."""
    changes = {
        "name": name,
        "out": out,
        "data": config.data.model_copy(update={"shards": None}),
        "augment": section.augment,
        "train": section.train,
    }
    return config.model_copy(update=changes)


def decisive(config: Config) -> dict[str, Any]:
    """Key (``train.lr``) -> plain value of all in a config that the weights of a sound run depend on."""
    return _flat(yaml.safe_load(config_file.dump(config)))


def differing_keys(one: Config, other: Config) -> list[str]:
    """Which of the ``decisive`` keys differ, but for those with which a run goes on (``resume``)."""
    before, now = decisive(one), decisive(other)
    keys = (before.keys() | now.keys()) - {*LENGTH, "data.train_list"}
    return sorted(key for key in keys if before.get(key) != now.get(key))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in ((prefix + name, value) for name, value in tree.items() if prefix + name not in FREE):
        if key in MAY_MOVE and value is not None:
            found[key] = Path(value).name
        else:
            found |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found
