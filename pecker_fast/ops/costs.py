"""What each kernel must move and compute at least, as functions of masks and shapes: the other half of a benchmark.

Bytes are those of device memory, each value counted as often as the algorithm reads or writes it when no cache helps.
FLOPs are two a multiply-add; elsewhere one a rounded operation of the formula in the op's docstring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pecker_fast.blocks import ParameterMask
from pecker_fast.ops.problem import Problem, grad_dtype
from pecker_fast.ops.tiles import Tiles
from pecker_fast.scatter import ScatterTable

FLOAT_BYTES = 4
ADAMW_FLOPS, FIRST_MOMENT_FLOPS, EMA_FLOPS, SALIENCY_FLOPS = 13, 3, 3, 2
DENSE_ADAMW_BYTES = {"fused": 28, "foreach": 72}
"""A weight of torch.optim.AdamW: value and two moments read and written, gradient read; as list operations lerp 12,
mul 8, addcmul 12, sqrt 8, div 8, add 8, addcdiv 16."""
PUBLISHED_MASK_BYTES = 16
"""A weight of ``grad *= mask`` with an int64 mask: mask read, gradient read and written."""
SELECT_PASSES = {"cpu": {4: 2, 8: 4}, "cuda": {4: 3, 8: 6}}
"""Backend of select_threshold -> bytes a value -> passes over all values."""
SID_FLOPS = 14


@dataclass(frozen=True)
class Cost:
    """Bytes of device memory that are read or written, and floating-point operations."""

    bytes: int
    flops: int = 0

    def seconds(self, bandwidth: float, rate: float = math.inf) -> float:
        """The roofline: no run takes less on a machine of ``bandwidth`` bytes and ``rate`` FLOPs a second."""
        return max(self.bytes / bandwidth, self.flops / rate)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def masked_adamw(
    numel: int,
    *,
    first_moment: bool = True,
    ema: bool = False,
    saliency: bool = False,
    scatter: ScatterTable | None = None,
) -> Cost:
    """One step of ``masked_adamw_`` on ``numel`` active weights.

    Args:
        numel: Active weights.
        first_moment: Whether there is one (``beta1 > 0``).
        ema: Whether a running average is kept.
        saliency: Whether a running saliency is kept.
        scatter: Where the values go; a dense weight that is a view of the buffer costs nothing, the table is read once.
    """
    kept = (first_moment, ema, saliency)
    buffers = 5 + 2 * sum(kept)  # value and second moment: read and written; gradient: read
    flops = ADAMW_FLOPS + sum(
        n for n, there in zip((FIRST_MOMENT_FLOPS, EMA_FLOPS, SALIENCY_FLOPS), kept, strict=True) if there
    )
    return Cost(FLOAT_BYTES * buffers * numel + scattered_bytes(scatter), flops * numel)


def scattered_bytes(scatter: ScatterTable | None) -> int:
    """What copying values into dense weights writes, and what it reads of its table."""
    if scatter is None or scatter.is_empty:
        return 0
    written = sum(t.mask.numel * t.dense.element_size() for t in scatter.targets if t.dense is not None)
    return written + sum(tensor.nbytes for tensor in scatter.tensors())


def dense_adamw(numel: int, implementation: str = "fused") -> Cost:
    """One step of ``torch.optim.AdamW`` on ``numel`` float32 weights, "fused" or "foreach"."""
    return Cost(DENSE_ADAMW_BYTES[implementation] * numel, (ADAMW_FLOPS + FIRST_MOMENT_FLOPS) * numel)


def published_step(numel: int) -> Cost:
    """What released code does: every gradient times an int64 mask on the device, then Adam as list operations."""
    return dense_adamw(numel, "foreach") + Cost(PUBLISHED_MASK_BYTES * numel, numel)


def masked_weight_grad(problem: Problem) -> Cost:
    """The gradient of active blocks: every channel that some block needs is read once, the gradient is written.

    Raises:
        ValueError: The blocks are single weights, for which the dense gradient is what is computed.
    """
    mask, size = problem.mask, problem.input.element_size()
    out_channels, in_channels = touched_channels(mask)
    grad_output, input = _positions(problem)
    read = size * (out_channels * grad_output + in_channels * input)
    return Cost(read + _gradient_bytes(problem, mask.numel), 2 * mask.numel * problem.positions)


def dense_weight_grad(problem: Problem) -> Cost:
    """The gradient of the whole weight, in the operands' dtype."""
    size, grid = problem.input.element_size(), problem.mask.grid
    moved = problem.grad_output.numel() + problem.input.numel() + grid.numel
    return Cost(size * moved, 2 * grid.numel * problem.positions)


