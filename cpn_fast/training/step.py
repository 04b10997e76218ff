"""One optimiser step: views of the batches, forward, losses, backward, the gradient's norm, new weights.

Nothing in it waits for the device. All inputs of a step are in tensors with a fixed address: batches are copied into
buffers, and learning rates are tensors. So on a GPU a CUDA graph can capture the whole step and launch its kernels at
once.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpn_fast.config import Train
from cpn_fast.methods.method import Method
from cpn_fast.models.backbone import Headed
from cpn_fast.pipelines.batch import Batch
from cpn_fast.runtime.distributed import Rank
from cpn_fast.runtime.errors import UserError, is_out_of_memory
from cpn_fast.runtime.precision import autocast
from cpn_fast.training.nonfinite import gradient_norm

WARM_UP = 3
"""Steps before the capture. They compile kernels and let libraries allocate their memory."""


class Figures(NamedTuple):
    """The figures of a step, on its device. The next step may overwrite them."""

    names: tuple[str, ...]
    """``loss``, the method's terms, ``gradient_norm`` and ``scale``, which is 1 without a gradient scaler."""
    values: Tensor
    """float32 (names,), means over the step's batches. The norm is not finite where the gradient was not."""
    logits: Tensor | None
    """(images of the step, classes); None if the method does not classify."""


