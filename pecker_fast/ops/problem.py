"""What one weight gradient is computed from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pecker_fast.blocks import BlockGrid, ParameterMask

Geometry: TypeAlias = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation and groups of a convolution."""

SCHEMA = (
    "Tensor grad_output, Tensor input, Tensor active, SymInt[] compact_shape, SymInt[] shape, SymInt[] view, "
    "SymInt[] block, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, bool channels_last"
)
"""How an op takes a ``Problem``: what ``Problem.arguments`` gives and ``Problem.of`` takes."""


@dataclass(frozen=True)
class Problem:
    """Operands of the weight gradient of a linear layer or a 2-d convolution, for active blocks.

    Attributes:
        grad_output: (..., out) for a linear layer, (batch, out, height, width) for a convolution; any float dtype.
        input: (..., in) or (batch, in, height, width), same dtype.
        mask: Active blocks of the weight (out, in) or (out, in / groups, kernel height, kernel width).
        compact_shape: Of the gradient: ``mask.compact_shape``, which no graph can trace.
        geometry: Of the convolution.
        channels_last: Order within blocks, as in ``ParameterMask.index``.
    """

    grad_output: Tensor
    input: Tensor
    mask: ParameterMask
    compact_shape: tuple[int, ...]
    geometry: Geometry
    channels_last: bool

    @staticmethod
    def of(
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
    ) -> Problem:
        """From the arguments of an op."""
        grid = BlockGrid(tuple(shape), (view[0], view[1], view[2]), (block[0], block[1]))
        geometry = (stride, padding, dilation, groups)
        return Problem(grad_output, input, ParameterMask(grid, active), tuple(compact_shape), geometry, channels_last)

    def arguments(self) -> tuple[Any, ...]:
        """As arguments of an op."""
        grid, (stride, padding, dilation, groups) = self.mask.grid, self.geometry
        blocks = (self.mask.active, list(self.compact_shape), list(grid.shape), list(grid.view), list(grid.block))
        return (self.grad_output, self.input, *blocks, stride, padding, dilation, groups, self.channels_last)

    def check(self, op: str) -> None:
        """Refuse operands that do not belong together.

        Raises:
            ValueError: Another number of channels than the weight's, or operands on different devices.
        """
        shape, groups = self.mask.grid.shape, self.geometry[3]
        out_dim, in_channels = (-1, shape[1]) if self.is_linear else (1, shape[1] * groups)
        grad_output, input = self.grad_output, self.input
        if grad_output.shape[out_dim] != shape[0] or input.shape[out_dim] != in_channels:
            raise ValueError(
                f"{op}: weight {shape} with groups={groups} takes {in_channels} channels in and {shape[0]} out, "
                f"got input {tuple(input.shape)} and grad_output {tuple(grad_output.shape)}"
            )
        if grad_output.device != input.device:
            raise ValueError(
                f"{op}: expected operands on one device, got grad_output on {grad_output.device} and input on "
                f"{input.device}"
            )

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer's."""
        return len(self.mask.grid.shape) == 2

    @property
    def kernel(self) -> tuple[int, ...]:
        """Height and width of the convolution's kernel; (1, 1) for a linear layer."""
        return tuple(self.mask.grid.shape[2:]) or (1, 1)

    @property
    def positions(self) -> int:
        """Output positions, over which products are summed."""
        return math.prod(self.grad_output.shape) // max(self.mask.grid.shape[0], 1)

    @property
    def grad_layout(self) -> torch.memory_format:
        """Of the gradient: the weight's own."""
        return compact_layout(self.compact_shape, self.channels_last)


def problem(
    grad_output: Tensor,
    input: Tensor,
    mask: ParameterMask,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Problem:
    """From the arguments of a public function."""
    geometry = (list(stride), list(padding), list(dilation), groups)
    return Problem(grad_output, input, mask, mask.compact_shape, geometry, channels_last)


def compact_layout(compact_shape: Sequence[int], channels_last: bool) -> torch.memory_format:
    """Memory order of active weights of ``compact_shape``."""
    return torch.channels_last if channels_last and len(compact_shape) == 4 else torch.contiguous_format


def grad_dtype(grad_output: Tensor) -> torch.dtype:
    """Of the weight gradient: never narrower than float32."""
    return torch.float64 if grad_output.dtype == torch.float64 else torch.float32
