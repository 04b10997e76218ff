"""Trained networks: loading them, images as they take them, their CAMs."""

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
    """The network for inference, batch normalisation folded, with a file's weights. Raises as ``load_into``."""
    load_into(network, to_network_keys(read_weights(weights)), source=weights)
    return fold(network.eval())


def load_network(config: Config, weights: Path) -> Network:
    """The experiment's network for inference, with weights of a checkpoint, a ``.safetensors`` or a released file."""
    return trained(build_network(config), weights)


def images_for(
    network: Headed, samples: Sequence[Sample], config: Config, scales: Sequence[float], *, batch: int | None = None
) -> Iterator[ScaledBatch]:
    """``scaled_images`` as a network takes them, on its device: up to ``batch`` (``cam.batch``) at a time."""
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
    """What a network makes of images of one size."""

    cams: list[Tensor]
    """Sum over scales and flips of the CAMs of present classes at the original size: float32 (present, H, W) each."""
    probabilities: Tensor
    """float32 (B, classes): of every class, whatever the tags, at ``nearest_scale``."""


def summed_cams(network: Network, batch: ScaledBatch, labels: Tensor, options: Cam) -> Summed:
    """CAMs and probabilities of images; labels: (B, classes) bool, on the CPU.

    A forward pass holds the images and their mirror images, or one after the other where both would exceed
    ``options.pixels``.

    Nothing here waits for the GPU, which is given the next pass while it computes one. So launching costs no time that
    a CUDA graph could save (docs/scaling.md).
    """
    sums: list[Tensor] = []
    device = batch.scales[0].device
    chosen = [label.nonzero().flatten().tolist() for label in labels]
    labels = labels.float()
    if device.type == "cuda":
        labels = labels.pin_memory()  # a copy from other memory would wait
    labels = labels.to(device, non_blocking=True)
    own_size = nearest_scale(batch)
    for place, images in enumerate(batch.scales):
        passes = [images]
        if options.flip:
            mirrored = images.flip(3)
            fits = 2 * images[:, 0].numel() <= options.pixels
            passes = [torch.cat([images, mirrored])] if fits else [images, mirrored]
        seen = [_foreground(network, views, labels, options.map) for views in passes]
        maps = torch.cat([own for own, _ in seen])
        if place == own_size:
            size = images.shape[2], images.shape[3]
            probabilities = pooled_logits(seen[0][1][: len(images)], size=size).sigmoid()
        if options.flip:
            maps = maps[: len(images)] + maps[len(images) :].flip(3)
        present = [torch.stack([own[k] for k in ks]) if ks else own[:0] for own, ks in zip(maps, chosen, strict=True)]
        # Twice, as released: the network's output size first, then the image's.
        full = [_resize(_resize(own, images.shape[2:], corners=True), batch.size, corners=False) for own in present]
        sums = [a.add_(b) for a, b in zip(sums, full, strict=True)] if sums else full
    return Summed(sums, probabilities)


def nearest_scale(batch: ScaledBatch) -> int:
    """Which of ``batch.scales`` is nearest to the images' own size, where the network is asked for classes."""
    return min(range(len(batch.scales)), key=lambda i: abs(batch.scales[i].shape[2] - batch.size[0]))


def _foreground(network: Network, views: Tensor, labels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Both float32 (V, classes, h, w): the map, and the raw one with what is below 0, which the classifier pools.

    views (V, 3, H, W): the labelled images may come more than once.
    """
    labels = labels.repeat(len(views) // len(labels), 1)
    cams = network(views.contiguous(memory_format=torch.channels_last), labels)
    raw = cams.raw[:, 1:].float()
    return cams.refined[:, 1:].float() if kind == "refined" else F.relu(raw), raw


def _resize(maps: Tensor, size: Sequence[int], *, corners: bool) -> Tensor:
    if maps.shape[0] == 0:
        return maps.new_zeros(0, *size)
    return F.interpolate(maps[None], tuple(size), mode="bilinear", align_corners=corners)[0]


def load_affinity_net(config: Config, weights: Path) -> AffinityNet:
    """The experiment's AffinityNet for inference, with trained weights or those of a released file."""
    return trained(build_affinity_net(config.model), weights)