class Step:
    """A call with ``train.accumulate`` batches of one size makes a step of the method's network.

    Random numbers come from torch's default generator and from ``generator``. The caller may seed both between steps;
    captured steps follow the seeds too. Raises UserError if ``train`` asks for something that this device cannot do.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        train: Train,
        rank: Rank,
        device: torch.device,
    ) -> None:
        self.method, self.optimizer, self.generator, self.device = method, optimizer, generator, device
        self.precision, self.losses = train.precision, method.losses
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
        self.zeroes = train.nonfinite == "skip" or self.scaler.is_enabled()
        network = method.network
        network.backbone.recomputes = train.checkpoint_activations
        self.compiles = train.compile or (train.compile is None and device.type == "cuda")
        if self.compiles:
            if train.checkpoint_activations and rank.world > 1:
                raise UserError(
                    "train.checkpoint_activations under torchrun needs train.compile=false: torch.compile cannot cut a "
                    "network with recomputed blocks where gradients are exchanged"
                )
            compile_in_place(network)
            self.losses = torch.compile(method.losses, dynamic=False)
        self.forward: nn.Module = network
        self.averages = rank.world > 1
        self.inputs: list[Batch] = []
        self.captures = captures(train, rank, device)
        self.side = torch.cuda.Stream(device) if self.captures else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.figures: Figures | None = None
        self.made = 0

    def __call__(self, batches: Sequence[Batch]) -> Figures:
        if self.inputs:
            for buffers, batch in zip(self.inputs, batches, strict=True):
                for buffer, tensor in zip(_tensors(buffers).values(), _tensors(batch).values(), strict=True):
                    buffer.copy_(tensor)
        else:
            copies: list[dict[str, Any]] = [
                {name: tensor.clone() for name, tensor in _tensors(batch).items()} for batch in batches
            ]
            self.inputs = [batch._replace(**copy) for batch, copy in zip(batches, copies, strict=True)]
            if self.averages:
                self._freeze_untrained()
                self.forward = averaging(self.method.network)
        return self._captured() if self.captures else self._make()

    def _freeze_untrained(self) -> None:
        """Freeze the parameters that get no gradient: ``averaging`` waits for a gradient of every other one.

        They are those of the refinement, if all its terms have the weight 0, and of layers that a timm model has behind
        the features. An image of the first batch shows which ones. Weights, statistics and random numbers stay the
        same.
        """
        network, batch = self.method.network, self.inputs[0]
        first: dict[str, Any] = {name: tensor[:1] for name, tensor in _tensors(batch).items()}
        views = self.method.views(batch._replace(**first), torch.Generator(self.device))
        network.eval()
        with autocast(self.precision, self.device):
            # Not network(...): torch.compile would compile it for this shape.
            outputs = [
                network.forward(images.contiguous(memory_format=torch.channels_last), *others)
                for images, *others in views.inputs
            ]
        self.method.losses(outputs, views).total.backward()
        network.train()
        for parameter in network.parameters():
            if parameter.grad is None:
                parameter.requires_grad_(False)
        self.optimizer.zero_grad(set_to_none=True)

    def _captured(self) -> Figures:
        """Make the first steps on a side stream, to warm up memory and autograd for the capture; then run the graph."""
        if self.made < WARM_UP:
            self.made += 1
            assert self.side is not None
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                figures = self._make()
            torch.cuda.current_stream().wait_stream(self.side)
            return figures
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.generator)  # the capture registers torch's own
            self.optimizer.zero_grad(set_to_none=True)  # otherwise they stay in memory beside those of the graph
            failed: BaseException | None = None
            try:  # thread_local: the work of DALI's threads must not end the capture
                with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):
                    try:
                        self.figures = self._make()
                    except BaseException as error:
                        failed = error
                        raise
            except RuntimeError as error:  # the end of a failed capture fails too, and hides the reason
                failed = failed or error
                if not isinstance(failed, RuntimeError):
                    raise failed from None
                raise UserError(_why_not_captured(failed)) from failed
        self.graph.replay()
        assert self.figures is not None
        return self.figures

    def _make(self) -> Figures:
        self.optimizer.zero_grad(set_to_none=True)
        all_losses = []
        for remaining, batch in zip(reversed(range(len(self.inputs))), self.inputs, strict=True):
            views = self.method.views(batch, self.generator)
            with exchanging(self.forward, now=remaining == 0):
                with autocast(self.precision, self.device):
                    outputs = [
                        self.forward(images.contiguous(memory_format=torch.channels_last), *others)
                        for images, *others in views.inputs
                    ]
                losses = self.losses(outputs, views)
                self.scaler.scale(losses.total / len(self.inputs)).backward()
            all_losses.append(losses._replace(total=losses.total.detach()))
        scale = self.scaler.scale(torch.ones((), device=self.device))
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.method.network.parameters(), zeroes=self.zeroes)
        self.optimizer.step()
        self.scaler.update()

        parts = [{"loss": losses.total, **losses.parts} for losses in all_losses]
        means = {name: torch.stack([part[name].float() for part in parts]).mean() for name in parts[0]}
        values = {**means, "gradient_norm": norm, "scale": scale}
        logits = [losses.logits for losses in all_losses if losses.logits is not None]
        return Figures(tuple(values), torch.stack([*values.values()]), torch.cat(logits) if logits else None)


def _why_not_captured(error: RuntimeError) -> str:
    if is_out_of_memory(error):
        return (
            "the GPU's memory does not hold the step as a CUDA graph, which keeps all of its memory for itself: set "
            "train.cuda_graph=false or train.checkpoint_activations=true, or lower train.batch in a run of another name"
        )
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"the step cannot be captured in a CUDA graph: {reason}. Continue with train.cuda_graph=false"


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}


def captures(train: Train, rank: Rank, device: torch.device) -> bool:
    """Return whether steps are captured (``train.cuda_graph``). Raises UserError if it is true but impossible."""
    obstacle = None
    if device.type != "cuda":
        obstacle = "there is no GPU"
    elif rank.world > 1:
        obstacle = "torchrun's processes exchange gradients, which is not captured"
    if train.cuda_graph and obstacle is not None:
        raise UserError(f"train.cuda_graph is true, but {obstacle}: set it to null or false")
    if train.cuda_graph is not None:
        return train.cuda_graph
    if obstacle is not None:
        return False
    from cpn_fast.kernels.launch import gpu_obstacle  # it needs Triton, which not every system has

    # Where the losses do not run in Triton, they wait for the device. A capture does not allow that.
    return gpu_obstacle(device.index or 0) is None


def compile_in_place(network: nn.Module) -> None:
    """Run the network with torch.compile. Names of weights and the random numbers of dropout stay the same."""
    network.compile(dynamic=False, options={"fallback_random": True})


def make_optimizer(network: Headed, train: Train, device: torch.device) -> torch.optim.SGD:
    """Return SGD with four groups: backbone weights x1, biases x2, head weights x10, biases x20; biases do not decay.

    A group's ``lr`` is a tensor that ``set_rate`` fills.
    """
    groups: list[dict[str, Any]] = []
    for is_head, is_bias, times in ((False, False, 1), (False, True, 2), (True, False, 10), (True, True, 20)):
        parameters = [
            parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and name.startswith("backbone.") != is_head and name.endswith("bias") == is_bias
        ]
        decay = 0.0 if is_bias else train.weight_decay
        groups.append({"params": parameters, "base_lr": train.lr * times, "weight_decay": decay})
    groups = [{**group, "lr": torch.tensor(train.lr, device=device)} for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a checkpoint's momentum. The options of the groups stay those of this run."""
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, options, strict=True):
        group.update(values)


def rate_factor(step: int, steps: int, train: Train) -> float:
    """Return the factor of ``train.lr`` at a step (from 0) of a training of ``steps`` steps; 0 from its end on."""
    return max(0.0, 1 - step / steps) ** train.power


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the rate of each group to its base rate times a factor."""
    for group in optimizer.param_groups:
        group["lr"].fill_(group["base_lr"] * factor)


def averaging(network: nn.Module) -> DistributedDataParallel:
    """Return the network with gradients averaged over the processes.

    Buffers are not exchanged. Only the segmenter's change, and there each process keeps the statistics of its share.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    options: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **options)


def exchanging(forward: nn.Module, *, now: bool) -> Any:
    """Return a context whose backward pass averages the gradients over the processes, or leaves that to a later one."""
    if now or not isinstance(forward, DistributedDataParallel):
        return nullcontext()
    return forward.no_sync()
