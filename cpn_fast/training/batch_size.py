"""``train.batch: auto``: try which number of images fits a GPU's memory in a training step."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from cpn_fast import config_file
from cpn_fast.config import Config
from cpn_fast.methods.method import Method
from cpn_fast.models.backbone import to_device
from cpn_fast.pipelines.batch import Batch
from cpn_fast.pipelines.shards import training_list
from cpn_fast.runtime.distributed import Rank
from cpn_fast.runtime.errors import UserError, is_out_of_memory
from cpn_fast.training.run_folder import run_config
from cpn_fast.training.step import Step, make_optimizer

MOST = 256
"""Images of one process."""
FRACTION = 0.9
"""Part of a GPU's memory that trials may use at most."""
OTHERS = 2 << 30
"""Bytes that trials leave free: an estimate for CUDA's context, DALI's decoders and pictures of CAMs."""


def sized(config: Config, build: Callable[[Config], Method], rank: Rank, key: str) -> Config:
    """Return the config with a number for ``auto``: from the run's folder, or the largest that fits every process.

    At most the images of the training list share a batch. ``key`` is the section's full name, for example
    ``segment.train``. All processes must call it. Raises UserError without a GPU, and if not even one image fits.
    """
    if config.train.batch != "auto":
        return config
    batch = rank.gather(recorded(config) if rank.first else None)[0]
    if batch is None:
        require_gpu(config, key)
        most = min(MOST, max(1, len(training_list(config)[0]) // rank.world))
        share = min(rank.gather(largest(lambda images: step_fits(config, build, rank, images), most)))
        if share == 0:
            raise UserError(
                f"{key}.batch is auto, but a step of one image of {config.augment.crop} px takes more than "
                f"{usable(rank.device):.0%} of the GPU's memory: set {key}.checkpoint_activations or lower the crop"
            )
        batch = share * rank.world
        if rank.first:
            print(
                f"{key}.batch: {batch} images fit, {share} on each GPU" if rank.world > 1 else f"{key}.batch: {batch}"
            )
    return config.model_copy(update={"train": config.train.model_copy(update={"batch": batch})})


def recorded(config: Config) -> int | None:
    """Return the batch of the run in the config's folder; None if no step was made."""
    found = run_config(config.run)
    batch = None if found is None else config_file.read(found[1], str(found[0])).train.batch
    return None if batch == "auto" else batch


def require_gpu(config: Config, key: str) -> None:
    """Raise UserError if ``auto`` must be tried, and there is no GPU to try it on."""
    if config.train.batch == "auto" and not torch.cuda.is_available() and recorded(config) is None:
        raise UserError(f"{key}.batch is auto, which fills a GPU's memory, and there is no GPU: give a number")


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to ``most`` that ``fits``, or 0. All numbers below it must fit too."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def usable(device: torch.device) -> float:
    """Return the part of a GPU's memory that a training step may use, from 0 to 1."""
    total = torch.cuda.get_device_properties(device).total_memory
    return max(0.0, min(FRACTION, 1 - OTHERS / total))


def step_fits(config: Config, build: Callable[[Config], Method], rank: Rank, images: int) -> bool:
    """Return whether training steps with ``images`` images of the config's size fit the GPU's memory.

    The trials run without ``torch.compile`` and without a CUDA graph. Neither of them needs more memory.
    """
    device = rank.device
    torch.cuda.set_per_process_memory_fraction(usable(device), device)
    try:
        try_steps(config, build, device, images)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    gc.collect()
    torch.cuda.empty_cache()
    return fits


def try_steps(
    config: Config, build: Callable[[Config], Method], device: torch.device, images: int, count: int = 2
) -> float:
    """Make ``count`` steps of a new method on random images with all classes; return the seconds of the fastest one.

    The first step is not timed. The second one is the first with momentum. Other work on the machine only slows a step
    down, so the fastest one counts.
    """
    method = build(config)
    to_device(method.network, device).train()
    train = config.train.model_copy(update={"compile": False, "cuda_graph": False})
    side = config.augment.crop
    batch = Batch(
        torch.randn(images, 3, side, side, device=device),
        None if method.pixel_map is None else torch.zeros(images, side, side, dtype=torch.int32, device=device),
        torch.ones(images, len(config.classes), device=device),
        torch.zeros(images, dtype=torch.int64, device=device),
    )
    optimizer = make_optimizer(method.network, train, device)
    step = Step(method, optimizer, torch.Generator(device), train, Rank(0, 1, 0), device)
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        step([batch] * train.accumulate).values.tolist()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
