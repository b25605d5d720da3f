"""Weight gradient of a Linear or Conv2d layer for its active blocks only."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pecker_fast import native
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops.dispatch import Backend, Op, library
from pecker_fast.ops.slabs import ShiftedRows, masked_weight_grad_reference, shifted_rows_cpu, slabs_pay


def masked_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    mask: ParameterMask,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    channels_last: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Weight gradient of ``F.linear`` or ``F.conv2d`` at the active blocks of its weight.

    In plain torch: ``mask.gather(dense_weight_gradient)``, without computing the rest of it.

    Args:
        grad_output: (..., out) for a linear layer, (batch, out, height, width) for a convolution; any float dtype.
        input: (..., in) or (batch, in, height, width), same dtype.
        mask: Active blocks of the weight (out, in) or (out, in / groups, kernel height, kernel width).
        stride: Of the convolution.
        padding: Of the convolution, zeros.
        dilation: Of the convolution.
        groups: Of the convolution.
        channels_last: Order within blocks, as in ``ParameterMask.index``.
        backend: Name of a backend, or None for the best one.

    Returns:
        A new tensor of shape ``mask.compact_shape``, in memory order (out, height, width, in) with ``channels_last``:
        float64 for float64 input, else float32.

    Raises:
        ValueError: Shapes do not fit the mask.
    """
    grid = mask.grid
    is_linear = len(grid.shape) == 2
    out_dim, in_channels = (-1, grid.shape[1]) if is_linear else (1, grid.shape[1] * groups)
    if grad_output.shape[out_dim] != grid.shape[0] or input.shape[out_dim] != in_channels:
        raise ValueError(
            f"masked_weight_grad: weight {grid.shape} with groups={groups} takes {in_channels} channels in and "
            f"{grid.shape[0]} out, got input {tuple(input.shape)} and grad_output {tuple(grad_output.shape)}"
        )
    grad: Tensor = torch.ops.pecker_fast.masked_weight_grad(
        grad_output,
        input,
        mask.active,
        list(mask.compact_shape),
        list(grid.shape),
        list(grid.view),
        list(grid.block),
        list(stride),
        list(padding),
        list(dilation),
        groups,
        channels_last,
        backend,
    )
    return grad


def _layout(compact_shape: Sequence[int], channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last and len(compact_shape) == 4 else torch.contiguous_format


def _reference(
    grad_output: Tensor,
    input: Tensor,
    active: Tensor,
    compact_shape: list[int],
    shape: list[int],
    view: list[int],
    block: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
    *,
    shifted_rows: ShiftedRows | None = None,
) -> Tensor:
    grid = BlockGrid(tuple(shape), (view[0], view[1], view[2]), (block[0], block[1]))
    geometry = (stride, padding, dilation, groups)
    grad = masked_weight_grad_reference(grad_output, input, active, grid, geometry, channels_last, shifted_rows)
    return grad.contiguous(memory_format=_layout(compact_shape, channels_last))


def _cpu(*arguments: Any) -> Tensor:
    """The products are torch's; what they multiply is laid out by the native module."""
    return _reference(*arguments, shifted_rows=shifted_rows_cpu)


_OP = Op(
    "masked_weight_grad",
    {
        "reference": Backend(_reference),
        "cpu": Backend(_cpu, devices=("cpu",), why_not=native.why_not),
    },
    prefer={"cpu": ("cpu",)},
)

library.define(
    "masked_weight_grad(Tensor grad_output, Tensor input, Tensor active, SymInt[] compact_shape, SymInt[] shape, "
    "SymInt[] view, SymInt[] block, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
    "bool channels_last, str? backend) -> Tensor"
)


@torch.library.impl(library, "masked_weight_grad", "CompositeExplicitAutograd")
def _run(*args: Any) -> Tensor:
    *inputs, backend = args
    grad: Tensor = _OP.run(_OP.choose(inputs[0].device, backend), *inputs)
    return grad


@torch.library.register_fake("pecker_fast::masked_weight_grad")
def _fake(grad_output: Tensor, input: Tensor, active: Tensor, compact_shape: list[int], *rest: Any) -> Tensor:
    dtype = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    layout = _layout(compact_shape, channels_last=rest[-2])
    return torch.empty(compact_shape, dtype=dtype, device=grad_output.device, memory_format=layout)


@functools.cache
def register_flops() -> None:
    """Teach ``torch.utils.flop_counter`` this op; not on import, because that file imports triton if it is there."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.pecker_fast.masked_weight_grad)(_flops)


def _flops(
    grad_output_shape: Sequence[int],
    input_shape: Sequence[int],
    active_shape: Sequence[int],
    compact_shape: Sequence[int],
    shape: Sequence[int],
    view: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """FLOPs that are done, 2 a multiply-add: those of the dense gradient where it is what is computed."""
    grid = BlockGrid(tuple(shape), (view[0], view[1], view[2]), (block[0], block[1]))
    weights = math.prod(compact_shape) if slabs_pay(grid, groups) else math.prod(shape)
    positions = math.prod(grad_output_shape) // shape[0]
    return 2 * weights * positions
