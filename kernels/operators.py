"""Registration of operations with torch: as operators in a graph, and as direct calls with less host time.

An operation is a pair of plain functions, forward and backward, and a function that saves tensors for backward.
Compiled, traced and dispatched code (``torch.compile``, dispatch modes, tensor subclasses, ``meta``) gets them as the
torch operators ``cpn_fast::NAME`` and ``cpn_fast::NAME_backward``. A call on plain tensors goes through an
``autograd.Function`` instead: the dispatch of a custom operator costs more host time than the kernels' launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = Callable[..., Any]


def constant(function: Function) -> Function:
    """Mark ``function`` as one that a compiler calls once, to keep its result as a constant.

    It is ``torch.compiler.assume_constant_result`` without its import of dynamo, which takes more than a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# dynamo evaluates these two by itself, in torch 2.11 wrongly. A constant result comes from a real call.
@constant
def exporting() -> bool:
    """Return whether torch.export traces."""
    return torch.compiler.is_exporting()


@constant
def transformed() -> bool:
    """Return whether a transform of torch.func or forward-mode AD is active. Operators have no rules for them."""
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
    """Return a function of ``forward``'s inputs that gives its first output and is differentiable once.

    ``forward`` returns a tuple, of which only the first tensor is differentiable. Neither function returns an input or
    a view of one. ``fake_forward`` and ``fake_backward`` allocate outputs of the same shapes. ``save(ctx, inputs,
    outputs)`` saves tensors for backward. ``differentiate(ctx, grad, backward)`` returns a gradient or None for every
    input. It must call its argument ``backward`` with the first output or the inputs among the arguments: ``backward``
    refuses a second derivative, so every path to the inputs must lead through it. ``schema`` is ``forward``'s schema
    if its annotations do not give it. ``fuse_backward`` means that ``backward`` consists of torch's own operators; a
    compiler may then see these instead of one operator.
    """
    operator = torch.library.custom_op(f"cpn_fast::{name}", forward, mutates_args=(), schema=schema)
    operator.register_fake(fake_forward)
    backward_operator = torch.library.custom_op(f"cpn_fast::{name}_backward", backward, mutates_args=())
    backward_operator.register_fake(fake_backward)
    in_graph = getattr(torch.ops.cpn_fast, name).default
    backward_in_graph = getattr(torch.ops.cpn_fast, f"{name}_backward").default

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # else torch fills zeros for every output but the first
        save(ctx, inputs, output)

    def through_operator(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        fused = fuse_backward and not torch.is_grad_enabled()
        return differentiated(ctx, grad, backward if fused else backward_in_graph)

    def differentiated(ctx: Any, grad: Tensor, how: Function) -> Any:
        try:
            return differentiate(ctx, grad, how)
        except RuntimeError as error:  # torch's words for an operation without a batching rule
            if not _is_batched(grad):
                raise
            raise RuntimeError(f"{refused()} has no batched gradients: use 'eager' for these") from error

    def refused() -> str:
        op, backend = name.rsplit("_", 1)
        return f"{op}: backend {backend!r}"

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{refused()} is differentiable once: use 'eager' for second derivatives")

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
            # with create_graph, call the operator, which refuses a second derivative
            return differentiated(ctx, grad, backward_in_graph if torch.is_grad_enabled() else backward)

    Direct.__name__ = name  # for profilers

    def call(*inputs: Any) -> Tensor:
        if not _is_direct(inputs):
            return in_graph(*inputs)[0]
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Direct.apply(*inputs)
        return forward(*inputs)[0]

    return call


def _is_batched(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def _is_direct(inputs: tuple[Any, ...]) -> bool:
    """Return whether a direct call is possible: no tracing, no dispatch mode, only plain tensors with memory."""
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
