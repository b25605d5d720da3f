"""Layers whose weight gradient is raced, their operands, and how others would compute it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from machines import here, sized
from torch import Tensor

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import tiled_weight_grad, triton_kernels
from pecker_fast.ops.problem import Problem
from pecker_fast.ops.tiles import Tiles, choose_splits

DTYPE = sized(torch.bfloat16, torch.float32)  # interpreted bfloat16 products are wrong
OPERANDS_BYTES, MAX_SETS = sized(256 << 20, 0), 16
"""Sets of operands in turn are together larger than any cache."""
TOLERANCE = {"ours": 1e-3, "theirs": 1e-2}
"""Relative error in the Frobenius norm: float32 results of bfloat16 operands, and bfloat16 results."""


@dataclass(frozen=True)
class Layer:
    """A layer, and the size of its input.

    Attributes:
        shape: Of the weight: (out, in), or (out, in, kernel, kernel).
        size: (positions,) or (batch, height, width) of the input.
        stride: Of a convolution.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    stride: int = 1

    def __str__(self) -> str:
        kind = "linear" if self.is_linear else f"conv{self.shape[2]}x{self.shape[2]}"
        stride = "" if self.stride == 1 else f" stride {self.stride}"
        return f"{kind} {self.shape[1]}>{self.shape[0]}{stride} @ {'x'.join(map(str, self.size))}"

    @property
    def is_linear(self) -> bool:
        return len(self.shape) == 2

    @property
    def padding(self) -> int:
        return 0 if self.is_linear else self.shape[2] // 2

    @property
    def library(self) -> str:
        return "cuBLAS" if self.is_linear else "cuDNN"

    def operands(self) -> tuple[Tensor, Tensor]:
        """Gradient of the output and input, random, channels-last."""
        out, in_ = self.shape[:2]
        if self.is_linear:
            sizes = ((*self.size, out), (*self.size, in_))
            return tuple(torch.randn(size, device=here().device, dtype=DTYPE) for size in sizes)
        batch, *size = self.size
        out_size = [(n + 2 * self.padding - self.shape[2]) // self.stride + 1 for n in size]
        sizes = ((batch, out, *out_size), (batch, in_, *size))
        last = {"memory_format": torch.channels_last}
        return tuple(torch.randn(size, device=here().device, dtype=DTYPE).to(**last) for size in sizes)

    def sets(self) -> list[tuple[Tensor, Tensor]]:
        """Enough operands that none is found in a cache when its turn comes again."""
        first = self.operands()
        count = math.ceil(OPERANDS_BYTES / sum(operand.nbytes for operand in first))
        return [first, *(self.operands() for _ in range(min(max(count, 1), MAX_SETS) - 1))]

    def problem(self, operands: tuple[Tensor, Tensor], mask: ParameterMask) -> Problem:
        geometry = ([self.stride] * 2, [self.padding] * 2, [1, 1], 1)
        return Problem(*operands, mask, mask.compact_shape, geometry, channels_last=not self.is_linear)

    def masks(self, block: Any, densities: Sequence[float]) -> dict[float, ParameterMask]:
        """Density that came out -> random blocks, each mask part of the next denser one."""
        grid = BlockGrid.of(self.shape, block)
        order = torch.randperm(grid.num_blocks)
        counts = [max(round(density * grid.num_blocks), 1) for density in densities]
        masks = [ParameterMask(grid, order[:count].sort().values) for count in counts]
        return {mask.density: mask for mask in masks}

    def dense(self, grad_output: Tensor, input: Tensor) -> Callable[[], Tensor]:
        """The whole gradient as the library gives it, at its best: a weight that lies as it trains, benchmark mode."""
        if self.is_linear:
            return lambda: grad_output.t() @ input
        weight = torch.empty(self.shape, device=input.device, dtype=input.dtype).to(memory_format=torch.channels_last)
        return functools.partial(conv_weight_grad, grad_output, input, weight, self.stride, self.padding)

    def truth(self, operands: tuple[Tensor, Tensor]) -> Tensor:
        """The whole gradient in float64: a product of two matrices for each tap, which no other way computes."""
        grad_output, input = (operand.double() for operand in operands)
        if self.is_linear:
            return grad_output.t() @ input
        height, width = grad_output.shape[2:]
        rows, padded = grad_output.permute(1, 0, 2, 3).flatten(1), F.pad(input, [self.padding] * 4)
        truth = rows.new_empty(self.shape)
        for y, x in itertools.product(range(self.shape[2]), range(self.shape[3])):
            ends = y + self.stride * (height - 1) + 1, x + self.stride * (width - 1) + 1
            tap = padded[:, :, y : ends[0] : self.stride, x : ends[1] : self.stride]
            truth[:, :, y, x] = rows @ tap.permute(0, 2, 3, 1).flatten(0, 2)
        return truth


def conv(channels: int, batch: int, side: int, kernel: int = 3, stride: int = 1, out: int | None = None) -> Layer:
    return Layer((out or channels, channels, kernel, kernel), (batch, side, side), stride)


def linear(width: int, positions: int) -> Layer:
    return Layer((width, width), (positions,))


def conv_weight_grad(grad_output: Tensor, input: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    return torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, [False, True, False])[1]


class Gathered:
    """For each row of tiles a dense product of just the input channels that it needs, gathered: no kernel of one's own.

    Which channels that is, is on the device before the first call. What comes out is left as the library gives it.
    """

    def __init__(self, layer: Layer, operands: tuple[Tensor, Tensor], mask: ParameterMask) -> None:
        grid, self.calls, self.parts = mask.grid, [], []
        grad_output, input = operands
        rows = mask.active // grid.size[1]
        for row in torch.unique(rows).tolist():
            starts = mask.active[rows == row] % grid.size[1] * grid.block[1]
            channels = torch.cat([torch.arange(s, min(s + grid.block[1], grid.view[1])) for s in starts.tolist()])
            channels, first = channels.to(input.device), row * grid.block[0]
            count = min(grid.block[0], grid.view[0] - first)
            self.parts.append((slice(first, first + count), channels))
            if layer.is_linear:
                self.calls.append(functools.partial(self.linear, grad_output.narrow(1, first, count), input, channels))
                continue
            weight = torch.empty((count, len(channels), *layer.shape[2:]), device=input.device, dtype=input.dtype)
            weight = weight.to(memory_format=torch.channels_last)
            settings = grad_output.narrow(1, first, count), input, channels, weight, layer.stride, layer.padding
            self.calls.append(functools.partial(self.conv, *settings))

    def __call__(self) -> list[Tensor]:
        return [call() for call in self.calls]

    @staticmethod
    def linear(grad_rows: Tensor, input: Tensor, channels: Tensor) -> Tensor:
        return grad_rows.t() @ input.index_select(1, channels)

    @staticmethod
    def conv(grad_rows: Tensor, input: Tensor, channels: Tensor, *settings: Any) -> Tensor:
        gathered = input.permute(0, 2, 3, 1).index_select(3, channels).permute(0, 3, 1, 2)
        return conv_weight_grad(grad_rows.contiguous(memory_format=torch.channels_last), gathered, *settings)

    def check(self, truth: Tensor) -> None:
        for got, (rows, channels) in zip(self(), self.parts, strict=True):
            assert_near(got, truth[rows][:, channels], TOLERANCE["theirs"])


def assert_near(got: Tensor, truth: Tensor, tolerance: float) -> None:
    error = (got.double() - truth.double()).norm() / truth.double().norm()
    assert error <= tolerance, f"relative error {float(error):.2g} above {tolerance}"


def launched(problem: Problem) -> tuple[Tiles, int]:
    """The tiles that our kernel computes for a problem, and how many programs share the positions of each."""
    kernels: Any = triton_kernels.load("masked_weight_grad")
    as_rows = problem.mask.grid.is_rows or problem.mask.is_full
    tiles = tiled_weight_grad._tiled(problem, as_rows, list(kernels.CONFIGS))
    config = kernels.CONFIGS[problem.kernel[0], problem.input.element_size(), tiles.block_m, tiles.block_n]
    parts_bytes = 4 * len(tiles.table) * math.prod(problem.kernel) * tiles.block_m * tiles.block_n
    return tiles, choose_splits(
        programs=len(tiles.table) * problem.kernel[0],
        steps=-(-problem.positions // config.block_k),
        slots=tiled_weight_grad._processors(problem.input.device) * tiled_weight_grad.PROGRAMS_A_PROCESSOR,
        max_splits=tiled_weight_grad.WORKSPACE_BYTES // max(parts_bytes, 1),
    )
