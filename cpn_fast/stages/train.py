"""Stage ``train``: train a network on images and tags. All methods run the same loop."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpn_fast import config_file
from cpn_fast.config import Config, Train
from cpn_fast.data.dataset import Sample, cannot_be_learned
from cpn_fast.data.images import read_image
from cpn_fast.methods.known import METHODS
from cpn_fast.methods.method import Method
from cpn_fast.models.backbone import to_device
from cpn_fast.models.dropout import SharedDropout
from cpn_fast.models.network import Network
from cpn_fast.models.pretrained import load_pretrained, measure_features
from cpn_fast.models.timm_backbone import TimmBackbone
from cpn_fast.models.weights import FINAL, is_whole, to_released_keys, weights_of, write_weights
from cpn_fast.pipelines.shards import Shards, training_list
from cpn_fast.pipelines.superpixels import SuperpixelCache
from cpn_fast.pipelines.training import TrainingPipeline
from cpn_fast.runtime import distributed, interrupts
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import read_metrics
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.progress import Progress
from cpn_fast.training import checkpoint, resume
from cpn_fast.training.batch_size import sized
from cpn_fast.training.hook import Hook
from cpn_fast.training.hook import load as load_hook
from cpn_fast.training.metrics import Meter
from cpn_fast.training.nonfinite import GradientGuard
from cpn_fast.training.previews import COUNT, Previews
from cpn_fast.training.run_folder import differing_keys, open_run, own_config, run_config, write_environment
from cpn_fast.training.step import Step, load_optimizer, make_optimizer, rate_factor, set_rate
from cpn_fast.training.validation import Validation

DROPOUT, HIDING = range(2)  # streams of random numbers


def run(config: Config) -> Path:
    """Train the config's method (``fit``)."""
    return fit(config, METHODS[config.method])


def fit(config: Config, build: Callable[[Config], Method], part_of: tuple[Config, str] | None = None) -> Path:
    """Train, or continue from the run's newest checkpoint; return the file of its weights.

    ``build`` makes the method. ``config`` has the run's folder (``out`` and ``name``), its data and its training;
    ``train.use_weights`` chooses the last or the best weights. ``part_of`` has the config of the whole run and the name
    of this stage in it. Raises UserError for faulty data or weights, and for a run folder of another config.

    Under torchrun the processes share each step's images and average their gradients. The first one writes. Their
    number may change between two starts.
    """
    rank = distributed.join()
    whole_run, stage = part_of or (config, "train")
    section = stage if stage == "train" else f"{stage}.train"
    check_batch(config.train, rank.world, key=section)
    with owned(config.run, rank):
        return _fit(config, build, rank, {"run": whole_run.name, "stage": stage}, section)


