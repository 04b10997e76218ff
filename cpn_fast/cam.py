"""Stage ``cam``: multi-scale CAM seeds of a trained network, with masks and overlays to look at."""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cpn_fast import ranks, reading
from cpn_fast.config import Cam, Config
from cpn_fast.dataset import Sample, load_samples
from cpn_fast.errors import UserError
from cpn_fast.files import claim, replacing, write_json
from cpn_fast.images import can_be_kept
from cpn_fast.kernels import pooled_logits
from cpn_fast.masks import overlay, write_mask
from cpn_fast.models.backbone import Headed
from cpn_fast.models.folding import fold
from cpn_fast.models.network import Network, build_network
from cpn_fast.owner import owned
from cpn_fast.pipelines.inference import ScaledBatch, scaled_images
from cpn_fast.pipelines.superpixels import read_image
from cpn_fast.precision import autocast
from cpn_fast.progress import Progress
from cpn_fast.provenance import VERSION, combined, image_digests, mark, marked_image
from cpn_fast.seeds import Seed, read_seed, seed_source, unit_scale, write_seed
from cpn_fast.weights import load_into, read_weights, require_finite, to_network_keys

OWN = ("seeds", "masks", "overlays", "pictures.json")
"""What this stage writes for a list."""
LISTED = "listed.json"
"""Says, in the folder of a list's results, which list that is."""


def run(config: Config, weights: Path, list_path: Path | None = None) -> Path:
    """Write ``seeds/ID.npz``, ``masks/ID.png`` and ``overlays/ID.jpg`` for a list; returns their folder.

    Finished images are kept when the weights and the settings are the same, and made again when they are not; another
    ``cam.mask_threshold`` only draws masks and overlays anew. Under torchrun each process makes its share of the list.
    """
    rank = ranks.join()
    list_path = list_path or config.data.eval_list
    samples = load_samples(config.data, config.classes, list_path, labels=True, masks=False)
    folder = config.run / "cams" / config.list_name(list_path)
    with owned(folder, rank):
        if rank.first:
            write_json(folder / LISTED, {"list": str(list_path)})
        _make(config, weights, samples, folder, rank)
    return folder


def _make(config: Config, weights: Path, samples: Sequence[Sample], folder: Path, rank: ranks.Rank) -> None:
    device = rank.device
    network = load_network(config, weights).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    origin = claim(folder, _made_by(config, weights), OWN) if rank.first else ""
    origin = rank.gather(origin)[0]
    own = rank.share(samples)
    missing, undrawn = [], []
    sources = seed_sources(own, origin)
    for sample in own:
        if not _finished(folder, sample, sources[sample.id]):
            missing.append(sample)
        elif not _drawn(folder, sample, sources[sample.id], config):
            undrawn.append(sample)
    batches = images_for(network, missing, config, config.cam.scales)
    writers = config.train.data_threads
    with ThreadPoolExecutor(writers) as pool, Progress("cam", len(own), len(own) - len(missing)) as progress:
        writing: deque[Future[None]] = deque(
            pool.submit(_redraw, folder, sample, sources[sample.id], config) for sample in undrawn
        )
        for batch in batches:
            chosen = [missing[i] for i in batch.indices]
            labels = torch.from_numpy(np.stack([tags(sample) for sample in chosen]))
            with torch.inference_mode(), autocast(config.train.precision, device):
                cams, probabilities = summed_cams(network, batch, labels, config.cam)
            for sample, cam, found in zip(chosen, cams, probabilities, strict=True):
                writing.append(pool.submit(_write, folder, sample, cam, found, sources[sample.id], config, weights))
            while len(writing) > writers + len(chosen):  # bounds what waits in memory
                writing.popleft().result()
            progress.advance(len(chosen))
        for written in writing:
            written.result()
    rank.wait()


def seed_sources(samples: Sequence[Sample], origin: str) -> dict[str, str]:
    """Id -> what its seed is made of: image, tags, and the ``origin`` of the folder, which ``claim`` returned."""
    images = image_digests([sample.image for sample in samples])
    return {
        sample.id: mark(image, origin, np.flatnonzero(tags(sample)).tolist())
        for sample, image in zip(samples, images, strict=True)
    }


