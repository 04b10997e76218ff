"""Stage ``segment``: train a DeepLab segmenter on pseudo-masks and write its masks. The segmenter needs no tags.

``RUN/segment/deeplab`` is its training run. ``RUN/segment/LIST`` has the masks of a list: ``masks`` before the dense
CRF and ``crf`` after it.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cpn_fast.config import Config, CrfName
from cpn_fast.data.dataset import VERIFIED, Sample, check_files, load_samples
from cpn_fast.data.images import read_image
from cpn_fast.data.masks import is_of_another_image, write_mask
from cpn_fast.data.png import can_be_kept
from cpn_fast.data.provenance import VERSION, combined, image_digests, mark
from cpn_fast.methods.segmentation import Segmentation
from cpn_fast.models.backbone import to_device
from cpn_fast.models.deeplab import DeepLab, build_deeplab
from cpn_fast.models.inference import forward_batches, images_for, trained
from cpn_fast.models.weights import require_finite
from cpn_fast.pipelines.inference import ScaledBatch
from cpn_fast.refinement.crf import PARAMETERS, Room, dense_crf, process_pool
from cpn_fast.runtime import distributed, reading
from cpn_fast.runtime.backlog import Backlog
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import replacing
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.precision import autocast
from cpn_fast.runtime.progress import Progress
from cpn_fast.stages import train
from cpn_fast.stages.results import claim_once, list_folder, require_classes, require_results
from cpn_fast.training import run_folder

POSSIBLE = 0.01
"""The CRF leaves out classes whose probability is nowhere above this: its time grows with the number of classes."""
SUBMISSION = "results/VOC2012/Segmentation/comp6_test_cls"
"""The folder in an archive where VOC's evaluation server looks for masks."""
SUBMISSION_SUFFIXES = (".tar.gz", ".tgz")


def run(config: Config, masks: Path) -> Path:
    """Train the segmenter on ``masks/ID.png`` of ``data.train_list``, or continue; return the file of its weights.

    A finished run is kept while masks and settings are unchanged, and trained anew when they change. Raises UserError
    for missing masks and for masks that do not fit their images.
    """
    samples = load_samples(config.data, config.classes, config.data.train_list, labels=True, masks=False)
    samples = [dataclasses.replace(sample, mask=masks / f"{sample.id}.png") for sample in samples]
    remedy = "`cpn-fast refine` writes pseudo-masks; --masks names another folder"
    require_results(masks, "mask", samples, config.data.train_list, remedy)
    require_classes(masks, config.classes)
    images = image_digests([sample.image for sample in samples])
    outdated = [
        sample.id for sample in samples if sample.mask is not None and is_of_another_image(sample.mask, sample.image)
    ]
    if outdated:
        raise UserError(
            f"{masks}: {len(outdated)} masks were made from images that have changed ({some(outdated, 3)}). "
            "Make them again first, with `cpn-fast cam` and `cpn-fast refine`"
        )
    settings = deeplab_config(config)
    rank = distributed.join()
    train.check_batch(settings.train, rank.world, len(samples), "segment.train")
    with owned(settings.run, rank):

        def provenance() -> dict[str, Any]:
            return {
                "version": VERSION,
                "images": combined(images),
                "masks_sha256": _digest(samples),
                "bn_momentum": config.segment.bn_momentum,
                **run_folder.decisive(settings),
            }

        def build(settings: Config) -> Segmentation:
            return Segmentation(settings, masks)

        workers, classes = settings.train.data_threads, len(config.classes)

        def check() -> None:
            check_files(samples, workers=workers, classes=classes)
            train.check_start(settings, build)

        claim_once(rank, settings.run, provenance, run_folder.OWN, free=run_folder.LENGTH, check=check)
        if rank.first:
            check_files(samples, workers=workers, classes=classes, verified=settings.run / VERIFIED)
        return train.fit(settings, build, part_of=(config, "segment"))


def deeplab_config(config: Config) -> Config:
    """Return the config of the segmenter's training run ``RUN/segment/deeplab``."""
    return run_folder.part(config, "deeplab", config.run / "segment", config.segment)


def segment(config: Config, weights: Path, list_path: Path | None = None) -> Path:
    """Write ``masks/ID.png``, and ``crf/ID.png`` if ``segment.crf`` is set, for a list; return their folder.

    Finished images are kept while weights and settings are unchanged. Under torchrun each process makes its share.
    """
    rank = distributed.join()
    list_path = list_path or config.segment.eval_list
    samples = load_samples(config.data, config.classes, list_path, labels=False, masks=False)
    with list_folder(config.run / "segment", config, list_path, rank) as folder:
        _segment(config, weights, samples, folder, rank)
    return folder