def gathered_weight_grad(problem: Problem) -> Cost:
    """The gradient of the whole weight, and of that the active blocks."""
    numel = problem.mask.numel
    gathered = problem.input.element_size() * numel + _gradient_bytes(problem, numel)
    return dense_weight_grad(problem) + Cost(gathered)


def weight_grad_l2_bytes(problem: Problem, tiles: Tiles, splits: int = 1) -> int:
    """What the programs of the Triton kernel ask of the L2 cache.

    A program computes one kernel row of one tile: at every output position it reads the tile's out channels once, and
    its in channels once for each tap. Where ``splits`` programs share the positions, what each of them found is written
    and read again.
    """
    kernel = problem.kernel[0]
    a_position = problem.input.element_size() * (tiles.block_m + kernel * tiles.block_n)
    parts = FLOAT_BYTES * kernel**2 * tiles.block_m * tiles.block_n * splits if splits > 1 else 0
    return len(tiles.table) * (kernel * problem.positions * a_position + 2 * parts)


def touched_channels(mask: ParameterMask) -> tuple[int, int]:
    """Out and in channels that lie in some active block.

    Raises:
        ValueError: The blocks are single weights.
    """
    grid = mask.grid
    if grid.view[0] != grid.shape[0]:
        raise ValueError(f"costs: expected rows or tiles, got a mask of single weights of {grid.shape}")
    columns = max(grid.size[1], 1)
    return (
        _covered(mask.active // columns, grid.block[0], grid.view[0]),
        _covered(mask.active % columns, grid.block[1], grid.view[1]),
    )


def accumulate_saliency(
    numel: int,
    *,
    blocks: int | None = None,
    grad_dtype: torch.dtype = torch.float32,
    total_dtype: torch.dtype = torch.float32,
) -> Cost:
    """One ``accumulate_saliency_`` of ``numel`` weights: per weight, or summed over ``blocks`` blocks."""
    totals = numel if blocks is None else blocks
    return Cost(grad_dtype.itemsize * numel + 2 * total_dtype.itemsize * totals, SALIENCY_FLOPS * numel)


def select_threshold(numel: int, dtype: torch.dtype = torch.float32, backend: str = "cuda") -> Cost:
    """``select_threshold`` over ``numel`` values: each pass reads them all; digits are counted, nothing is computed."""
    return Cost(SELECT_PASSES[backend][dtype.itemsize] * dtype.itemsize * numel)


def compact_active(numel: int, k: int, dtype: torch.dtype = torch.float32) -> Cost:
    """``compact_active``: all values are read once, ``k`` positions are written as int64."""
    return Cost(dtype.itemsize * numel + 8 * k)


def sid_loss(samples: int, sample_numel: int, dtype: torch.dtype = torch.float32, reads: int = 1) -> Cost:
    """``sid_loss`` with both gradients; ``reads`` is 2 where a sample is too large to be held between two passes."""
    values = samples * sample_numel
    return Cost(dtype.itemsize * ((3 * reads + 2) * values + 2 * samples), SID_FLOPS * values)


def _positions(problem: Problem) -> tuple[int, int]:
    """Positions of ``grad_output`` and of ``input``."""
    channels = problem.mask.grid.shape[1] * problem.geometry[3]
    return problem.positions, problem.input.numel() // max(channels, 1)


def _gradient_bytes(problem: Problem, numel: int) -> int:
    return grad_dtype(problem.grad_output).itemsize * numel


def _covered(numbers: Tensor, block: int, length: int) -> int:
    """How much of ``length``, cut every ``block``, lies in the pieces of these numbers."""
    starts = torch.unique(numbers) * block
    return int((length - starts).clamp(max=block).sum())
