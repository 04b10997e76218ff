"""Trained networks: load them, feed them images, and compute CAMs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpn_fast.config import Cam, Config
from cpn_fast.data.dataset import Sample
from cpn_fast.kernels import pooled_logits
from cpn_fast.models.affinity_net import AffinityNet, build_affinity_net
from cpn_fast.models.backbone import Headed
from cpn_fast.models.folding import fold
from cpn_fast.models.network import Network, build_network
from cpn_fast.models.weights import load_into, read_weights, to_network_keys
from cpn_fast.pipelines.inference import ScaledBatch, scaled_images

Trained = TypeVar("Trained", bound=nn.Module)


def trained(network: Trained, weights: Path) -> Trained:
    """Load a file's weights into the network and prepare it for inference. Raises UserError as ``load_into``."""
    load_into(network, to_network_keys(read_weights(weights)), source=weights)
    return fold(network.eval())


def load_network(config: Config, weights: Path) -> Network:
    """Return the config's network for inference, with weights of a checkpoint, a .safetensors or a released file."""
    return trained(build_network(config), weights)


def images_for(
    network: Headed, samples: Sequence[Sample], config: Config, scales: Sequence[float], *, batch: int | None = None
) -> Iterator[ScaledBatch]:
    """Yield ``scaled_images`` for a network, on its device, at most ``batch`` at a time (default ``cam.batch``)."""
    return scaled_images(
        samples,
        scales=scales,
        mean=network.mean,
        std=network.std,
        batch=batch or config.cam.batch,
        pixels=config.cam.pixels,
        device=next(network.parameters()).device,
        threads=config.train.data_threads,
        fit=network.backbone.fit,
    )


class Summed(NamedTuple):
    """A network's outputs for images of one size."""

    cams: list[Tensor]
    """For each image the CAMs of present classes, summed over scales and flips: float32 (present, H, W)."""
    probabilities: Tensor
    """Probabilities of all classes, tagged or not, at ``nearest_scale``: float32 (B, classes)."""


def summed_cams(network: Network, batch: ScaledBatch, labels: Tensor, options: Cam) -> Summed:
    """Return CAMs and probabilities of images; labels: (B, classes) bool, on the CPU.

    A forward pass takes the images together with their mirror images, or one after the other if both have more than
    ``options.pixels`` pixels.

    Nothing here waits for the GPU, so it always has the next pass in its queue. A CUDA graph would save no time
    (docs/speed.md).
    """
    sums: list[Tensor] = []
    device = batch.scales[0].device
    chosen = [label.nonzero().flatten().tolist() for label in labels]
    labels = labels.float()
    if device.type == "cuda":
        labels = labels.pin_memory()  # a copy from pageable memory would wait
    labels = labels.to(device, non_blocking=True)
    classified = nearest_scale(batch)
    for index, images in enumerate(batch.scales):
        passes = forward_batches(images, flip=options.flip, pixels=options.pixels)
        outputs = [_foreground(network, inputs, labels, options.map) for inputs in passes]
        maps = torch.cat([cams for cams, _ in outputs])
        if index == classified:
            size = images.shape[2], images.shape[3]
            probabilities = pooled_logits(outputs[0][1][: len(images)], size=size).sigmoid()
        if options.flip:
            maps = maps[: len(images)] + maps[len(images) :].flip(3)
        present = [torch.stack([cam[k] for k in ks]) if ks else cam[:0] for cam, ks in zip(maps, chosen, strict=True)]
        # Resized twice, as released: to the size of the network's input, then to that of the image.
        full = [_resize(_resize(cam, images.shape[2:], corners=True), batch.size, corners=False) for cam in present]
        sums = [a.add_(b) for a, b in zip(sums, full, strict=True)] if sums else full
    return Summed(sums, probabilities)


def forward_batches(images: Tensor, *, flip: bool, pixels: int) -> list[Tensor]:
    """Return the inputs of forward passes: images (B, 3, H, W), with ``flip`` also their mirror images.

    Both are one batch (2B, 3, H, W), or two batches if one would have more than ``pixels`` pixels.
    """
    if not flip:
        return [images]
    mirrored = images.flip(3)
    return [torch.cat([images, mirrored])] if 2 * images[:, 0].numel() <= pixels else [images, mirrored]


def nearest_scale(batch: ScaledBatch) -> int:
    """Return the index of the scale nearest to the original size; the network classifies images at this scale."""
    return min(range(len(batch.scales)), key=lambda i: abs(batch.scales[i].shape[2] - batch.size[0]))


def _foreground(network: Network, images: Tensor, labels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the maps of ``kind`` and the raw logits, which the classifier pools; both float32 (V, classes, h, w).

    images (V, 3, H, W): the labelled images once, or again mirrored.
    """
    labels = labels.repeat(len(images) // len(labels), 1)
    cams = network(images.contiguous(memory_format=torch.channels_last), labels)
    raw = cams.raw[:, 1:].float()
    return cams.refined[:, 1:].float() if kind == "refined" else F.relu(raw), raw


def _resize(maps: Tensor, size: Sequence[int], *, corners: bool) -> Tensor:
    if maps.shape[0] == 0:
        return maps.new_zeros(0, *size)
    return F.interpolate(maps[None], tuple(size), mode="bilinear", align_corners=corners)[0]


def load_affinity_net(config: Config, weights: Path) -> AffinityNet:
    """Return the config's AffinityNet for inference, with trained or released weights."""
    return trained(build_affinity_net(config.model), weights)