def tags(sample: Sample) -> np.ndarray:
    """The labels of a sample that was loaded with them, bool (classes,)."""
    assert sample.label is not None
    return sample.label


def load_network(config: Config, weights: Path) -> Network:
    """The experiment's network for inference, with weights of a checkpoint, a ``.safetensors`` or a released file."""
    network = build_network(config)
    load_into(network, to_network_keys(read_weights(weights)), source=weights)
    return fold(network.eval())


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


def _foreground(network: Network, views: Tensor, labels: Tensor, map: str) -> tuple[Tensor, Tensor]:
    """Both float32 (V, classes, h, w): the map, and the raw one with what is below 0, which the classifier pools.

    views (V, 3, H, W): the labelled images may come more than once.
    """
    labels = labels.repeat(len(views) // len(labels), 1)
    cams = network(views.contiguous(memory_format=torch.channels_last), labels)
    raw = cams.raw[:, 1:].float()
    return cams.refined[:, 1:].float() if map == "refined" else F.relu(raw), raw


def _resize(maps: Tensor, size: Sequence[int], *, corners: bool) -> Tensor:
    if maps.shape[0] == 0:
        return maps.new_zeros(0, *size)
    return F.interpolate(maps[None], tuple(size), mode="bilinear", align_corners=corners)[0]


def _write(
    folder: Path, sample: Sample, cam: Tensor, found: Tensor, source: str, config: Config, weights: Path
) -> None:
    """In a thread, so that neither the GPU nor the loop that feeds it waits for files."""
    seed = Seed(np.flatnonzero(tags(sample)), unit_scale(cam).cpu().numpy())
    probabilities = found.cpu().numpy()
    for made in (seed.cam, probabilities):
        require_finite(made, weights, sample.id)
    _draw(folder, sample, seed, source, config)
    path = folder / "seeds" / f"{sample.id}.npz"
    write_seed(path, seed, source, probabilities)  # last: its presence says that the image is done


def _redraw(folder: Path, sample: Sample, source: str, config: Config) -> None:
    _draw(folder, sample, read_seed(folder / "seeds" / f"{sample.id}.npz"), source, config)


def _draw(folder: Path, sample: Sample, seed: Seed, source: str, config: Config) -> None:
    mask = seed.mask(config.cam.mask_threshold)
    picture = overlay(read_image(sample.image), mask, config.classes)
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    with replacing(folder / "overlays" / f"{sample.id}.jpg") as file:
        file.write(jpeg.tobytes())
    write_mask(folder / "masks" / f"{sample.id}.png", mask, _mask_source(source, config))  # last: it tells of both


def _mask_source(seed: str, config: Config) -> str:
    return f"{combined(seed, config.cam.mask_threshold)} {marked_image(seed)}"


def _finished(folder: Path, sample: Sample, source: str) -> bool:
    path = folder / "seeds" / f"{sample.id}.npz"
    if not path.exists():
        return False
    try:
        read_seed(path)
    except UserError:
        print(f"Warning: {path} is damaged and made again", file=sys.stderr)
        return False
    return seed_source(path) == source


def _drawn(folder: Path, sample: Sample, source: str, config: Config) -> bool:
    mask, overlay = folder / "masks" / f"{sample.id}.png", folder / "overlays" / f"{sample.id}.jpg"
    return can_be_kept(mask, _mask_source(source, config)) and overlay.exists()


def _made_by(config: Config, weights: Path) -> dict[str, Any]:
    return {
        "version": VERSION,
        "weights_sha256": hashlib.sha256(reading.read_bytes(weights, reading.WEIGHTS)).hexdigest(),
        "classes": list(config.classes),
        "model": config.model.model_dump(mode="json"),
        "cam": config.cam.model_dump(mode="json", exclude={"batch", "pixels", "mask_threshold"}),
    }
