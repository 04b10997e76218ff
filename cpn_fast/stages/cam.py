"""Stage ``cam``: write multi-scale CAM seeds of a trained network, with masks and overlays to look at."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from cpn_fast.config import Config
from cpn_fast.data.dataset import Sample, load_samples, tags
from cpn_fast.data.images import read_image
from cpn_fast.data.masks import write_mask
from cpn_fast.data.pictures import overlay
from cpn_fast.data.png import can_be_kept
from cpn_fast.data.provenance import VERSION, combined, image_digests, mark, marked_image
from cpn_fast.data.seeds import Seed, read_seed, seed_source, unit_scale, write_seed
from cpn_fast.models.backbone import to_device
from cpn_fast.models.inference import images_for, load_network, summed_cams
from cpn_fast.models.weights import require_finite
from cpn_fast.runtime import distributed, reading
from cpn_fast.runtime.backlog import Backlog
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import replacing
from cpn_fast.runtime.precision import autocast
from cpn_fast.runtime.progress import Progress
from cpn_fast.stages.results import claim_once, list_folder
from cpn_fast.training import run_folder

OWN = ("seeds", "masks", "overlays", "pictures.json")
"""What this stage writes into the folder of a list."""


def run(config: Config, weights: Path, list_path: Path | None = None) -> Path:
    """Write ``seeds/ID.npz``, ``masks/ID.png`` and ``overlays/ID.jpg`` for a list; return their folder.

    Finished images are kept while the weights and the settings are unchanged. Another ``cam.mask_threshold`` only
    redraws masks and overlays. Under torchrun each process makes its share of the list.
    """
    rank = distributed.join()
    list_path = list_path or config.data.eval_list
    samples = load_samples(config.data, config.classes, list_path, labels=True, masks=False)
    with list_folder(config.run / "cams", config, list_path, rank) as folder:
        _make(config, weights, samples, folder, rank)
    return folder


def _make(config: Config, weights: Path, samples: Sequence[Sample], folder: Path, rank: distributed.Rank) -> None:
    device = rank.device
    run_folder.require_classes(config, weights)
    network = to_device(load_network(config, weights), device)
    origin = claim_once(rank, folder, lambda: provenance(config, weights), OWN)
    share = rank.share(samples)
    missing, undrawn = [], []
    sources = seed_sources(share, origin)
    for sample in share:
        if not _finished(folder, sample, sources[sample.id]):
            missing.append(sample)
        elif not _drawn(folder, sample, sources[sample.id], config):
            undrawn.append(sample)
    batches = images_for(network, missing, config, config.cam.scales)
    writers = config.train.data_threads
    progress = Progress("cam", len(share), len(share) - len(missing))
    with ThreadPoolExecutor(writers) as pool, Backlog(writers + config.cam.batch) as writing, progress:
        for sample in undrawn:
            writing.add(pool.submit(_redraw, folder, sample, sources[sample.id], config))
        for batch in batches:
            chosen = [missing[i] for i in batch.indices]
            labels = torch.from_numpy(np.stack([tags(sample) for sample in chosen]))
            with torch.inference_mode(), autocast(config.train.precision, device):
                cams, probabilities = summed_cams(network, batch, labels, config.cam)
            for sample, cam, scores in zip(chosen, cams, probabilities, strict=True):
                writing.add(pool.submit(_write, folder, sample, cam, scores, sources[sample.id], config, weights))
            progress.advance(len(chosen))
    rank.wait()


def seed_sources(samples: Sequence[Sample], origin: str) -> dict[str, str]:
    """Return id -> the mark of its seed, made of image, tags and the folder's ``origin``, which ``claim`` returned."""
    images = image_digests([sample.image for sample in samples])
    return {
        sample.id: mark(image, origin, np.flatnonzero(tags(sample)).tolist())
        for sample, image in zip(samples, images, strict=True)
    }


def _write(
    folder: Path, sample: Sample, cam: Tensor, scores: Tensor, source: str, config: Config, weights: Path
) -> None:
    """Write an image's results. Runs in a thread: neither the GPU nor the loop waits for files."""
    seed = Seed(np.flatnonzero(tags(sample)), unit_scale(cam).cpu().numpy())
    probabilities = scores.cpu().numpy()
    for array in (seed.cam, probabilities):
        require_finite(array, weights, sample.id)
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
    # The mask is last: its presence says that both are drawn.
    write_mask(folder / "masks" / f"{sample.id}.png", mask, _mask_source(source, config))


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


def provenance(config: Config, weights: Path) -> dict[str, Any]:
    """Return what seeds are made from, beside images and tags. ``cam.pixels`` may lower the scale of an image."""
    return {
        "version": VERSION,
        "weights_sha256": reading.sha256(weights, reading.WEIGHTS),
        "classes": list(config.classes),
        "model": config.model.model_dump(mode="json", exclude={"weights"}),  # those that the training started from
        "cam": config.cam.model_dump(mode="json", exclude={"batch", "mask_threshold"}),
    }
