"""How every operation enters torch: as operators in a graph, and directly, with less work for the host, in a program.

An operation is a pair of plain functions, forward and backward, and what backward keeps. Compiled, traced and
dispatched code (``torch.compile``, dispatch modes, tensor subclasses, ``meta``) gets them as the torch operators
``cpn_fast::NAME`` and ``cpn_fast::NAME_backward``. A call on plain tensors goes through an ``autograd.Function``
instead: the dispatcher's way through a custom operator costs more host time than the kernels' launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = Callable[..., Any]


# dynamo answers for these itself, and in torch 2.11 wrongly; a constant result comes from a real call.
@torch.compiler.assume_constant_result
def exporting() -> bool:
    """Whether torch.export traces."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is at work, for which operators have no rules."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def operation(
    name: str,
    forward: Function,
    fake_forward: Function,
    backward: Function,
    fake_backward: Function,
    *,
    save: Function,
    differentiate: Function,
    schema: str | None = None,
    fuse_backward: bool = False,
) -> Callable[..., Tensor]:
    """A function of ``forward``'s inputs that returns its first output and is differentiable once.

    ``forward`` returns a tuple, of which only the first tensor is differentiable, and neither function returns an input
    or a view of one. ``fake_forward`` and ``fake_backward`` allocate the same outputs. ``save(ctx, inputs, outputs)``
    keeps what is needed; ``differentiate(ctx, grad, backward)`` returns a gradient or None for every input and calls
    the ``backward`` that it is given, with the first output or the inputs among its arguments: a second derivative is
    refused at ``backward``, so a path to the inputs must lead through it. ``schema`` is ``forward``'s, where its
    annotations do not say it. ``fuse_backward``: ``backward`` consists of torch's own operators, and a compiler may
    have them one by one instead of the operator.
    """
    operator = torch.library.custom_op(f"cpn_fast::{name}", forward, mutates_args=(), schema=schema)
    operator.register_fake(fake_forward)
    backward_operator = torch.library.custom_op(f"cpn_fast::{name}_backward", backward, mutates_args=())
    backward_operator.register_fake(fake_backward)
    in_graph = getattr(torch.ops.cpn_fast, name).default
    backward_in_graph = getattr(torch.ops.cpn_fast, f"{name}_backward").default

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # or zeros are allocated and filled for every output but the first
        save(ctx, inputs, output)

    def through_operator(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        opened = fuse_backward and not torch.is_grad_enabled()
        return differentiate(ctx, grad, backward if opened else backward_in_graph)

    def refuse(ctx: Any, *_: Any) -> None:
        what, backend = name.rsplit("_", 1)
        raise RuntimeError(f"{what}: backend {backend!r} is differentiable once: use 'eager' for second derivatives")

    operator.register_autograd(through_operator, setup_context=keep)
    backward_operator.register_autograd(refuse)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = forward(*inputs)
            keep(ctx, inputs, outputs)
            return outputs[0]

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> Any:
            if grad is None:
                return (None,) * len(ctx.needs_input_grad)
            # with create_graph, the operator: it knows to refuse a second derivative
            return differentiate(ctx, grad, backward_in_graph if torch.is_grad_enabled() else backward)

    Direct.__name__ = name  # what a profiler shows

    def call(*inputs: Any) -> Tensor:
        if not _is_direct(inputs):
            return in_graph(*inputs)[0]
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Direct.apply(*inputs)
        return forward(*inputs)[0]

    return call


def _is_direct(inputs: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd watches: no tracing, no dispatch mode, tensors of torch's own kind with memory."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return False
    for value in inputs:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if value.is_meta:
                return False
        elif isinstance(value, Tensor):
            return False
    return True
