"""Stage ``train``: from images and tags to a trained network. One straight loop for every method."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from torch import Tensor

import cpn_fast
from cpn_fast import checkpoint, kernels, precision, ranks, resume, signals
from cpn_fast import config as configs
from cpn_fast.batch_size import sized
from cpn_fast.config import Config, Train
from cpn_fast.dataset import Sample, cannot_be_learned
from cpn_fast.errors import UserError
from cpn_fast.files import read_metrics, remove_partials, replacing, write_json
from cpn_fast.finite import GradientGuard
from cpn_fast.gallery import COUNT, Gallery
from cpn_fast.hook import Hook
from cpn_fast.meter import Meter
from cpn_fast.methods import METHODS, Method
from cpn_fast.models.backbone import Headed
from cpn_fast.models.dropout import SharedDropout
from cpn_fast.models.network import HEADS, Network
from cpn_fast.models.timm_backbone import TimmBackbone, pretrained_by_timm
from cpn_fast.owner import owned
from cpn_fast.pipelines.shards import Shards, training_list
from cpn_fast.pipelines.superpixels import SuperpixelCache, read_image
from cpn_fast.pipelines.training import TrainingPipeline
from cpn_fast.progress import Progress
from cpn_fast.step import Step, load_optimizer, make_optimizer, set_rate
from cpn_fast.validation import Validation
from cpn_fast.weights import (
    FINAL,
    chosen,
    is_whole,
    load_into,
    own_config,
    read_weights,
    run_config,
    to_network_keys,
    to_released_keys,
    write_weights,
)

OWN = ("checkpoints", FINAL, "*.json", "*.jsonl", "config.yaml", "events.*")
"""What training writes into a run's folder, for runs that are part of another."""
DROPOUT, HIDING = range(2)  # streams of random numbers


def run(config: Config) -> Path:
    """Train the config's method, as ``fit`` does."""
    return fit(config, METHODS[config.method])


def fit(config: Config, build: Callable[[Config], Method], part_of: tuple[Config, str] | None = None) -> Path:
    """Train, or continue where the run's newest checkpoint stands; returns the file of its weights.

    ``build`` makes the method; ``config`` says where (``out`` and ``name``), on what and how it is trained, and with
    ``train.use_weights`` whether the file is that of the last step or of the best; ``part_of``, whose stage this is and
    which. Raises UserError for anything wrong with the data, the weights, or a run folder that belongs to another
    config.

    Under torchrun the processes share each step's images and average their gradients; the first one writes. Their
    number may change between two starts.
    """
    rank = ranks.join()
    check_batch(config.train, rank.world)
    with owned(config.run, rank):
        return _fit(config, build, rank, part_of or (config, "train"))


