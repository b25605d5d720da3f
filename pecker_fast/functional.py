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
) -> Tensor:
    """``F.conv2d`` whose weight gradient goes to ``master``, for active blocks only.

    Without a master nothing of the weight trains, and the input is not kept (torch keeps it: pytorch issue 133566).
    """
    return cast(Tensor, _MaskedConv2d.apply(input, weight, master, bias, mask, channels_last, geometry))


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
        return None, ctx.mask.gather(grad, ctx.channels_last).to(ctx.dtype), None, None


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
    ) -> Tensor:
        wants_input, _, wants_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(input if wants_weight else None, weight if wants_input else None)
        ctx.mask, ctx.channels_last, ctx.geometry, ctx.shape = mask, channels_last, geometry, input.shape
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
            unread = batched.new_empty(1).expand(shape)  # only its shape matters for the input's gradient
            grad_input, _, _ = torch.ops.aten.convolution_backward(
                batched, unread, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
            )
            grad_input = grad_input.view(ctx.shape) if grad_output.dim() == 3 else grad_input
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
        return grad_input, None, grad_master, grad_bias, None, None, None


class _RequireGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, like: Tensor) -> Tensor:
        return input.view_as(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None
