"""Autograd of masked layers: pure backwards that return a fresh, compact gradient for the active weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pecker_fast.block_scores import ScoreKind
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops.accumulate_saliency import accumulate_saliency_
from pecker_fast.ops.gather_active import gather_active
from pecker_fast.ops.masked_weight_grad import masked_weight_grad

Geometry: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding, dilation and groups of a convolution."""


def link(dense: Tensor, master: Tensor, mask: ParameterMask, channels_last: bool) -> Tensor:
    """The dense weight, unchanged, whose gradient goes to the active weights ``master``.

    For small weights (biases, norms, embeddings), and where so many blocks are active that one dense gradient is
    cheaper than many small ones.
    """
    if not (torch.is_grad_enabled() and master.requires_grad):
        return dense
    return cast(Tensor, _Link.apply(dense, master, mask, channels_last))


def score(weight: Tensor, sums: Tensor, grid: BlockGrid, kind: ScoreKind) -> Tensor:
    """``weight``, unchanged; its gradient, as it passes, is summed over blocks into ``sums`` and not kept."""
    if not torch.is_grad_enabled():
        return weight
    anchor = sums.new_empty(0, requires_grad=True)  # so that autograd comes by even where the weight is frozen
    return cast(Tensor, _Score.apply(weight, anchor, sums, grid, kind))


def masked_linear(
    input: Tensor, weight: Tensor, master: Tensor, bias: Tensor | None, mask: ParameterMask, channels_last: bool
) -> Tensor:
    """``F.linear`` whose weight gradient goes to ``master``, for active blocks only.

    Args:
        input: (..., in).
        weight: Dense weight (out, in), without gradient.
        master: Active weights, ``mask.compact_shape``.
        bias: (out,) or None.
        mask: Active blocks of ``weight``.
        channels_last: Order within blocks, as in ``ParameterMask.index``.
    """
    return cast(Tensor, _MaskedLinear.apply(input, weight, master, bias, mask, channels_last))


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    master: Tensor | None,
    bias: Tensor | None,
    mask: ParameterMask | None,
    channels_last: bool,
    geometry: Geometry,
    wanted: int | None = None,
) -> Tensor:
    """``F.conv2d`` whose weight gradient goes to ``master``, for active blocks only.

    Without a master nothing of the weight trains, and the input is not kept (torch keeps it: pytorch issue 133566).
    With ``wanted`` only that many leading channels of the input get their gradient, the others zero.
    """
    return cast(Tensor, _MaskedConv2d.apply(input, weight, master, bias, mask, channels_last, geometry, wanted))


def require_grad_like(input: Tensor, like: Tensor) -> Tensor:
    """``input``, unchanged, but asking for a gradient because ``like`` does; that gradient goes nowhere."""
    return cast(Tensor, _RequireGrad.apply(input, like))


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, master: Tensor, mask: ParameterMask, channels_last: bool) -> Tensor:
        ctx.mask, ctx.channels_last, ctx.dtype = mask, channels_last, master.dtype
        return dense.view_as(dense)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        active = grad if ctx.mask.is_full else gather_active(grad, ctx.mask, ctx.channels_last)
        return None, active.to(ctx.dtype), None, None


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, sums: Tensor, grid: BlockGrid, kind: ScoreKind) -> Tensor:
        ctx.sums, ctx.grid, ctx.kind = sums, grid, kind
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        accumulate_saliency_(ctx.sums, grad, ctx.kind, grid=ctx.grid)
        return grad if ctx.needs_input_grad[0] else None, None, None, None, None


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        master: Tensor,
        bias: Tensor | None,
        mask: ParameterMask,
        channels_last: bool,
    ) -> Tensor:
        wants_input, _, wants_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(input if wants_weight else None, weight if wants_input else None)
        ctx.mask, ctx.channels_last, ctx.dtype = mask, channels_last, master.dtype
        return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad_input = None if weight is None else grad_output @ weight
        grad_master = None
        if input is not None:
            grad_master = masked_weight_grad(grad_output, input, ctx.mask, channels_last=ctx.channels_last).to(
                ctx.dtype
            )
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return grad_input, None, grad_master, grad_bias, None, None


class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        master: Tensor | None,
        bias: Tensor | None,
        mask: ParameterMask | None,
        channels_last: bool,
        geometry: Geometry,
        wanted: int | None,
    ) -> Tensor:
        wants_input, _, wants_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(input if wants_weight else None, weight if wants_input else None)
        ctx.mask, ctx.channels_last, ctx.geometry = mask, channels_last, geometry
        ctx.shape, ctx.wanted = input.shape, wanted
        ctx.dtype = None if master is None else master.dtype
        stride, padding, dilation, groups = geometry
        return F.conv2d(input, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        batched = grad_output if grad_output.dim() == 4 else grad_output.unsqueeze(0)
        grad_input = grad_master = grad_bias = None
        if weight is not None:
            shape = ctx.shape if len(ctx.shape) == 4 else (1, *ctx.shape)
            grad_input = _input_grad(batched, weight, shape, ctx.geometry, ctx.wanted).view(ctx.shape)
        if input is not None:
            grad_master = masked_weight_grad(
                batched,
                input if input.dim() == 4 else input.unsqueeze(0),
                ctx.mask,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                channels_last=ctx.channels_last,
            ).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = batched.sum((0, 2, 3))
        return grad_input, None, grad_master, grad_bias, None, None, None, None


def _input_grad(
    grad_output: Tensor, weight: Tensor, shape: Sequence[int], geometry: Geometry, wanted: int | None
) -> Tensor:
    """Gradient of a convolution's input of ``shape``; of its first ``wanted`` channels only, zero in the others."""
    batch, channels, *size = shape
    computed = channels if wanted is None else wanted
    part = weight if computed == channels else _contiguous_like(weight[:, :computed], weight)
    unread = _unread_input((batch, computed, *size), grad_output)
    stride, padding, dilation, groups = geometry
    grad, _, _ = torch.ops.aten.convolution_backward(
        grad_output, unread, part, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )
    if computed == channels:
        return cast(Tensor, grad)
    whole = torch.empty(tuple(shape), dtype=grad.dtype, device=grad.device, memory_format=_memory_format(grad))
    whole[:, :computed] = grad
    whole[:, computed:].zero_()
    return whole


def _unread_input(shape: tuple[int, ...], grad_output: Tensor) -> Tensor:
    """Stands in for a convolution's input where its values do not matter.

    On a GPU its memory order does: in another one than the gradient's, torch would copy the gradient there and back.
    """
    if grad_output.is_cuda:
        return torch.empty(
            shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=_memory_format(grad_output)
        )
    return grad_output.new_empty(1).expand(shape)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _contiguous_like(part: Tensor, like: Tensor) -> Tensor:
    return part.contiguous(memory_format=_memory_format(like))


class _RequireGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, like: Tensor) -> Tensor:
        return input.view_as(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None