def _fit(
    config: Config,
    build: Callable[[Config], Method],
    rank: distributed.Rank,
    context: dict[str, Any],
    section: str,
) -> Path:
    hook = None
    if rank.first and config.hook is not None:
        hook = Hook(config.hook, config.run, context)
    if config.train.deterministic:  # before `sized` uses cuBLAS
        choose_deterministic_algorithms()
    config = sized(config, build, rank, section)
    train = config.train
    check_batch(train, rank.world, key=section)  # auto takes the number of an earlier start
    assert train.batch != "auto"
    state, continuation = _open(config, rank, section)
    if rank.gather(continuation is not None and continuation.finished)[0]:
        if hook is not None:
            hook.give(read_metrics(config.run / "metrics.jsonl"))
            hook.close()
        return weights_of(config.run, config)

    if rank.first:
        write_environment(config, rank.device)
    samples, shards = _training_list(config, rank, state, continuation)
    check_batch(train, rank.world, len(samples), section)
    steps = resume.number_of_steps(train, len(samples))
    method = _method(config, build, rank, samples, shards, pretrained=state is None)
    network = method.network
    optimizer = make_optimizer(network, train, rank.device)
    generator = torch.Generator(rank.device)
    make_step = Step(method, optimizer, generator, train, rank, rank.device)
    start = 0 if state is None else _restore(state, network, optimizer, make_step)
    del state
    pipeline = _pipeline(config, method, samples, shards, rank, start)
    guard = GradientGuard(config.run, [sample.id for sample in samples], train.nonfinite, rank)
    meter = Meter(config, train.batch, guard, start, pipeline.steps_per_epoch, hook)
    data = meter.timed(pipeline)
    previews = _previews(config, network, samples, shards) if rank.first else None
    if rank.first and make_step.compiles:
        print("Compiling the network and the losses. The first step takes a minute or more")
    validation = None if train.validate_every is None else Validation(config, samples, rank, begins=start == 0)

    with meter, interrupts.noted() as stopping, Progress(f"train {config.name}", steps, start) as progress:
        for step in range(start, steps):
            torch.manual_seed(keyed_seed(train.seed, step, DROPOUT))
            generator.manual_seed(keyed_seed(train.seed, step, HIDING))
            factor = rate_factor(step, steps, train)
            set_rate(optimizer, factor)
            batches = [next(data) for _ in range(train.accumulate)]
            figures = make_step(batches)
            done = step + 1
            validates = train.validate_every is not None and (done % train.validate_every == 0 or done == steps)
            logs = done % train.log_every == 0 or done == steps or validates
            # A single process stops after any step. Several must stop after the same step, so they agree when they log.
            stops = done < steps and (stopping() if rank.world == 1 else logs and any(rank.gather(stopping())))
            keeps = done % train.checkpoint_every == 0 or done == steps or stops
            meter.add(done, train.lr * factor, figures, batches, ends_line=logs)
            validate = None
            if validation is not None and validates:
                assert isinstance(network, Network)  # the config refuses validate_every for the later trainings
                validate = partial(validation.after, done, network)
            # Before the checkpoint: a run that continues from there does not validate this step again.
            note = meter.read(done, wait=keeps or validates, validate=validate)
            if rank.first and keeps:
                _write_checkpoint(config, done, network, optimizer, make_step)
            if previews is not None and keeps and (picture := previews.picture()) is not None:
                meter.show("cams", picture, done)
            progress.advance(note=note)
            if stops:
                raise interrupts.Stopped(f"stopped after step {done} of {steps}; {config.run} has its checkpoint")
    if rank.first:
        tensors = to_released_keys(network.state_dict())
        write_weights(config.run / FINAL, tensors, config=config_file.dump(config), training={"step": steps})
    if any(rank.gather(stopping())):  # in the last step: no other stage may begin
        raise interrupts.Stopped(f"stopped after all {steps} steps; {config.run} has its weights")
    return weights_of(config.run, config)


def _open(
    config: Config, rank: distributed.Rank, section: str
) -> tuple[dict[str, Any] | None, resume.Continuation | None]:
    """Open the run's folder; return its newest checkpoint and, in the first process, how the run continues."""
    final = config.run / FINAL
    if rank.first:
        _refuse_another(config)
    whole = rank.gather(rank.first and is_whole(final))[0]
    state = checkpoint.newest(config.run / "checkpoints", torch.device("cpu"))
    continuation = None
    if rank.first and (state is not None or (whole and own_config(final) is not None)):
        samples, shards = training_list(config)
        continuation = resume.compare(config, samples, shards, state, final if whole else None, section)
    if rank.first:
        open_run(config)
    return state, continuation


def _training_list(
    config: Config, rank: distributed.Rank, state: dict[str, Any] | None, continuation: resume.Continuation | None
) -> tuple[list[Sample], Shards | None]:
    """Load the training list. The first process checks it and records it in the run's folder."""
    samples, shards = training_list(config, decode=rank.first)
    if rank.first:
        for doubt in cannot_be_learned(samples, config.classes):
            print(f"Warning: {doubt}", file=sys.stderr)
        for remark in continuation.remarks if continuation is not None else ():
            print(remark)
        note = {} if continuation is None else continuation.list_note
        if state is None:
            note = resume.described(config, samples, shards)
        if note:
            resume.remember(config.run, note)
    return samples, shards


def check_start(config: Config, build: Callable[[Config], Method]) -> None:
    """Raise UserError if a new training could not begin: for the hook, and for the pretrained weights."""
    if config.hook is not None:
        load_hook(config.hook)
    load_pretrained(build(config).network, config.model)


def _method(
    config: Config,
    build: Callable[[Config], Method],
    rank: distributed.Rank,
    samples: Sequence[Sample],
    shards: Shards | None,
    *,
    pretrained: bool,
) -> Method:
    """Build the method and move its network to the device, with ``pretrained`` weights or with random ones."""
    torch.manual_seed(config.train.seed)
    method = build(config)
    network = method.network
    if pretrained:
        fresh = load_pretrained(network, config.model)
        if rank.first and config.model.weights is not None:
            print(f"Starting from {config.model.weights}" + (f" with new layers {', '.join(fresh)}" if fresh else ""))
    if pretrained and isinstance(network.backbone, TimmBackbone):
        measure_features(network, _first_images(samples, shards), config.augment.crop)
    to_device(network, rank.device).train()
    assert config.train.batch != "auto"
    for module in network.modules():
        if isinstance(module, SharedDropout):
            module.number, module.world, module.images = rank.number, rank.world, config.train.batch // rank.world
    return method


