"""Stage ``refine``: make pseudo-masks from the training list's seeds with AffinityNet (Ahn and Kwak, CVPR 2018).

It has five parts. Each one is a folder in ``RUN/refine`` and reads the folders before it:

- ``crf-low``, ``crf-high``: masks of the dense CRF with a large and with a small background score;
- ``labels``: masks with the classes of ``crf-low``, the background of ``crf-high``, and 255 elsewhere;
- ``affinity``: AffinityNet's training run;
- ``masks``: the pseudo-masks, made from the seeds by a random walk along AffinityNet's affinities.

A finished part is skipped while its inputs are unchanged, and made again when they change. Tags and the settings of
AffinityNet's training are inputs too. An interrupted part continues where it stopped.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cpn_fast.config import Config, CrfName
from cpn_fast.data.dataset import Sample, load_samples, tags
from cpn_fast.data.images import read_image
from cpn_fast.data.masks import read_mask, write_mask
from cpn_fast.data.png import can_be_kept
from cpn_fast.data.provenance import VERSION, combined, image_digests, mark
from cpn_fast.data.seeds import Seed, read_seed, seed_digest, seed_source
from cpn_fast.methods.affinity import Affinity
from cpn_fast.models.affinity_net import AffinityNet
from cpn_fast.models.backbone import to_device
from cpn_fast.models.inference import images_for, load_affinity_net
from cpn_fast.models.weights import require_finite, weights_of
from cpn_fast.pipelines.inference import ScaledBatch
from cpn_fast.refinement.affinity import combined_labels, fitting_radius, pair_affinities
from cpn_fast.refinement.crf import (
    PARAMETERS,
    Room,
    class_values,
    dense_crf,
    process_pool,
    with_background,
    write_label_maps,
)
from cpn_fast.refinement.walk import random_walk
from cpn_fast.runtime import distributed, reading
from cpn_fast.runtime.backlog import Backlog
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import MADE_BY, read_note, remove_partials, write_json
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.precision import autocast
from cpn_fast.runtime.progress import Progress, track
from cpn_fast.stages import train
from cpn_fast.stages.cam import provenance, seed_sources
from cpn_fast.stages.results import claim_once, require_classes, require_results
from cpn_fast.training import run_folder


def run(config: Config) -> Path:
    """Refine the seeds of ``data.train_list``; return the folder of pseudo-masks, ``ID.png`` with VOC's palette.

    Under torchrun each process makes its share. Raises UserError for missing, damaged or outdated seeds.
    """
    rank = distributed.join()
    samples = load_samples(config.data, config.classes, config.data.train_list, labels=True, masks=False)
    train.check_batch(config.affinity.train, rank.world, len(samples), "affinity.train")
    folder = config.run / "refine"
    with owned(folder, rank):
        return _refine(config, folder, samples, rank)


def _refine(config: Config, folder: Path, samples: Sequence[Sample], rank: distributed.Rank) -> Path:
    seeds = _seeds(config, samples)
    tags_digest = ""
    if rank.first:
        remove_partials(folder)
        tags_digest = _remember_tags(folder, samples)
    share = rank.share(samples)
    workers = config.crf.workers or rank.cores
    images = image_digests([sample.image for sample in share])
    sources = {
        sample.id: mark(image, seed_digest(seeds / f"{sample.id}.npz"))
        for sample, image in zip(share, images, strict=True)
    }
    alphas = {folder / "crf-low": config.crf.low_alpha, folder / "crf-high": config.crf.high_alpha}
    for masks, alpha in alphas.items():
        claim_once(rank, masks, partial(dict, version=VERSION, alpha=alpha, parameters=config.crf.parameters))
    write_label_maps(share, seeds, alphas, sources=sources, parameters=config.crf.parameters, workers=workers)
    rank.wait()
    claim_once(rank, folder / "labels", lambda: {"version": VERSION})
    write_labels(share, folder / "crf-low", folder / "crf-high", folder / "labels")
    rank.wait()
    settings = affinity_config(config)
    # Each process digests its share of AffinityNet's inputs, so that every file is read once.
    digests = rank.gather(
        [(sample.id, image, label_digest(folder, sample)) for sample, image in zip(share, images, strict=True)]
    )
    trained_from = {
        "version": VERSION,
        "images": combined(sorted((id_, image) for part in digests for id_, image, _ in part)),
        "labels": combined(sorted((id_, label) for part in digests for id_, _, label in part)),
        "tags": tags_digest,
        "radius": config.affinity.radius,
        **run_folder.decisive(settings),
    }
    with owned(settings.run, rank):
        claim_once(
            rank,
            settings.run,
            lambda: trained_from,
            run_folder.OWN,
            free=run_folder.LENGTH,
            check=lambda: train.check_start(settings, Affinity),
        )
        weights = train.fit(settings, Affinity, part_of=(config, "affinity"))
    claim_once(
        rank,
        folder / "masks",
        lambda: {
            "version": VERSION,
            "weights_sha256": reading.sha256(weights, reading.WEIGHTS),
            "classes": list(config.classes),
            "radius": config.affinity.radius,
            "pixels": config.cam.pixels,  # may lower the scale of an image
            **config.walk.model_dump(mode="json"),
        },
    )
    walk(config, weights, share, seeds, folder / "masks", sources=sources, device=rank.device, workers=workers)
    rank.wait()
    return folder / "masks"


def label_digest(folder: Path, sample: Sample) -> str:
    """Return the SHA-256 of an image's label map for AffinityNet."""
    return reading.sha256(folder / "labels" / f"{sample.id}.png", reading.MASK)