def _fit(config: Config, build: Callable[[Config], Method], rank: ranks.Rank, part_of: tuple[Config, str]) -> Path:
    device = rank.device
    whole_run, stage = part_of
    hook = None
    if rank.first and config.hook is not None:
        hook = Hook(config.hook, config.run, {"run": whole_run.name, "stage": stage})
    if config.train.deterministic:  # before `sized` makes the first use of cuBLAS
        choose_deterministic_algorithms()
    config = sized(config, build, rank)
    train = config.train
    assert train.batch != "auto"
    final = config.run / FINAL
    if rank.first:
        _refuse_another(config)
    whole = rank.gather(rank.first and is_whole(final))[0]
    state = checkpoint.newest(config.run / "checkpoints", torch.device("cpu"))
    found = None
    if rank.first and (state is not None or (whole and own_config(final) is not None)):
        section = stage if stage == "train" else f"{stage}.train"
        found = resume.resumed(config, training_list(config)[0], state, final if whole else None, section)
    if rank.first:
        _open_run(config, device)
    if rank.gather(found is not None and found.finished)[0]:
        if hook is not None:
            hook.give(read_metrics(config.run / "metrics.jsonl"))
            hook.close()
        return chosen(config.run, config)

    samples, shards = training_list(config, decode=rank.first)
    if rank.first:
        for doubt in cannot_be_learned(samples, config.classes):
            print(f"Warning: {doubt}", file=sys.stderr)
        for remark in found.remarks if found is not None else ():
            print(remark)
        if listed := resume.described(samples) if state is None else found.listed if found is not None else {}:
            resume.remember(config.run, listed)
    torch.manual_seed(train.seed)
    method = build(config)
    network = method.network
    if state is None and config.model.weights is None and network.backbone.frozen:
        raise UserError(
            f"model.weights is null, but {config.model.backbone} keeps its first layers and its batch statistics as "
            "they are, which random weights do not survive: name a file of pretrained weights; docs/voc.md says where "
            "they come from"
        )
    if state is None and config.model.weights is not None:
        fresh = start_from(network, config.model.weights)
        if rank.first:
            print(f"Starting from {config.model.weights}" + (f" with new layers {', '.join(fresh)}" if fresh else ""))
    if state is None and isinstance(network.backbone, TimmBackbone):
        measure_features(network, _first_images(samples, shards), config.augment.crop)
    network = network.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    online = None
    if method.map != "superpixels":
        map_path = method.map
    elif config.superpixels.mode == "online":
        map_path, online = None, config.superpixels
    elif shards is not None:
        map_path, shards = None, shards.with_superpixels(config.superpixel_cache, config.superpixels)
    else:
        cache = SuperpixelCache(config.superpixel_cache, config.superpixels)
        cache.build(samples)
        map_path = cache.path

    optimizer = make_optimizer(network, train, device)
    start = 0
    if state is not None:
        network.load_state_dict(state["model"])
        load_optimizer(optimizer, state["optimizer"])
        start = state["step"]
    share = train.batch // rank.world
    for module in network.modules():
        if isinstance(module, SharedDropout):
            module.number, module.world, module.images = rank.number, rank.world, share
    pipeline = TrainingPipeline(
        samples,
        config.augment,
        batch=share,
        mean=network.mean,
        std=network.std,
        seed=train.seed,
        device=device,
        threads=train.data_threads,
        map_path=map_path,
        online=online,
        shards=shards,
        rank=rank.number,
        world=rank.world,
        start_step=start * train.accumulate,
    )
    steps = resume.number_of_steps(train, len(samples))
    if steps == 0:
        raise UserError(f"train.accumulate is {train.accumulate}, more than the batches of all epochs: lower it")
    generator = torch.Generator(device)
    make_step = Step(method, optimizer, generator, train, rank, device)
    if state is not None and make_step.scaler.is_enabled():
        make_step.scaler.load_state_dict(state["scaler"])
    del state
    guard = GradientGuard(config.run, [sample.id for sample in samples], train.nonfinite, rank)
    meter = Meter(config, train.batch, guard, start, pipeline.steps_per_epoch // train.accumulate, hook)
    data = meter.timed(pipeline)
    gallery = None
    if rank.first and isinstance(network, Network):
        labels = [sample.label for sample in samples[:COUNT] if sample.label is not None]
        gallery = Gallery(list(zip(_first_images(samples, shards), labels, strict=True)), config, network)

    validation = None
    if train.validate_every is not None and isinstance(network, Network):
        validation = Validation(config, samples, rank, begins=start == 0)

    with meter, signals.noted() as stopping, Progress(f"train {config.name}", steps, start) as progress:
        for step in range(start, steps):
            torch.manual_seed(keyed_seed(train.seed, step, DROPOUT))
            generator.manual_seed(keyed_seed(train.seed, step, HIDING))
            factor = (1 - step / steps) ** train.power
            set_rate(optimizer, factor)
            batches = [next(data) for _ in range(train.accumulate)]
            figures = make_step(batches)
            done = step + 1
            validates = train.validate_every is not None and (done % train.validate_every == 0 or done == steps)
            logs = done % train.log_every == 0 or done == steps or validates
            # One process stops after any step; several must stop after the same one, and agree when they log.
            stops = done < steps and (stopping() if rank.world == 1 else logs and any(rank.gather(stopping())))
            keeps = done % train.checkpoint_every == 0 or done == steps or stops
            meter.add(done, train.lr * factor, figures, batches, ends_line=logs)
            if validation is not None and validates:  # before the checkpoint: a run that goes on from it has its score
                meter.validated(validation.after(done, network))
            note = meter.read(done, wait=keeps)
            if rank.first and keeps:
                checkpoint.write(
                    config.run / "checkpoints",
                    done,
                    keep=train.keep_checkpoints,
                    model=network.state_dict(),
                    optimizer=optimizer.state_dict(),
                    scaler=make_step.scaler.state_dict(),
                    config=configs.dump(config),
                )
            if gallery is not None and keeps:
                picture = gallery.picture()
                if picture is not None:
                    meter.show("cams", picture, done)
            progress.advance(note=note)
            if stops:
                raise signals.Stopped(f"stopped after step {done} of {steps}, which {config.run} keeps")
    if rank.first:
        tensors = to_released_keys(network.state_dict())
        write_weights(final, tensors, config=configs.dump(config), training={"step": steps})
    rank.wait()
    return chosen(config.run, config)


def check_batch(train: Train, world: int, images: int | None = None, key: str = "train") -> None:
    """Raise UserError if ``world`` processes cannot share a batch, or ``images`` do not make a step.

    ``key`` is the section's whole name, as in ``segment.train``.
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


def _first_images(samples: Sequence[Sample], shards: Shards | None) -> list[np.ndarray]:
    """The pictures of the gallery, uint8 RGB (H, W, 3)."""
    first = samples[:COUNT]
    contents = [None] * len(first) if shards is None else [content for content, *_ in shards.read(range(len(first)))]
    return [read_image(sample.image, content) for sample, content in zip(first, contents, strict=True)]


def choose_deterministic_algorithms() -> None:
    """In this process from now on: torch's own, cuDNN's and cuBLAS's."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def start_from(network: Headed, path: Path) -> list[str]:
    """Load pretrained weights: the backbone's must fit, of heads those are taken that do.

    The file may be of a backbone, of a classifier, or of any of our networks, with other classes too; ``timm`` stands
    for timm's own. Returns the heads that stay random. Raises UserError as ``load_into`` does.
    """
    own, backbone = network.state_dict(), network.backbone

    def fits(key: str, tensor: Tensor) -> bool:
        return key.split(".")[0] not in HEADS or (key in own and own[key].shape == tensor.shape)

    if isinstance(backbone, TimmBackbone) and path == Path("timm"):
        content = pretrained_by_timm(backbone.name)
    else:
        content = read_weights(path)
    tensors = {k: tensor for k, tensor in to_network_keys(backbone.pretrained(content)).items() if fits(k, tensor)}
    loaded = load_into(
        network,
        tensors,
        source=path,
        allow_missing=[*(f"{head}.*" for head in HEADS), "backbone.inner"],
        allow_unexpected=[f"backbone.{pattern}" for pattern in backbone.classifier],
    )
    return [name for name in dict.fromkeys(key.split(".")[0] for key in loaded.missing) if name in HEADS]


def measure_features(network: Headed, images: Sequence[np.ndarray], side: int) -> None:
    """Bring the inner features of a timm backbone to the size of ``images``, uint8 RGB, unless that was done before."""
    backbone = network.backbone
    if not isinstance(backbone, TimmBackbone) or backbone.measured:
        return
    squares = np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images])
    normalised = (torch.from_numpy(squares) - torch.tensor(network.mean)) / torch.tensor(network.std)
    backbone.measure(normalised.permute(0, 3, 1, 2))


