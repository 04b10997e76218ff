"""Stage ``train``: from images and tags to a trained network. One straight loop for every method."""

from __future__ import annotations

import inspect
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import yaml
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

import cpn_fast
from cpn_fast import checkpoint, ranks, signals
from cpn_fast import config as configs
from cpn_fast.config import Config, Train
from cpn_fast.dataset import Sample, check_files, load_samples
from cpn_fast.errors import UserError
from cpn_fast.files import read_metrics, remove_partials, replacing
from cpn_fast.finite import GradientGuard
from cpn_fast.methods import METHODS, Method
from cpn_fast.models.backbone import Headed
from cpn_fast.models.dropout import SharedDropout2d
from cpn_fast.models.network import HEADS
from cpn_fast.pipelines.superpixels import SuperpixelCache
from cpn_fast.pipelines.training import TrainingPipeline
from cpn_fast.progress import Progress
from cpn_fast.ranks import Rank
from cpn_fast.weights import load_into, read_weights, to_network_keys, to_released_keys

DROPOUT, HIDING = range(2)  # streams of random numbers


def run(config: Config) -> Path:
    """Train the config's method, as ``fit`` does."""
    return fit(config, METHODS[config.method])


def fit(config: Config, build: Callable[[Config], Method]) -> Path:
    """Train, or continue where the run's newest checkpoint stands; returns the file of final weights.

    ``build`` makes the method; ``config`` says where (``out`` and ``name``), on what and how it is trained. Raises
    UserError for anything wrong with the data, the weights, or a run folder that belongs to another config.

    Under torchrun the processes share each step's images and average their gradients; the first one writes. Their
    number may change between two starts.
    """
    train, rank = config.train, ranks.join()
    device = rank.device
    if train.deterministic:
        choose_deterministic_algorithms()
    if train.batch % rank.world:
        raise UserError(f"train.batch is {train.batch}, expected a multiple of torchrun's {rank.world} processes")
    final = config.run / "model.safetensors"
    if rank.first:
        _open_run(config, device)
    rank.wait()
    state = checkpoint.newest(config.run / "checkpoints", device)
    if state is not None and _is_complete(final):
        return final

    samples = load_samples(config.data, config.classes, config.data.train_list, labels=True, masks=None)
    verified = config.run / "verified.json"
    if rank.first:
        check_files(samples, workers=train.data_threads, classes=len(config.classes), verified=verified)
    torch.manual_seed(train.seed)
    method = build(config)
    network = method.network
    if state is None and config.model.weights is None and network.backbone.frozen:
        raise UserError(
            f"model.weights is null, but {config.model.backbone} keeps its first layers and its batch statistics as "
            "they are, which random weights do not survive: name a file of pretrained weights (README, The main job)"
        )
    if state is None and config.model.weights is not None:
        load_into(
            network,
            to_network_keys(read_weights(config.model.weights)),
            source=config.model.weights,
            allow_missing=[f"{head}.*" for head in HEADS],
            allow_unexpected=[f"backbone.{pattern}" for pattern in network.backbone.classifier],
        )
    network = network.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    online = None
    if method.map != "superpixels":
        map_path = method.map
    elif config.superpixels.mode == "online":
        map_path, online = None, config.superpixels
    else:
        cache = SuperpixelCache(config.superpixel_cache, config.superpixels)
        cache.build(samples, workers=train.data_threads)
        map_path = superpixel_path(cache)

    optimizer = make_optimizer(network, train, device)
    start = 0
    if state is not None:
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    share = train.batch // rank.world
    for module in network.modules():
        if isinstance(module, SharedDropout2d):
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
        rank=rank.number,
        world=rank.world,
        start_step=start * train.accumulate,
    )
    steps = train.steps or (train.epochs or 0) * pipeline.steps_per_epoch // train.accumulate
    if steps == 0:
        raise UserError(f"train.accumulate is {train.accumulate}, more than the batches of all epochs: lower it")
    generator = torch.Generator(device)
    meter = Meter(config, rank, start, pipeline.steps_per_epoch // train.accumulate)
    guard = GradientGuard(config.run, [sample.id for sample in samples], train.nonfinite, rank)
    batches = timed(pipeline, meter)
    forward = network if rank.world == 1 else averaging(network)

    with meter, signals.noted() as stopping, Progress(f"train {config.name}", steps, start) as progress:
        for step in range(start, steps):
            torch.manual_seed(keyed_seed(train.seed, step, DROPOUT))
            generator.manual_seed(keyed_seed(train.seed, step, HIDING))
            factor = (1 - step / steps) ** train.power
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
            seen = []
            for left in reversed(range(train.accumulate)):
                batch = next(batches)
                views = method.views(batch, generator)
                with exchanging(forward, now=left == 0):
                    with autocast(train.precision, device):
                        outputs = [
                            forward(images.contiguous(memory_format=torch.channels_last), *others)
                            for images, *others in views.inputs
                        ]
                    losses = method.losses(outputs, views)
                    (losses.total / train.accumulate).backward()
                meter.add(losses.total.detach(), losses.parts, losses.logits, batch.labels)
                seen.append(batch.indices)
            done = step + 1
            meter.norms.append(guard.see(done, network.parameters(), seen))
            optimizer.step()
            logs = done % train.log_every == 0 or done == steps
            # One process stops after any step; several must stop after the same one, and agree when they log.
            stops = done < steps and (stopping() if rank.world == 1 else logs and any(rank.gather(stopping())))
            keeps = done % train.checkpoint_every == 0 or done == steps or stops
            if logs or keeps:
                meter.skipped += guard.check()
            note = meter.write(done, train.lr * factor) if logs else None
            if rank.first and keeps:
                checkpoint.write(
                    config.run / "checkpoints",
                    done,
                    model=network.state_dict(),
                    optimizer=optimizer.state_dict(),
                    config=configs.dump(config),
                )
            progress.advance(note=note)
            if stops:
                raise signals.Stopped(f"stopped after step {done} of {steps}, which {config.run} keeps")
    if rank.first:
        tensors = {name: tensor.contiguous() for name, tensor in to_released_keys(network.state_dict()).items()}
        with replacing(final) as file:
            file.write(safetensors.torch.save(tensors))
    rank.wait()
    return final


def choose_deterministic_algorithms() -> None:
    """In this process from now on: torch's own, cuDNN's and cuBLAS's."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def make_optimizer(network: Headed, train: Train, device: torch.device) -> torch.optim.SGD:
    """SGD in four groups: backbone weights x1, biases x2, head weights x10, biases x20; biases do not decay."""
    groups: list[dict[str, Any]] = []
    for is_head, is_bias, times in ((False, False, 1), (False, True, 2), (True, False, 10), (True, True, 20)):
        parameters = [
            parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and name.startswith("backbone.") != is_head and name.endswith("bias") == is_bias
        ]
        decay = 0.0 if is_bias else train.weight_decay
        groups.append({"params": parameters, "base_lr": train.lr * times, "weight_decay": decay})
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, fused=device.type == "cuda")


def autocast(precision: str | None, device: torch.device) -> Any:
    """The forward pass's autocast: bf16 on CUDA and none on CPU unless ``precision`` says otherwise."""
    bf16 = precision == "bf16" or (precision is None and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def averaging(network: nn.Module) -> DistributedDataParallel:
    """The network with gradients averaged over the processes. Buffers never change, so none are exchanged."""
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    options: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **options)


def exchanging(forward: nn.Module, *, now: bool) -> Any:
    """A block whose backward pass averages the gradients over the processes, or leaves that to a later one."""
    if now or not isinstance(forward, DistributedDataParallel):
        return nullcontext()
    return forward.no_sync()


def keyed_seed(*key: int) -> int:
    """A seed for (seed, step, stream): streams of different keys are independent."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def superpixel_path(cache: SuperpixelCache) -> Callable[[Sample], Path]:
    return lambda sample: cache.path(sample.id)


def timed(batches: Any, meter: Meter) -> Iterator[Any]:
    """The batches, with the time spent waiting for them told to the meter."""
    iterator = iter(batches)
    while True:
        began = time.perf_counter()
        batch = next(iterator)
        meter.waited += time.perf_counter() - began
        yield batch


class Meter:
    """Running means since the last line, written to metrics.jsonl and TensorBoard.

    Values stay on the device until a line is written, so that the loop does not wait for them. Means are over all
    processes; the first writes.
    """

    def __init__(self, config: Config, rank: Rank, start: int, steps_per_epoch: int) -> None:
        self.path, self.rank = config.run / "metrics.jsonl", rank
        self.batch, self.classes, self.steps_per_epoch = config.train.batch, config.classes, max(1, steps_per_epoch)
        self.board = None
        if rank.first:
            kept = [line for line in read_metrics(self.path) if line["step"] <= start]
            with replacing(self.path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
            self.board = SummaryWriter(config.run, purge_step=start + 1)
        self.last_step = start
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self._restart()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()

    def _restart(self) -> None:
        self.began, self.waited = time.perf_counter(), 0.0
        self.sums: dict[str, Tensor] = {}
        self.norms: list[Tensor] = []
        self.batches = self.skipped = 0

    def add(self, total: Tensor, parts: dict[str, Tensor], logits: Tensor | None, labels: Tensor) -> None:
        for name, value in {"loss": total, **parts}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        if logits is not None:
            self.logits.append(logits)
            self.labels.append(labels)
        self.batches += 1

    def write(self, step: int, lr: float) -> str:
        """Write a line; returns a short note for the progress bar."""
        own = {name: float(value) / self.batches for name, value in self.sums.items()}
        everywhere = self.rank.gather(own)
        means = {name: sum(means[name] for means in everywhere) / len(everywhere) for name in own}
        seconds = time.perf_counter() - self.began
        line: dict[str, Any] = {"step": step, "epoch": round(step / self.steps_per_epoch, 3), "lr": lr, **means}
        line["images_per_second"] = self.batches * self.batch / seconds
        line["waiting"] = self.waited / seconds
        line["gradient_norm"] = float(torch.stack(self.norms).mean())
        if self.skipped:
            line["skipped"] = self.skipped
        if self.logits and step // self.steps_per_epoch > self.last_step // self.steps_per_epoch:
            seen = self.rank.gather((torch.cat(self.labels).cpu(), torch.cat(self.logits).float().cpu()))
            labels, logits = (torch.cat(parts) for parts in zip(*seen, strict=True))
            line["mAP"] = mean_average_precision(labels, logits)
            self.logits.clear()
            self.labels.clear()
        if self.board is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in line.items():
                if name not in ("step", "epoch"):
                    self.board.add_scalar(name, value, step)
        self.last_step = step
        note = f"loss {means['loss']:.3f}  {line['images_per_second']:.1f} images/s  data {line['waiting']:.0%}"
        self._restart()
        return note


def mean_average_precision(labels: Tensor, logits: Tensor) -> float:
    """Mean over the classes that occur, of the average precision of their logits; (N, classes) each."""
    truth, scores = labels.cpu().numpy() > 0.5, logits.float().cpu().numpy()
    occurring = truth.any(axis=0)
    return float(average_precision_score(truth[:, occurring], scores[:, occurring]))


def _open_run(config: Config, device: torch.device) -> None:
    """Make the run's folder; refuse that of another config."""
    resolved = configs.dump(config)
    path = config.run / "config.yaml"
    if path.exists():
        old = configs.dump(configs.load(path))  # keys that are newer than the run have their defaults
        differing = _differences(yaml.safe_load(old), yaml.safe_load(resolved))
        if differing:
            raise UserError(
                f"{config.run} holds a run of another config; these keys differ: {', '.join(differing)}. "
                "Give this one another name, or delete that folder"
            )
    remove_partials(config.run, config.run / "checkpoints")
    checkpoint.prune(config.run / "checkpoints")
    with replacing(path) as file:
        file.write(resolved.encode())
    environment = {
        "cpn_fast": cpn_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
    }
    with replacing(config.run / "environment.json") as file:
        file.write(json.dumps(environment, indent=2).encode() + b"\n")


# What may change between two starts of one run: nothing that the weights of a sound run depend on.
FREE = {"out", "cam", "evaluate", "crf", "affinity", "walk", "segment", "data.eval_list", "data.masks"} | {
    f"train.{key}" for key in ("log_every", "checkpoint_every", "data_threads", "nonfinite")
}


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        key, a, b = prefix + name, old.get(name), new.get(name)
        if a == b or key in FREE:
            continue
        keys += _differences(a, b, key + ".") if isinstance(a, dict) and isinstance(b, dict) else [key]
    return keys


def _is_complete(weights: Path) -> bool:
    """Whether they are there with every byte that their header tells of."""
    try:
        with safetensors.safe_open(weights, "pt"):
            return True
    except (OSError, safetensors.SafetensorError):
        return False
