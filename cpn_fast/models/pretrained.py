"""Start a training from pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from cpn_fast import config_file
from cpn_fast.config import TIMM_WEIGHTS, Model
from cpn_fast.models.backbone import Headed
from cpn_fast.models.network import HEADS
from cpn_fast.models.timm_backbone import TimmBackbone, pretrained_by_timm
from cpn_fast.models.weights import in_package, load_into, note_of, read_weights, to_network_keys
from cpn_fast.runtime.errors import UserError


def load_pretrained(network: Headed, model: Model) -> list[str]:
    """Load the weights that the config names, if any. Returns the heads that stay random.

    Raises UserError as ``start_from`` does, and for a network with frozen layers if the config names no weights.
    """
    if model.weights is not None:
        return start_from(network, model.weights)
    if network.backbone.frozen:
        raise UserError(
            f"model.weights is null, but {model.backbone} does not train its first layers and its batch statistics, so "
            "it cannot start from random weights. Name a file of pretrained weights; docs/voc.md says where to get one"
        )
    return []


def start_from(network: Headed, path: Path) -> list[str]:
    """Load pretrained weights. The backbone's weights must fit; heads that do not fit stay random.

    The file may hold a backbone, a classifier, or one of our networks, also with other classes. ``TIMM_WEIGHTS``
    stands for timm's. Returns the heads that stay random. Raises UserError as ``load_into`` does, and if the weights
    were trained with another normalisation than the usual one, which the network has.
    """
    state, backbone = network.state_dict(), network.backbone

    def fits(key: str, tensor: Tensor) -> bool:
        return key.split(".")[0] not in HEADS or (key in state and state[key].shape == tensor.shape)

    if isinstance(backbone, TimmBackbone) and path == TIMM_WEIGHTS:
        content = pretrained_by_timm(backbone.name)
    else:
        content = read_weights(path)
        _require_normalisation(network, path, content)
    tensors = {k: tensor for k, tensor in to_network_keys(backbone.pretrained(content)).items() if fits(k, tensor)}
    loaded = load_into(
        network,
        tensors,
        source=path,
        allow_missing=[*(f"{head}.*" for head in HEADS), "backbone.inner"],
        allow_unexpected=[f"backbone.{pattern}" for pattern in backbone.classifier],
    )
    return [name for name in dict.fromkeys(key.split(".")[0] for key in loaded.missing) if name in HEADS]


def _require_normalisation(network: Headed, path: Path, content: Mapping[str, Tensor]) -> None:
    """Raise UserError if a file's images had other mean and std, and the network has the backbone's usual ones."""
    backbone = network.backbone
    usual = backbone.mean, backbone.std
    trained = backbone.normalisation(content)
    if config := note_of(in_package(path)).get("config"):
        model = config_file.read(config, str(path)).model
        trained = model.mean or backbone.mean, model.std or backbone.std
    if trained != usual and (network.mean, network.std) == usual:
        mean, std = (str(list(values)).replace(" ", "") for values in trained)  # as a shell needs them
        raise UserError(
            f"{path}: these weights were trained on images with another normalisation: set model.mean={mean} and "
            f"model.std={std}"
        )


def measure_features(network: Headed, images: Sequence[np.ndarray], side: int) -> None:
    """Scale a timm backbone's inner features to the rms of ``images``, uint8 RGB; only once."""
    backbone = network.backbone
    if not isinstance(backbone, TimmBackbone) or backbone.measured:
        return
    squares = np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images])
    normalised = (torch.from_numpy(squares) - torch.tensor(network.mean)) / torch.tensor(network.std)
    backbone.measure(normalised.permute(0, 3, 1, 2))