def _segment(config: Config, weights: Path, samples: Sequence[Sample], folder: Path, rank: distributed.Rank) -> None:
    options = config.segment
    run_folder.require_classes(config, weights)
    network = to_device(trained(build_deeplab(config), weights), rank.device)

    def provenance() -> dict[str, Any]:
        return {
            "version": VERSION,
            "weights_sha256": reading.sha256(weights, reading.WEIGHTS),
            "classes": list(config.classes),
            "pixels": config.cam.pixels,  # may lower the scale of an image
            **options.model_dump(mode="json", include={"scales", "flip", "crf"}),
        }

    claim_once(rank, folder, provenance, ("masks", "crf"))
    kinds = ("masks", "crf") if options.crf else ("masks",)
    share = rank.share(samples)
    images = image_digests([sample.image for sample in share])
    sources = {sample.id: mark(image) for sample, image in zip(share, images, strict=True)}
    missing = [
        sample
        for sample in share
        if not all(can_be_kept(folder / kind / f"{sample.id}.png", sources[sample.id]) for kind in kinds)
    ]
    batches = images_for(network, missing, config, options.scales)
    workers = config.crf.workers or rank.cores
    with ExitStack() as stack:
        pool = stack.enter_context(process_pool(workers) if options.crf else ThreadPoolExecutor(workers))
        progress = stack.enter_context(Progress("segment", len(share), len(share) - len(missing)))
        writing = stack.enter_context(Backlog(2 * workers, progress.advance))
        room = Room()
        for batch in batches:
            for index, probabilities in zip(batch.indices, class_probabilities(network, batch, config), strict=True):
                sample = missing[index]
                require_finite(probabilities, weights, sample.id)
                job = partial(_write, folder, sample, probabilities, sources[sample.id], options.crf)
                classes, pixels = len(probabilities), probabilities[0].size
                writing.add(room.submit(pool, pixels, classes, job) if options.crf else pool.submit(job))
    rank.wait()


def class_probabilities(network: DeepLab, batch: ScaledBatch, config: Config) -> list[np.ndarray]:
    """Return the softmax of the mean logits, float32 (1 + classes, H, W) for each image; class 0 is background."""
    options = config.segment
    with torch.inference_mode(), autocast(options.train.precision, batch.scales[0].device):
        logits = mean_logits(network, batch, flip=options.flip, pixels=config.cam.pixels)
    return [scores.softmax(0).cpu().numpy() for scores in logits]


def mean_logits(network: DeepLab, batch: ScaledBatch, *, flip: bool, pixels: int) -> Tensor:
    """Return the mean of the logits over scales and flips, at the original size: float32 (B, 1 + classes, H, W)."""
    total: Tensor | None = None
    for images in batch.scales:
        passes = forward_batches(images, flip=flip, pixels=pixels)
        logits = torch.cat([network(x.contiguous(memory_format=torch.channels_last)).float() for x in passes])
        if flip:
            straight, mirrored = logits.chunk(2)
            logits = (straight + mirrored.flip(3)) / 2
        logits = F.interpolate(logits, batch.size, mode="bilinear", align_corners=True)
        total = logits if total is None else total.add_(logits)
    assert total is not None
    return total / len(batch.scales)


def _write(folder: Path, sample: Sample, probabilities: np.ndarray, source: str, crf: CrfName | None) -> None:
    write_mask(folder / "masks" / f"{sample.id}.png", mask_of(probabilities, sample.image, None), source)
    if crf is not None:
        write_mask(folder / "crf" / f"{sample.id}.png", mask_of(probabilities, sample.image, crf), source)


def mask_of(probabilities: np.ndarray, image: Path, crf: CrfName | None) -> np.ndarray:
    """Return the most probable class of each pixel, uint8 (H, W), after the CRF if one is named."""
    if crf is None:
        return probabilities.argmax(0).astype(np.uint8)
    peaks = probabilities.max((1, 2))
    # The likeliest class always: of 100 classes or more, all may be less probable than POSSIBLE everywhere.
    values = np.flatnonzero((peaks > POSSIBLE) | (peaks == peaks.max())).astype(np.uint8)
    refined = dense_crf(read_image(image), probabilities[values], PARAMETERS[crf])
    return values[refined.argmax(0)]


def check_submission(path: Path) -> None:
    """Raise UserError for a name without the suffix of the archive, and for another program's file."""
    if not path.name.endswith(SUBMISSION_SUFFIXES):
        raise UserError(
            f"--submission {path}: expected an archive name that ends in {' or '.join(SUBMISSION_SUFFIXES)}, "
            f"found {path.suffix or 'no ending'}"
        )
    if path.exists() and not _is_submission(path):
        raise UserError(f"--submission {path}: exists, and is no submission of cpn-fast: name another file")


def _is_submission(path: Path) -> bool:
    try:
        with reading.opened(path, reading.ARCHIVE) as file, tarfile.open(fileobj=file) as archive:
            first = archive.next()
    except (OSError, EOFError, zlib.error, tarfile.TarError):
        return False
    return first is not None and first.name.startswith(f"{SUBMISSION}/")


def write_submission(config: Config, masks: Path, path: Path, list_path: Path | None = None) -> int:
    """Pack a list's masks into a .tar.gz for VOC's evaluation server; return their number.

    Masks of other images in the folder stay out. Raises UserError if a mask is missing.
    """
    check_submission(path)
    list_path = list_path or config.segment.eval_list
    samples = load_samples(config.data, config.classes, list_path, labels=False, masks=False)
    remedy = f"`cpn-fast segment CONFIG --list {list_path}` makes what is missing"
    require_results(masks, "mask", samples, list_path, remedy)
    with (
        replacing(path) as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,  # no times: the same masks give the same bytes
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for sample in samples:
            content = reading.read_bytes(masks / f"{sample.id}.png", reading.MASK)
            member = tarfile.TarInfo(f"{SUBMISSION}/{sample.id}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return len(samples)


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        assert sample.mask is not None
        digest.update(os.fsencode(sample.id))
        digest.update(reading.read_bytes(sample.mask, reading.MASK))
    return digest.hexdigest()
