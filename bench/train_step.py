"""A CPN training step: the released structure, then our optimisations, added one at a time.

"As released" follows the released trainer: a Python loop over pixels that hides patches, three forward passes in fp32
with an affinity of all pixel pairs, six 21-channel maps upsampled to the crop and about sixty passes over them, and a
loss that is read back after every step. Each row keeps the optimisations of the rows above it. Data loading and SLIC
are not timed: images and superpixels are random and ready. The released loader hides patches in worker processes, so
with enough of them the released code starts from the second row.

"The trainer's step" is the one of ``cpn-fast train``, with all of these, which also copies its inputs and returns the
figures to log. All rows give the same loss and gradients for the same patches without dropout; this is checked first.
FLOPs count the convolutions, forward and backward. MFU is their rate over the rate of a large matrix product in the
same run (bf16 on a GPU, the faster of fp32 and bf16 on a CPU). "first s" is the time of a step's first call, with all
compilation. On a CPU one thread computes MobileNetV2 at 225 px, and all seconds are CPU time, so that other work on the
machine has little effect. On a GPU ResNet38d runs at 448 px. More rows follow there: variants of the network
(``step_variants.py``), each with all our optimisations, and four times the images. The most important rows are measured
first, and the file is written after every row. A profile of the trainer's step is written next to it.

    python bench/train_step.py [--batch N] [--device DEVICE] [--out FOLDER]
"""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from step_variants import InterleavedBlocks, with_interleaved_convolutions
from timing import (
    Times,
    arguments,
    call_times,
    folder,
    machine,
    matmul_rate,
    peak_extra_bytes,
    plot_bars,
    print_table,
    repeated,
    wait,
    warm_up,
    write_json,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from cpn_fast import config_file
from cpn_fast.config import Model, Patches
from cpn_fast.kernels import background_suppression, complementary_losses, pooled_logits
from cpn_fast.methods.cpn import Cpn
from cpn_fast.methods.method import Views
from cpn_fast.methods.patches import Pair, complementary_pair
from cpn_fast.models import build_backbone, network
from cpn_fast.models.backbone import Backbone, Headed, to_device
from cpn_fast.models.resnet38d import Block, Bottleneck
from cpn_fast.pipelines.batch import Batch
from cpn_fast.runtime.distributed import Rank
from cpn_fast.training import step as training

CLASSES, SUPERPIXELS = 20, 200
PRESENT = (1, 2, 1, 1, 3, 1, 2, 1)  # classes of successive images, as often as in VOC


@dataclass(frozen=True)
class Ways:
    """Our optimisations of a step. With all off it is as released."""

    patches_by_gather: bool = False
    one_forward: bool = False
    fused_affinity: bool = False
    fused_losses: bool = False
    no_waiting: bool = False
    channels_last: bool = False
    bf16: bool = False
    compiled: bool = False
    cuda_graph: bool = False
    trainers: bool = False
    """The step of ``cpn-fast train`` instead of this script's."""
    body: Callable[[], Backbone] | None = None
    """A variant of the backbone, from ``step_variants.py``."""
    by_blocks: bool = False
    """torch.compile of each residual block alone; equal blocks share the generated code."""


WORDS = {
    "patches_by_gather": "+ patches hidden on the device",
    "one_forward": "+ one forward pass of all three",
    "fused_affinity": "+ PCM and PRCM without the affinity",
    "fused_losses": "+ losses from the small maps",
    "no_waiting": "+ nothing read back, fused SGD",
    "channels_last": "+ channels last",
    "bf16": "+ bf16 autocast",
    "compiled": "+ compiled network and losses",
    "cuda_graph": "+ whole step in a CUDA graph",
    "trainers": "the trainer's step",
}
ONLY_ON_GPU = {"compiled": "compiles for minutes on a CPU and is no faster there", "cuda_graph": "needs a GPU"}
VARIANTS: dict[str, dict[str, Any]] = {
    "variant: each dilated convolution on interleaved pixels": {"body": with_interleaved_convolutions},
    "variant: b5 to b7 on interleaved pixels": {"body": InterleavedBlocks},
    "variant: blocks compiled one by one": {"by_blocks": True},
}


@dataclass(frozen=True)
class Data:
    images: Tensor
    """float32 (B, 3, side, side), normalised."""
    superpixels: Tensor
    """int32 (B, side, side)."""
    labels: Tensor
    """float32 (B, CLASSES)."""


class Step:
    """A network and its optimiser, with fixed random weights. A call makes one training step."""

    def __init__(self, ways: Ways, data: Data, backbone: str) -> None:
        torch.manual_seed(0)
        self.ways, self.data = ways, data
        self.device, self.size = data.images.device, tuple(data.images.shape[2:])
        options = Model(backbone=backbone)
        with self.device:
            body = build_backbone(options) if ways.body is None else ways.body()
            self.network = network.Network(body, CLASSES, options).train()
        keep_alive(self.network)
        layout = torch.channels_last if ways.channels_last else torch.contiguous_format
        self.network.to(memory_format=layout)  # type: ignore[call-overload]
        self.layout = layout
        self.forward: Callable[[Tensor], network.Cams] = self.network
        self.losses: Callable[..., Tensor] = our_losses if ways.fused_losses else released_losses
        if ways.by_blocks:
            for module in self.network.backbone.modules():
                if isinstance(module, Block | Bottleneck):
                    module.compile(dynamic=False)
        elif ways.compiled:
            self.forward = torch.compile(self.network, dynamic=False, options={"fallback_random": True})
        if ways.compiled:
            self.losses = torch.compile(our_losses, dynamic=False)
        groups: dict[float, list[Tensor]] = {0.001: [], 0.01: []}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                groups[0.001 if name.startswith("backbone.") else 0.01].append(parameter)
        how: dict[str, Any] = {"fused": True} if ways.no_waiting else {"foreach": False}
        rate = (lambda lr: torch.tensor(lr, device=self.device)) if ways.cuda_graph else float
        self.optimizer = torch.optim.SGD(
            [{"params": parameters, "lr": rate(lr)} for lr, parameters in groups.items()],
            lr=rate(0.001),
            momentum=5e-4,
            weight_decay=5e-4,
            **how,
        )
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.rng = np.random.default_rng(0)
        self.seen = 0.0
        self.replay: Callable[[], None] | None = None
        self.captured_bytes: int | None = None
        """Memory of the captured step, without the memory held between steps."""

    def __call__(self) -> None:
        if self.ways.cuda_graph:
            self.replay = self.replay or self._capture()
            self.replay()
        else:
            self._step()

    def loss(self, pair: Pair) -> Tensor:
        views = [self.data.images, pair.visible, pair.complement]
        on = torch.autocast(self.device.type, torch.bfloat16, enabled=self.ways.bf16)
        with on, affinity_stored(not self.ways.fused_affinity):
            if self.ways.one_forward:
                cams = self.forward(torch.cat(views).contiguous(memory_format=self.layout))
                raw, refined = (maps.unflatten(0, (3, -1)) for maps in cams)  # type: ignore[union-attr]
            else:
                maps = [self.forward(view.contiguous(memory_format=self.layout)) for view in views]
                raw, refined = (torch.stack(of_views) for of_views in zip(*maps, strict=True))
        return self.losses(raw, refined, pair.share, self.data.labels, self.size)

    def _step(self) -> None:
        if self.ways.patches_by_gather:
            pair = complementary_pair(
                self.data.images, self.data.superpixels, Patches(), None, self.generator, patch_limit=SUPERPIXELS
            )
        else:
            pair = looped_pair(self.data.images, self.data.superpixels, self.draws())
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(pair)
        loss.backward()
        self.optimizer.step()
        if not self.ways.no_waiting:
            self.seen = float(loss.detach())

    def draws(self) -> list[list[int]]:
        """Draw hidden patches for each image as released, with replacement."""
        counts = [int(labels.max()) + 1 for labels in self.data.superpixels]
        return [self.rng.integers(0, count, count // 2).tolist() for count in counts]

    def _capture(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)

        def capture() -> None:
            with torch.cuda.graph(graph, stream=stream):
                self._step()

        self.captured_bytes = peak_extra_bytes(capture, self.device)
        return graph.replay


class TrainersStep:
    """The same for ``training.step.Step``, with the released method and the default settings of ``cpn-fast train``."""

    def __init__(self, data: Data, backbone: str, precision: str = "bf16") -> None:
        torch.manual_seed(0)
        images = data.images
        tree = {"model": {"backbone": backbone}, "train": {"batch": len(images), "steps": 1, "precision": precision}}
        config = config_file.parse({"name": "train_step", "data": {"root": "."}, **tree}, "train_step")
        self.method = Cpn(config)
        self.network = to_device(self.method.network, images.device).train()
        keep_alive(self.network)
        self.batch = Batch(images, data.superpixels, data.labels, torch.arange(len(images), device=images.device))
        optimizer = training.make_optimizer(self.network, config.train, images.device)
        training.set_rate(optimizer, 1)
        generator = torch.Generator(images.device).manual_seed(0)
        self.step = training.Step(self.method, optimizer, generator, config.train, Rank(0, 1, 0), images.device)
        self.captured_bytes: int | None = None

    def __call__(self) -> None:
        if self.step.captures and self.step.made == training.WARM_UP and self.step.graph is None:
            self.captured_bytes = peak_extra_bytes(self._step, self.batch.images.device)
        else:
            self._step()

    def _step(self) -> None:
        self.step([self.batch])

    def loss(self, pair: Pair) -> Tensor:
        images, labels = torch.cat([self.batch.images, pair.visible, pair.complement]), self.batch.labels.repeat(3, 1)
        outputs = [self.network(images.contiguous(memory_format=torch.channels_last))]
        return self.method.losses(outputs, Views([(images, labels)], self.batch, pair.share)).total


def keep_alive(net: Headed) -> None:
    """Scale convolutions to keep the variance, so that features of random weights do not fade to zeros."""
    for module in net.backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)


def looped_pair(images: Tensor, superpixels: Tensor, hidden: list[list[int]]) -> Pair:
    """Make a pair pixel by pixel in Python, as released: from a mask of hidden patches and its complement."""
    signs = []
    for labels, numbers in zip(superpixels.cpu().numpy(), hidden, strict=True):
        drawn = set(numbers)
        sign = np.ones(labels.shape, np.float32)
        for y in range(labels.shape[0]):
            for x in range(labels.shape[1]):
                if labels[y, x] in drawn:
                    sign[y, x] = 0
        signs.append(torch.from_numpy(sign))
    shown = torch.stack(signs)[:, None].to(images.device)
    return Pair(images * shown, images * (1 - shown), shown.mean((1, 2, 3)))


@contextmanager
def affinity_stored(stored: bool) -> Iterator[None]:
    """Make the network use the plain formulas, which store an affinity of all pixel pairs."""
    if not stored:
        yield
        return
    names = ("pixel_correlation", "region_pooling", "region_correlation")
    plain = {name: functools.partial(getattr(network, name), backend="eager") for name in names}
    with mock.patch.multiple(network, **plain):  # type: ignore[call-overload]
        yield


def our_losses(raw: Tensor, refined: Tensor, visible: Tensor, labels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return the sum of losses of maps (3, B, 1 + CLASSES, h, w), as in ``methods.Cpn``."""
    tall, wide = size
    thrice = labels.repeat(3, 1)
    logits = pooled_logits(raw.flatten(0, 1)[:, 1:], size=(tall, wide))
    terms = complementary_losses(raw, refined, visible, labels, size=(tall, wide))
    suppression = background_suppression(refined.flatten(0, 1), thrice, size=(tall, wide))
    return F.multilabel_soft_margin_loss(logits, thrice) + terms.tcp + terms.tcp_refined + terms.cpcr + suppression


def released_losses(raw: Tensor, refined: Tensor, visible: Tensor, labels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return the sum of ``our_losses``, computed at the crop's resolution, term after term."""
    present = torch.cat([torch.ones_like(labels[:, :1]), labels], 1)[:, :, None, None]
    shares = [torch.ones_like(visible), visible, 1 - visible]
    total = raw.new_zeros((), dtype=torch.float32)
    scaled: list[list[Tensor]] = [[], []]
    for cam, refined_cam, share in zip(raw, refined, shares, strict=True):
        cam, refined_cam = (
            F.interpolate(maps.float(), size, mode="bilinear", align_corners=True) for maps in (cam, refined_cam)
        )
        logits = F.adaptive_avg_pool2d(cam, (1, 1))[:, 1:, 0, 0]
        strongest = (refined_cam * present)[:, 1:].amax(1).flatten(1)
        lowest = strongest.topk(int(0.25 * strongest.shape[1]), largest=False)[0]
        total = total + (F.multilabel_soft_margin_loss(logits, labels) + lowest.relu().mean()) / 3
        for maps, kept in ((cam, scaled[0]), (refined_cam, scaled[1])):
            kept.append(share[:, None, None, None] * stretched(maps) * present)

    (cam, cam_1, cam_2), (refined_cam, refined_1, refined_2) = scaled
    total = total + (cam_2.detach() + cam_1.detach() - cam)[:, 1:].abs().mean()
    total = total + (refined_cam - refined_1 - refined_2)[:, 1:].abs().mean()
    cam, cam_1, cam_2, refined_1, refined_2 = (
        with_background(maps) for maps in (cam, cam_1, cam_2, refined_1, refined_2)
    )
    for seen, other in ((cam_1, refined_2), (cam_2, refined_1)):
        target = (cam - seen).detach()
        target = target * (target == target.amax(1, keepdim=True))
        errors = (target - other).abs().flatten(1)
        total = total + errors.topk(int(0.2 * errors.shape[1]))[0].mean()
    return total


def stretched(maps: Tensor) -> Tensor:
    maps = maps.relu()
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low - 1e-5).relu() / (high - low + 1e-5)


def with_background(maps: Tensor) -> Tensor:
    return torch.cat([1 - maps[:, 1:].amax(1, keepdim=True), maps[:, 1:]], 1)


def generated(batch: int, side: int, device: torch.device) -> Data:
    """Return smooth images, superpixels around random points, and labels with VOC's number of classes."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, 3, side // 16, side // 16, generator=generator)
    noise = torch.randn(batch, 3, side, side, generator=generator)
    images = F.interpolate(coarse, (side, side), mode="bicubic") + noise / 10
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2).float()
    centres = side * torch.rand(batch, SUPERPIXELS, 2, generator=generator)
    superpixels = torch.stack([torch.cdist(grid, points).argmin(1) for points in centres]).view(batch, side, side)
    labels = torch.zeros(batch, CLASSES)
    for index, row in enumerate(labels):
        row[torch.randperm(CLASSES, generator=generator)[: PRESENT[index % len(PRESENT)]]] = 1
    return Data(images.to(device), superpixels.int().to(device), labels.to(device))


def check(data: Data, backbone: str) -> dict[str, float]:
    """Return the largest errors in fp32 against "as released" on one pair: loss, and gradients of fc8 and f9.

    Compared are all our optimisations that fp32 on a CPU has too, and the trainer's step.
    """
    released = Step(Ways(), data, backbone)
    hidden = released.draws()
    looped = looped_pair(data.images, data.superpixels, hidden)
    gathered = torch.zeros(len(hidden), SUPERPIXELS, dtype=torch.bool)
    for row, numbers in zip(gathered, hidden, strict=True):
        row[numbers] = True
    covered = gathered.to(data.images.device).gather(1, data.superpixels.flatten(1).long()).view(data.superpixels.shape)
    assert torch.equal(looped.visible == 0, (covered[:, None] | (data.images == 0)).expand_as(data.images))

    results = []
    for step in (
        released,
        Step(Ways(True, True, True, True, True, True), data, backbone),
        TrainersStep(data, backbone, "fp32"),
    ):
        step.network.load_state_dict(released.network.state_dict())
        step.network.eval()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        loss = step.loss(looped)
        loss.backward()
        gradients = [step.network.fc8.weight.grad, step.network.f9.weight.grad]
        results.append([loss.detach(), *(gradient for gradient in gradients if gradient is not None)])
    torch.backends.cudnn.allow_tf32 = True
    expected, *others = results
    errors = [
        float(np.max([float((a - b).square().mean().sqrt() / a.square().mean().sqrt()) for b in found]))
        for a, *found in zip(expected, *others, strict=True)
    ]
    named = dict(zip(("loss", "gradient of fc8", "gradient of f9"), errors, strict=True))
    assert named["loss"] < 1e-4, named
    assert all(error < 2e-2 for error in named.values()), named  # fails for NaN too
    return named


def convolution_flops(step: Callable[[], object]) -> int:
    """Return the FLOPs of a step's convolutions, forward and backward."""
    ours = {torch.ops.aten.convolution_backward: backward_flops}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "convolution" in str(operation))


def backward_flops(gradient: list[int], images: list[int], weight: list[int], *options: Any, out_shape: Any) -> int:
    """Return the forward pass's FLOPs for each wanted gradient. torch counts a depthwise weight's as if dense."""
    *_, (of_images, of_weight, _) = options
    return (of_images + of_weight) * conv_flop_count(images, weight, gradient)


def step_times(run: Callable[[], object], device: torch.device) -> Times:
    """Time calls after the warm-up, within about 10 s: wall clock on a GPU, CPU time on a CPU."""
    if device.type == "cuda":
        return call_times(run, device, budget=10, flush=False)  # a step moves far more than L2 holds
    warm_up(run, device)

    def once() -> float:
        begin = time.process_time()
        run()
        return time.process_time() - begin

    return repeated(once, device, 20, 10)


def multiply_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the dense FLOP/s, by the clock of ``step_times``."""
    if device.type == "cuda":
        return matmul_rate(device, dtype)
    a, b = (torch.randn(1536, 1536).to(dtype) for _ in range(2))
    return 2 * 1536**3 / step_times(lambda: a @ b, device).median


def profiled(step: Callable[[], None], device: torch.device) -> str:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60)


class Case(NamedTuple):
    name: str
    ways: Ways
    times: int = 1
    """Factor of the number of images."""


def cases(gpu: bool, batch: int) -> list[Case]:
    """Return the rows in order: our optimisations, added one at a time; on a GPU also variants and more images."""
    ways, ladder = Ways(), [Case("as released", Ways())]
    for name, words in WORDS.items():
        if gpu or name not in ONLY_ON_GPU:
            switch: dict[str, Any] = {name: True}
            ways = replace(ways, **switch)
            ladder.append(Case(words, ways))
    if gpu:
        ladder += [Case(name, replace(ways, trainers=False, **switches)) for name, switches in VARIANTS.items()]
        ladder.append(Case(f"+ {4 * batch} images a step", ways, 4))
    return ladder


def decisive_first(ladder: list[Case]) -> list[Case]:
    """Reorder: as released, the trainer's, ours in a graph, more images, variants; then the rows between, backwards."""
    if not any(case.ways.cuda_graph for case in ladder):
        return ladder
    between = [case for case in ladder[1:] if not case.ways.cuda_graph]
    whole, trainers, *variants, larger = (case for case in ladder if case.ways.cuda_graph)
    return [ladder[0], trainers, whole, larger, *variants, *reversed(between)]


def measured(
    case: Case, data: Data, backbone: str, flops: float, peak: float
) -> tuple[dict[str, Any], Step | TrainersStep]:
    """Return a row, and the step for a profile."""
    device, count = data.images.device, len(data.images)
    begin = time.perf_counter()
    step = TrainersStep(data, backbone) if case.ways.trainers else Step(case.ways, data, backbone)
    step()
    wait(device)
    first = time.perf_counter() - begin
    times = step_times(step, device)
    memory = peak_extra_bytes(step, device) if step.captured_bytes is None else step.captured_bytes
    return {
        "step": case.name,
        "ms": 1e3 * times.median,
        "ms p20": 1e3 * times.low,
        "ms p80": 1e3 * times.high,
        "repeats": times.repeats,
        "first s": first,
        "images/s": count / times.median,
        "peak MiB": memory / 2**20,
        "TFLOP/s": flops * count / times.median / 1e12,
        "MFU": flops * count / times.median / peak,
    }, step


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=4, help="images in a step (default 4, as released)")
    options = parser.parse_args()
    device, gpu = options.device, options.device.type == "cuda"
    backbone, side = ("resnet38d", 448) if gpu else ("mobilenet_v2", 225)
    batch = options.batch
    torch.set_num_threads(1)
    described, out = machine(device), folder(options.out, device)
    data = generated(batch, side, device)
    errors = check(generated(2, side, device), backbone)
    rates = {str(dtype): multiply_rate(device, dtype) for dtype in (torch.bfloat16, torch.float32)}
    peak = rates["torch.bfloat16"] if gpu else max(rates.values())
    flops = convolution_flops(Step(Ways(True, True, True, True), data, backbone)) / batch

    by_name: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    left_out = {} if gpu else {WORDS[name]: why for name, why in ONLY_ON_GPU.items()}
    title = f"CPN step of {batch} images, {backbone} at {side} px, {described['device']}"
    ladder = cases(gpu, batch)
    whole = next(case for case in ladder if case.ways.trainers)

    def rows() -> list[dict[str, Any]]:
        shown = [by_name[case.name] for case in ladder if case.name in by_name]
        released = by_name.get("as released")
        return [row | {"times faster": row["images/s"] / released["images/s"]} if released else row for row in shown]

    def save(*, finished: bool) -> None:
        write_json(
            out / "train_step.json",
            described,
            rows(),
            finished=finished,
            batch=batch,
            backbone=backbone,
            side=side,
            tflop_per_image=flops / 1e12,
            matmul_tflops={dtype: rate / 1e12 for dtype, rate in rates.items()},
            errors=errors,
            left_out=left_out,
            failures=failures,
        )

    for case in decisive_first(ladder):
        try:
            case_data = data if case.times == 1 else generated(case.times * batch, side, device)
            by_name[case.name], step = measured(case, case_data, backbone, flops, peak)
            save(finished=False)
            if case is whole:
                (out / "train_step_profile.txt").write_text(f"{title}: {case.name}\n{profiled(step, device)}\n")
            del step
        except RuntimeError as error:  # out of memory, for example: the next rows may still fit
            failures[case.name] = str(error).splitlines()[0]
        torch.compiler.reset()
        gc.collect()  # to free this step's memory for the next one
        torch.cuda.empty_cache()
    save(finished=True)
    print_table(title, rows())
    for what, why in failures.items():
        print(f"failed: {what}: {why}")
    for what, why in left_out.items():
        print(f"left out: {what}: {why}")
    plot_bars(
        out / "train_step.png",
        "CPN step",
        "images/s",
        {name: {"images/s": row["images/s"]} for name, row in by_name.items()},
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
