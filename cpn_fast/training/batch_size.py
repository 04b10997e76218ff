"""``train.batch: auto``: the most images whose training step fits a GPU's memory, found by trying."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from cpn_fast import config_file
from cpn_fast.config import Config
from cpn_fast.methods.method import Method
from cpn_fast.pipelines.training import Batch
from cpn_fast.runtime.distributed import Rank
from cpn_fast.runtime.errors import UserError
from cpn_fast.training.run_folder import run_config
from cpn_fast.training.step import Step, make_optimizer

MOST = 256
"""Images a process."""
FRACTION = 0.9
"""Of a GPU's memory, which trials may use at most."""
OTHERS = 2 << 30
"""Bytes that trials leave free at least: for CUDA's context, DALI's decoders and pictures of CAMs. Not measured."""


def sized(config: Config, build: Callable[[Config], Method], rank: Rank) -> Config:
    """The config with a number for ``auto``: that of the run's folder, else the largest that fits every process.

    All processes must call it. Raises UserError without a GPU, and if not one image fits.
    """
    if config.train.batch != "auto":
        return config
    found = run_config(config.run) if rank.first else None
    batch = rank.gather(None if found is None else config_file.read(found[1], str(found[0])).train.batch)[0]
    if batch is None:
        share = min(rank.gather(largest(lambda images: step_fits(config, build, rank, images), MOST)))
        if share == 0:
            raise UserError(
                f"train.batch is auto, but a step of one image of {config.augment.crop} px takes more than "
                f"{usable(rank.device):.0%} of the GPU's memory: set train.checkpoint_activations or lower augment.crop"
            )
        batch = share * rank.world
        if rank.first:
            print(
                f"train.batch: {batch} images fit, {share} on each GPU" if rank.world > 1 else f"train.batch: {batch}"
            )
    return config.model_copy(update={"train": config.train.model_copy(update={"batch": batch})})


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that ``fits``, as do all below it; 0 if 1 does not. By doubling and halving."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def usable(device: torch.device) -> float:
    """The share of a GPU's memory that a training step may take."""
    total = torch.cuda.get_device_properties(device).total_memory
    return max(0.0, min(FRACTION, 1 - OTHERS / total))


def step_fits(config: Config, build: Callable[[Config], Method], rank: Rank, images: int) -> bool:
    """Whether training steps of ``images`` of the config's size fit the GPU's memory.

    They are made without ``torch.compile`` and without a CUDA graph, neither of which needs more.
    """
    device = rank.device
    if device.type != "cuda":
        raise UserError("train.batch is auto, which fills a GPU's memory, and there is no GPU: give a number")
    torch.cuda.set_per_process_memory_fraction(usable(device), device)
    try:
        try_steps(config, build, device, images)
    except torch.OutOfMemoryError:
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
    """``count`` steps, the second of which finds momentum; of a method of its own, on random images with all classes.

    Returns how many seconds the quickest took, the first left out: other work on the machine only adds to a step's.
    """
    method = build(config)
    method.network.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    train = config.train.model_copy(update={"compile": False, "cuda_graph": False})
    side = config.augment.crop
    batch = Batch(
        torch.randn(images, 3, side, side, device=device),
        None if method.map is None else torch.zeros(images, side, side, dtype=torch.int32, device=device),
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
