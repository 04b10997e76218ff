"""Stage ``refine``: from seeds of the training list to pseudo-masks, by AffinityNet (Ahn and Kwak, CVPR 2018).

Its parts read each other's files, in ``refine`` in the run's folder:

- ``crf-low``, ``crf-high``: masks of the dense CRF with a large and with a small background score;
- ``labels``: what both are sure of, masks with 255 elsewhere;
- ``affinity``: AffinityNet's training run;
- ``masks``: the pseudo-masks, seeds that walked along AffinityNet's affinities.

A part is skipped when it is finished and what it was made of is unchanged, made again when that changed (tags and
settings of AffinityNet's training among it), and continued in the middle when it was interrupted.
"""

from __future__ import annotations

import hashlib
import os
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
from cpn_fast.models.inference import images_for, load_affinity_net
from cpn_fast.models.weights import require_finite
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
from cpn_fast.runtime.files import read_note, remove_partials, write_json
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.precision import autocast
from cpn_fast.runtime.progress import Progress, track
from cpn_fast.stages import train
from cpn_fast.stages.cam import seed_sources
from cpn_fast.stages.results import claim_once, require_results
from cpn_fast.training import run_folder


def run(config: Config) -> Path:
    """Refine the seeds of ``data.train_list``; returns the folder of pseudo-masks, ``ID.png`` with VOC's palette.

    Under torchrun each process makes its share. Raises UserError for seeds that are missing or damaged.
    """
    rank = distributed.join()
    samples = load_samples(config.data, config.classes, config.data.train_list, labels=True, masks=False)
    train.check_batch(config.affinity.train, rank.world, len(samples), "affinity.train")
    folder = config.run / "refine"
    with owned(folder, rank):
        return _refine(config, folder, samples, rank)