def _restore(state: dict[str, Any], network: torch.nn.Module, optimizer: torch.optim.Optimizer, make_step: Step) -> int:
    """Load a checkpoint; return its step."""
    network.load_state_dict(state["model"])
    load_optimizer(optimizer, state["optimizer"])
    if make_step.scaler.is_enabled():
        make_step.scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def _write_checkpoint(
    config: Config, step: int, network: torch.nn.Module, optimizer: torch.optim.Optimizer, make_step: Step
) -> None:
    checkpoint.write(
        config.run / "checkpoints",
        step,
        keep=config.train.keep_checkpoints,
        model=network.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=make_step.scaler.state_dict(),
        config=config_file.dump(config),
    )


def _pipeline(
    config: Config,
    method: Method,
    samples: Sequence[Sample],
    shards: Shards | None,
    rank: distributed.Rank,
    start: int,
) -> TrainingPipeline:
    """Return the process's share of the batches from step ``start`` on, with the maps that the method needs."""
    online = None
    if method.pixel_map != "superpixels":
        map_path = method.pixel_map
    elif config.superpixels.mode == "online":
        map_path, online = None, config.superpixels
    elif shards is not None:
        map_path, shards = None, shards.with_superpixels(config.superpixel_cache, config.superpixels)
    else:
        cache = SuperpixelCache(config.superpixel_cache, config.superpixels)
        cache.build(samples)
        map_path = cache.path
    assert config.train.batch != "auto"
    return TrainingPipeline(
        samples,
        config.augment,
        batch=config.train.batch // rank.world,
        mean=method.network.mean,
        std=method.network.std,
        seed=config.train.seed,
        device=rank.device,
        threads=config.train.data_threads,
        map_path=map_path,
        online=online,
        shards=shards,
        rank=rank.number,
        world=rank.world,
        start_step=start * config.train.accumulate,
    )


def check_batch(train: Train, world: int, images: int | None = None, key: str = "train") -> None:
    """Raise UserError if ``world`` processes cannot share a batch, or if ``images`` are too few for a step.

    ``key`` is the section's full name, for example ``segment.train``.
    """
    if train.batch == "auto":
        return
    if train.batch % world:
        raise UserError(f"{key}.batch is {train.batch}, expected a multiple of torchrun's {world} processes")
    if images is None:
        return
    if train.batch > images:
        raise UserError(
            f"{key}.batch is {train.batch}, but the training list has only {images} image(s): lower {key}.batch or "
            "list more images"
        )
    batches = (train.epochs or 0) * (images // train.batch)
    if train.steps is None and batches < train.accumulate:
        raise UserError(
            f"{key}.accumulate is {train.accumulate}, more than the {batches} batches of all epochs: lower it"
        )


def _previews(
    config: Config, network: torch.nn.Module, samples: Sequence[Sample], shards: Shards | None
) -> Previews | None:
    """Return the previews of the first images' CAMs, or None for a network without CAMs."""
    if not isinstance(network, Network):
        return None
    labels = [sample.label for sample in samples[:COUNT] if sample.label is not None]
    return Previews(list(zip(_first_images(samples, shards), labels, strict=True)), config, network)


def _first_images(samples: Sequence[Sample], shards: Shards | None) -> list[np.ndarray]:
    """Read the first images of the list, uint8 RGB (H, W, 3)."""
    first = samples[:COUNT]
    contents = [None] * len(first) if shards is None else [content for content, *_ in shards.read(range(len(first)))]
    return [read_image(sample.image, content) for sample, content in zip(first, contents, strict=True)]


def choose_deterministic_algorithms() -> None:
    """Make torch, cuDNN and cuBLAS use deterministic algorithms in this process from now on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def keyed_seed(*key: int) -> int:
    """Return a seed for the key (seed, step, stream). Different keys give independent random numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _refuse_another(config: Config) -> None:
    """Raise UserError if the folder holds a run of another config."""
    recorded = run_config(config.run)
    if recorded is None:
        return
    path, text = recorded
    differing = differing_keys(config_file.read(text, str(path)), config)
    if differing:
        raise UserError(
            f"{config.run} holds a run of another config. These keys differ from its {path.name}: "
            f"{', '.join(differing)}. Give this run another name, or delete that folder"
        )