def affinity_config(config: Config) -> Config:
    """Return the config of AffinityNet's training run ``RUN/refine/affinity``, on the labels beside it."""
    training = run_folder.part(config, "affinity", config.run / "refine", config.affinity)
    return training.model_copy(update={"model": config.model.model_copy(update={"stride": 8})})


def write_labels(samples: Sequence[Sample], low: Path, high: Path, folder: Path) -> None:
    """Write the combined labels of two mask folders. Files that were made from the same masks are kept."""

    def source(sample: Sample) -> str:
        name = f"{sample.id}.png"
        contents = (reading.read_bytes(masks / name, reading.MASK) for masks in (low, high))
        return hashlib.sha256(b"".join(contents)).hexdigest()

    sources = {sample.id: source(sample) for sample in samples}
    missing = [sample for sample in samples if not can_be_kept(folder / f"{sample.id}.png", sources[sample.id])]

    def write(sample: Sample) -> None:
        name = f"{sample.id}.png"
        labels = combined_labels(read_mask(low / name), read_mask(high / name))
        write_mask(folder / name, labels, sources[sample.id])

    with ThreadPoolExecutor() as pool:
        try:
            for _ in track(pool.map(write, missing), "affinity labels", total=len(missing)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def walk(
    config: Config,
    weights: Path,
    samples: Sequence[Sample],
    seeds: Path,
    folder: Path,
    *,
    sources: Mapping[str, str],
    device: torch.device,
    workers: int,
) -> None:
    """Write ``folder/ID.png``, the mask of ``seeds/ID.npz`` after the walk. Masks of ``sources[ID]`` are kept."""
    missing = [sample for sample in samples if not can_be_kept(folder / f"{sample.id}.png", sources[sample.id])]
    if not missing:
        return
    network = to_device(load_affinity_net(config, weights), device)
    batches = images_for(network, missing, config, (1.0,))
    pool: Executor
    progress = Progress("random walk", len(samples), len(samples) - len(missing))
    writing = Backlog(workers + config.cam.batch)
    with process_pool(workers) if config.walk.crf else ThreadPoolExecutor(workers) as pool, writing, progress:
        room = Room()
        for batch in batches:
            chosen = [missing[index] for index in batch.indices]
            read = [read_seed(seeds / f"{sample.id}.npz") for sample in chosen]
            for sample, seed, scores in zip(chosen, read, walked_scores(network, batch, read, config), strict=True):
                require_finite(scores, weights, sample.id)
                path, values, source = folder / f"{sample.id}.png", class_values(seed), sources[sample.id]
                job = partial(_write_mask, path, sample.image, scores, values, source, config.walk.crf)
                in_room = config.walk.crf is not None
                writing.add(room.submit(pool, scores[0].size, len(scores), job) if in_room else pool.submit(job))
            progress.advance(len(chosen))


@torch.inference_mode()
def walked_scores(network: AffinityNet, batch: ScaledBatch, seeds: Sequence[Seed], config: Config) -> list[np.ndarray]:
    """Return scores of background and present classes after the walk, float32 (1 + k, H, W) for each image.

    All images of the batch have one size. The seeds are averaged over the cells of the feature map, walk there, and are
    enlarged bilinearly. The released code first pads images to a multiple of 8 pixels: at such sizes both agree.
    """
    images = batch.scales[0].contiguous(memory_format=torch.channels_last)
    with autocast(config.affinity.train.precision, images.device):
        features = network(images)
    height, width = features.shape[2:]
    radius = fitting_radius(config.affinity.radius, height, width)
    scores = [torch.from_numpy(with_background(seed, config.walk.alpha)).to(images.device) for seed in seeds]
    planes = max(map(len, scores))
    pooled = torch.stack([_padded(F.adaptive_avg_pool2d(before, (height, width)), planes) for before in scores])
    affinities = pair_affinities(features, radius)
    walked = random_walk(affinities, pooled, radius=radius, beta=config.walk.beta, logt=config.walk.logt)
    large = F.interpolate(walked, batch.size, mode="bilinear", align_corners=False)
    return [after[: len(before)].cpu().numpy() for after, before in zip(large, scores, strict=True)]


def _padded(scores: Tensor, planes: int) -> Tensor:
    """Append planes of 0 to (k, h, w). The walk leaves them 0."""
    return F.pad(scores, (0, 0, 0, 0, 0, planes - len(scores)))


def _write_mask(
    path: Path, image: Path, scores: np.ndarray, values: np.ndarray, source: str, crf: CrfName | None
) -> None:
    """Write an image's mask. Runs in another thread or process: the network does not wait for files."""
    if crf is not None:
        scores = dense_crf(read_image(image), scores, PARAMETERS[crf])
    write_mask(path, values[scores.argmax(0)], source)


def _seeds(config: Config, samples: Sequence[Sample]) -> Path:
    """Return the folder of the seeds. Raises UserError if any are missing, or their images or tags have changed."""
    folder = config.run / "cams" / config.list_name(config.data.train_list)
    again = f"cpn-fast cam CONFIG --list {config.data.train_list}"

    require_results(folder / "seeds", "seed", samples, config.data.train_list, f"Make them first: {again}")
    manifest = folder / MADE_BY
    if not manifest.exists():
        raise UserError(f"{manifest}: not found; `cpn-fast cam` writes it beside the seeds")
    require_classes(folder / "seeds", config.classes)
    expected = seed_sources(samples, reading.sha256(manifest, reading.NOTE))
    outdated = [
        id_ for id_, source in expected.items() if seed_source(folder / "seeds" / f"{id_}.npz") not in (None, source)
    ]
    if outdated:
        raise UserError(
            f"{folder / 'seeds'}: {len(outdated)} seeds were made from images or tags that have changed "
            f"({some(outdated, 3)}). Make them again first: {again}"
        )
    weights = weights_of(config.run, config)
    if weights.exists() and distributed.join().first:
        made_by, now = read_note(manifest) or {}, provenance(config, weights)
        changed = [key for key in now if made_by.get(key) != now[key]]
        if changed:
            print(
                f"Warning: the seeds in {folder} were made with other settings or weights than the run has now "
                f"({', '.join(changed)}). To make them again: {again}",
                file=sys.stderr,
            )
    return folder / "seeds"


def _remember_tags(folder: Path, samples: Sequence[Sample]) -> str:
    """Write the tags of all images to tags.json; return the digest of the list and its tags."""
    path, now = folder / "tags.json", {sample.id: np.flatnonzero(tags(sample)).tolist() for sample in samples}
    if read_note(path) != now:
        write_json(path, now)
    return combined(now)