def _refine(config: Config, folder: Path, samples: Sequence[Sample], rank: distributed.Rank) -> Path:
    seeds = _seeds(config, samples)
    listed = ""
    if rank.first:
        remove_partials(folder)
        listed = _remember_tags(folder, samples)
    own = rank.share(samples)
    workers = config.crf.workers or max(1, (os.cpu_count() or 1) // rank.world)
    images = image_digests([sample.image for sample in own])
    sources = {
        sample.id: mark(image, seed_digest(seeds / f"{sample.id}.npz"))
        for sample, image in zip(own, images, strict=True)
    }
    alphas = {folder / "crf-low": config.crf.low_alpha, folder / "crf-high": config.crf.high_alpha}
    for place, alpha in alphas.items():
        claim_once(rank, place, {"version": VERSION, "alpha": alpha, "parameters": config.crf.parameters})
    write_label_maps(own, seeds, alphas, sources=sources, parameters=config.crf.parameters, workers=workers)
    rank.wait()
    claim_once(rank, folder / "labels", {"version": VERSION})
    write_labels(own, folder / "crf-low", folder / "crf-high", folder / "labels")
    rank.wait()
    settings = affinity_config(config)
    # Of each process's share, for a file is read once: what AffinityNet is trained on.
    made_of = rank.gather(
        [(sample.id, image, label_digest(folder, sample)) for sample, image in zip(own, images, strict=True)]
    )
    made_by = {
        "version": VERSION,
        "images": combined(sorted((id_, image) for share in made_of for id_, image, _ in share)),
        "labels": combined(sorted((id_, label) for share in made_of for id_, _, label in share)),
        "tags": listed,
        "radius": config.affinity.radius,
    }
    with owned(settings.run, rank):
        claim_once(rank, settings.run, made_by | run_folder.decisive(settings), run_folder.OWN, free=run_folder.LENGTH)
        weights = train.fit(settings, Affinity, part_of=(config, "affinity"))
    made_by = {
        "version": VERSION,
        "weights_sha256": reading.sha256(weights, reading.WEIGHTS),
        "radius": config.affinity.radius,
        **config.walk.model_dump(mode="json"),
    }
    claim_once(rank, folder / "masks", made_by)
    walk(config, weights, own, seeds, folder / "masks", sources=sources, device=rank.device, workers=workers)
    rank.wait()
    return folder / "masks"


def label_digest(folder: Path, sample: Sample) -> str:
    return reading.sha256(folder / "labels" / f"{sample.id}.png", reading.MASK)


def affinity_config(config: Config) -> Config:
    """The training run of AffinityNet in ``RUN/refine/affinity``, on the labels beside it."""
    training = run_folder.part(config, "affinity", config.run / "refine", config.affinity)
    return training.model_copy(update={"model": config.model.model_copy(update={"stride": 8})})


def write_labels(samples: Sequence[Sample], low: Path, high: Path, folder: Path) -> None:
    """Write ``combined_labels`` of two folders of masks, for the samples that have none of these very masks yet."""

    def source(sample: Sample) -> str:
        name = f"{sample.id}.png"
        contents = (reading.read_bytes(place / name, reading.MASK) for place in (low, high))
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
    """Write ``folder/ID.png``, the mask of ``seeds/ID.npz`` after the walk, where none of ``sources[ID]`` is yet."""
    missing = [sample for sample in samples if not can_be_kept(folder / f"{sample.id}.png", sources[sample.id])]
    if not missing:
        return
    network = load_affinity_net(config, weights).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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
    """Scores of background and present classes after the walk, float32 (1 + k, H, W), of images of one size.

    The seeds are averaged over the cells of the feature map, walk there, and are enlarged bilinearly. The released code
    pads to a multiple of 8 pixels first: at such sizes both are the same.
    """
    images = batch.scales[0].contiguous(memory_format=torch.channels_last)
    with autocast(config.affinity.train.precision, images.device):
        features = network(images)
    height, width = features.shape[2:]
    radius = fitting_radius(config.affinity.radius, height, width)
    scores = [torch.from_numpy(with_background(seed, config.walk.alpha)).to(images.device) for seed in seeds]
    planes = max(len(own) for own in scores)
    pooled = torch.stack([_filled(F.adaptive_avg_pool2d(own, (height, width)), planes) for own in scores])
    affinities = pair_affinities(features, radius)
    walked = random_walk(affinities, pooled, radius=radius, beta=config.walk.beta, logt=config.walk.logt)
    large = F.interpolate(walked, batch.size, mode="bilinear", align_corners=False)
    return [own[: len(before)].cpu().numpy() for own, before in zip(large, scores, strict=True)]


def _filled(scores: Tensor, planes: int) -> Tensor:
    """Planes of 0 behind (k, h, w), which stay 0 in the walk."""
    return F.pad(scores, (0, 0, 0, 0, 0, planes - len(scores)))


def _write_mask(
    path: Path, image: Path, scores: np.ndarray, values: np.ndarray, source: str, crf: CrfName | None
) -> None:
    """In another thread or process, so that the network need not wait for files."""
    if crf is not None:
        scores = dense_crf(read_image(image), scores, PARAMETERS[crf])
    write_mask(path, values[scores.argmax(0)], source)


def _seeds(config: Config, samples: Sequence[Sample]) -> Path:
    """Folder of the seeds. Raises UserError if some are missing, or are of other images or tags than are there now."""
    folder = config.run / "cams" / config.list_name(config.data.train_list)
    again = f"cpn-fast cam CONFIG --list {config.data.train_list}"

    require_results(folder / "seeds", "seed", samples, config.data.train_list, f"Make them first: {again}")
    manifest = folder / "made_by.json"
    if not manifest.exists():
        raise UserError(f"{manifest}: expected beside the seeds, which `cpn-fast cam` makes, and not found")
    expected = seed_sources(samples, reading.sha256(manifest, reading.NOTE))
    old = [
        id_ for id_, source in expected.items() if seed_source(folder / "seeds" / f"{id_}.npz") not in (None, source)
    ]
    if old:
        raise UserError(
            f"{folder / 'seeds'}: {len(old)} seeds are of other images or other tags than are there now "
            f"({some(old, 3)}). Make them anew first: {again}"
        )
    return folder / "seeds"


def _remember_tags(folder: Path, samples: Sequence[Sample]) -> str:
    """Write down which tags the parts follow from; returns a digest of the list and its tags."""
    path, now = folder / "tags.json", {sample.id: np.flatnonzero(tags(sample)).tolist() for sample in samples}
    if read_note(path) != now:
        write_json(path, now)
    return combined(now)
