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
from pecker_fast.ops import tiled_weight_grad, triton_kernels
from pecker_fast.ops.dispatch import Backend, Op, library
from pecker_fast.ops.problem import SCHEMA, Problem, compact_layout, grad_dtype, problem
from pecker_fast.ops.slabs import masked_weight_grad_cpu, masked_weight_grad_reference, slabs_pay
from pecker_fast.ops.weight_grad_ways import WAYS, backend_for, choose_way


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
    given = problem(grad_output, input, mask, stride, padding, dilation, groups, channels_last)
    given.check("masked_weight_grad")
    grad: Tensor = torch.ops.pecker_fast.masked_weight_grad(*given.arguments(), backend)
    return grad


_OP = Op(
    "masked_weight_grad",
    {
        "reference": Backend(masked_weight_grad_reference),
        "cpu": Backend(masked_weight_grad_cpu, devices=("cpu",), why_not=native.why_not),
        "triton": Backend(
            tiled_weight_grad.tiled_weight_grad, devices=triton_kernels.DEVICES, why_not=triton_kernels.why_not
        ),
    },
    prefer={"cpu": ("cpu",), "cuda": ("triton",)},
)

library.define(f"masked_weight_grad({SCHEMA}, str? backend) -> Tensor")


@torch.library.impl(library, "masked_weight_grad", "CompositeExplicitAutograd")
def _run(*args: Any) -> Tensor:
    *arguments, backend = args
    problem = Problem.of(*arguments)
    if problem.input.device.type == "cuda" and backend is None and _OP.requested() is None:
        return WAYS[choose_way(problem).used](problem)
    grad: Tensor = _OP.run(backend_for(_OP, problem, backend), problem)
    return grad


@torch.library.register_fake("pecker_fast::masked_weight_grad")
def _fake(grad_output: Tensor, input: Tensor, active: Tensor, compact_shape: list[int], *rest: Any) -> Tensor:
    layout = compact_layout(compact_shape, channels_last=rest[-2])
    return torch.empty(compact_shape, dtype=grad_dtype(grad_output), device=grad_output.device, memory_format=layout)


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