def keyed_seed(*key: int) -> int:
    """A seed for (seed, step, stream): streams of different keys are independent."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _refuse_another(config: Config) -> None:
    """Raise UserError for the folder of a run of another config."""
    found = run_config(config.run)
    if found is not None:
        differing = differing_keys(configs.read(found[1], str(found[0])), config)
        if differing:
            raise UserError(
                f"{config.run} holds a run of another config; these keys differ: {', '.join(differing)}, says "
                f"{found[0].name}. Give this one another name, or delete that folder"
            )


def _open_run(config: Config, device: torch.device) -> None:
    """Make the run's folder, with its config and its environment."""
    remove_partials(config.run, config.run / "checkpoints")
    checkpoint.prune(config.run / "checkpoints", config.train.keep_checkpoints)
    with replacing(config.run / "config.yaml") as file:
        file.write(configs.dump(config).encode())
    environment = {
        "cpn_fast": cpn_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "precision": config.train.precision or precision.default(device),
        "backends": _backends(config.train.precision, device),
    }
    write_json(config.run / "environment.json", environment, indent=2)


def _backends(wanted: str | None, device: torch.device) -> dict[str, str]:
    """What each of our operations runs on; on a GPU, where it is not Triton, with the reason."""
    chosen = kernels.backends(device, precision.dtype(wanted, device))
    reasons = {name: f": {own.reason}" if own.reason and device.type == "cuda" else "" for name, own in chosen.items()}
    return {name: f"{own.backend}{reasons[name]}" for name, own in chosen.items()}


# What may change between two starts of one run: nothing that the weights of a sound run depend on. Where the data lies
# may, for list.json tells whether it is the same.
FREE = {"out", "hook", "superpixels.cache", "cam", "evaluate", "crf", "affinity", "walk", "segment"} | {
    f"{section}.{key}"
    for section, keys in {
        "data": ("root", "images", "labels", "masks", "eval_list"),
        "train": (
            *("log_every", "checkpoint_every", "keep_checkpoints", "data_threads", "nonfinite"),
            *("validate_every", "use_weights"),
            *("compile", "cuda_graph", "checkpoint_activations"),
        ),
    }.items()
    for key in keys
}
MAY_MOVE = {"data.train_list", "data.shards", "model.weights"}
"""Keys of files and folders whose last name counts alone."""


def decisive(config: Config) -> dict[str, Any]:
    """Key (``train.lr``) -> plain value of all in a config that the weights of a sound run depend on."""
    return _flat(yaml.safe_load(configs.dump(config)))


def differing_keys(one: Config, other: Config) -> list[str]:
    """Which of the ``decisive`` keys differ, but for those with which a run goes on (``resume``)."""
    before, now = decisive(one), decisive(other)
    keys = (before.keys() | now.keys()) - {*resume.LENGTH, "data.train_list"}
    return sorted(key for key in keys if before.get(key) != now.get(key))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in ((prefix + name, value) for name, value in tree.items() if prefix + name not in FREE):
        if key in MAY_MOVE and value is not None:
            found[key] = Path(value).name
        else:
            found |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found
