"""How the weight gradient of active blocks is computed: slabs of channels that hold some, as dense products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pecker_fast import native
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.once import once, to_device
from pecker_fast.ops.layout import is_channels_last
from pecker_fast.ops.problem import Geometry, Problem, grad_dtype

ShiftedRows: TypeAlias = Callable[[Tensor, Tensor, tuple[int, int], tuple[int, int]], Tensor]

MAX_SLABS = 64
"""With more block rows than this, many small products lose to one dense gradient (as they do for single weights)."""
MIN_WIDTH = 16
"""Tiles of a linear layer that are narrower than this are not worth a product each."""
SHIFTS_BYTES = 1 << 20
"""Shifted rows are laid out for as many samples at a time as stay in a cache."""
SLAB_ROWS, UNFOLD_COST = 16, 1.1
"""oneDNN computes output channels by sixteens; one matrix product costs a tenth more a row, and computes them as they
are. Measured on a CPU."""
FEW_POSITIONS = 16
"""Feature maps of 4 x 4 and less are too small for oneDNN's blocks in any case."""


def masked_weight_grad_reference(problem: Problem, shifted_rows: ShiftedRows | None = None) -> Tensor:
    """Plain-torch twin: dense gradients of slabs of channels that hold active blocks, gathered into blocks."""
    mask, geometry = problem.mask, problem.geometry  # block numbers stay on the CPU: reading them waits for no device
    if mask.is_full or not slabs_pay(mask.grid, geometry[3]):
        return gathered_weight_grad(problem)
    grad_output, input = _operands(problem)
    if mask.grid.is_rows:
        grad = _row_grads(grad_output, input, mask, geometry, shifted_rows or shifted_rows_reference)
    elif problem.is_linear:
        grad = _linear_tile_grads(grad_output, input, mask)
    else:
        grad = _tile_grads(grad_output, input, mask, geometry, problem.channels_last)
    return _widen(grad).contiguous(memory_format=problem.grad_layout)


def masked_weight_grad_cpu(problem: Problem) -> Tensor:
    """The same on a CPU: the products are torch's, what they multiply is laid out by the native module."""
    return masked_weight_grad_reference(problem, shifted_rows=shifted_rows_cpu)


def gathered_weight_grad(problem: Problem) -> Tensor:
    """The whole weight's gradient, and of that the active blocks."""
    dense = _dense_weight_grad(*_operands(problem), problem.mask.grid.shape, problem.geometry)
    grad = _widen(problem.mask.gather(dense, problem.channels_last))
    return grad.contiguous(memory_format=problem.grad_layout)


def _operands(problem: Problem) -> tuple[Tensor, Tensor]:
    grad_output, input = problem.grad_output, problem.input
    if problem.is_linear:
        return grad_output.reshape(-1, grad_output.shape[-1]), input.reshape(-1, input.shape[-1])
    return grad_output, input


def _row_grads(
    grad_output: Tensor, input: Tensor, mask: ParameterMask, geometry: Geometry, shifted_rows: ShiftedRows
) -> Tensor:
    """One slab of the active rows."""
    grid, rows = mask.grid, mask.active_on(grad_output.device)
    if _unfolding_pays(grad_output, input, len(rows), grid, geometry):
        return _unfolded_weight_grad(grad_output, input, rows, grid.shape[2:], geometry[1], shifted_rows)
    return _dense_weight_grad(_channels(grad_output, rows), input, (len(rows), *grid.shape[1:]), geometry)


def _linear_tile_grads(grad_output: Tensor, input: Tensor, mask: ParameterMask) -> Tensor:
    """One product for each run of neighbouring blocks in a row of blocks, of views: nothing is gathered."""
    (out, in_, _), (block_out, block_in) = mask.grid.view, mask.grid.block
    pieces: list[Tensor] = []
    for row, first, count in once(mask.active, ("runs of blocks", mask.grid), lambda: _runs_of_blocks(mask)):
        grad_rows = grad_output.narrow(1, row * block_out, min(block_out, out - row * block_out))
        start, stop = first * block_in, min((first + count) * block_in, in_)
        run = grad_rows.t() @ input.narrow(1, start, stop - start)
        pieces += [block.reshape(-1) for block in run.split(block_in, dim=1)]
    if not pieces:
        return grad_output.new_empty(mask.compact_shape)
    return torch.cat(pieces).view(mask.compact_shape)


def _runs_of_blocks(mask: ParameterMask) -> list[tuple[int, int, int]]:
    """Active blocks that follow one another in a row of blocks: (row, first column, number of blocks)."""
    columns = mask.grid.size[1]
    starts = torch.ones(len(mask.active), dtype=torch.bool, device="cpu")
    starts[1:] = (mask.active[1:] != mask.active[:-1] + 1) | (mask.active[1:] % columns == 0)
    first = starts.nonzero().flatten()
    counts = torch.diff(first, append=torch.tensor([len(mask.active)], device="cpu"))
    blocks = mask.active[first]
    return list(zip((blocks // columns).tolist(), (blocks % columns).tolist(), counts.tolist(), strict=True))


def _tile_grads(
    grad_output: Tensor,
    input: Tensor,
    mask: ParameterMask,
    geometry: Geometry,
    channels_last: bool,
) -> Tensor:
    """One slab for each row of blocks of a convolution: its out channels against its active blocks' in channels."""
    grid, block_out = mask.grid, mask.grid.block[0]
    pieces: list[Tensor] = []
    for row, widths, channels in _rows_of_blocks(mask, input.device):
        grad_rows = grad_output.narrow(1, row * block_out, min(block_out, grid.view[0] - row * block_out))
        shape = (grad_rows.shape[1], len(channels), *grid.shape[2:])
        slab = _dense_weight_grad(_same_layout(grad_rows, grad_output), _channels(input, channels), shape, geometry)
        for block in slab.split(widths, dim=1):
            block = block.flatten(2) if block.dim() > 2 else block.unsqueeze(2)
            pieces.append((block.transpose(1, 2) if channels_last else block).reshape(-1))
    if not pieces:
        return grad_output.new_empty(mask.compact_shape)
    return torch.cat(pieces).view(mask.compact_shape)


def _rows_of_blocks(mask: ParameterMask, device: torch.device) -> list[tuple[int, list[int], Tensor]]:
    """Rows of blocks with active ones: (row, width of each of its active blocks, their in channels on ``device``)."""
    return once(mask.active, ("rows of blocks", mask.grid, device), lambda: _find_rows_of_blocks(mask, device))


def _find_rows_of_blocks(mask: ParameterMask, device: torch.device) -> list[tuple[int, list[int], Tensor]]:
    (_, in_, _), (_, block_in), columns = mask.grid.view, mask.grid.block, mask.grid.size[1]
    found = []
    for row in torch.unique(mask.active // columns).tolist():
        cols = (mask.active[mask.active // columns == row] % columns).tolist()
        spans = [(col * block_in, min((col + 1) * block_in, in_)) for col in cols]
        channels = torch.cat([torch.arange(start, stop, device="cpu") for start, stop in spans])
        found.append((row, [stop - start for start, stop in spans], to_device(channels, device)))
    return found


def _dense_weight_grad(grad_output: Tensor, input: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Gradient of a whole weight of ``shape``, as autograd computes it."""
    if len(shape) == 2:
        return grad_output.t() @ input
    if 0 in shape:
        return grad_output.new_zeros(shape)
    stride, padding, dilation, groups = geometry
    weight = grad_output.new_empty(1).expand(shape)  # only its shape is read
    _, grad, _ = torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )
    return cast(Tensor, grad)


def _unfolded_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    rows: Tensor,
    kernel: tuple[int, ...],
    padding: Sequence[int],
    shifted_rows: ShiftedRows,
) -> Tensor:
    """Gradient of some rows of a convolution of stride 1 as one matrix product.

    dW[o, i, t] = sum over positions q of dY[o, q + padding - t] X[i, q]: the shifts are taken of the few rows of dY,
    and X is read once, as it lies in memory if that is channels-last.
    """
    height, width = kernel
    around = (height - 1 - padding[0], width - 1 - padding[1])
    taps_rows, channels = height * width * len(rows), input.shape[1]
    per_sample = math.prod(input.shape[2:]) * taps_rows * grad_output.element_size()
    samples = max(SHIFTS_BYTES // max(per_sample, 1), 1)
    grad = grad_output.new_zeros(taps_rows, channels)
    for few_grads, few_inputs in zip(grad_output.split(samples), input.split(samples), strict=True):
        shifts = shifted_rows(few_grads, rows, (height, width), around)
        grad.addmm_(shifts.t(), few_inputs.permute(0, 2, 3, 1).reshape(-1, channels))
    return grad.view(height, width, len(rows), channels).flip(0, 1).permute(2, 3, 0, 1)


def shifted_rows_reference(
    grad_output: Tensor, rows: Tensor, kernel: tuple[int, int], around: tuple[int, int]
) -> Tensor:
    """Some channels of (batch, channels, height, width), shifted by every tap: (positions of the input, taps * rows).

    Position (y, x) of the input gets, for tap (i, j), the gradient at (y + i - around[0], x + j - around[1]).
    """
    (height, width), (y, x) = kernel, around
    padded = F.pad(grad_output.permute(0, 2, 3, 1).index_select(3, rows), (0, 0, x, x, y, y)).contiguous()
    batch, lines, columns = padded.shape[:3]
    sample, line, column, one = padded.stride()
    shape = (batch, lines - height + 1, columns - width + 1, height, width * len(rows))
    shifts = padded.as_strided(shape, (sample, line, column, line, one))
    return shifts.reshape(math.prod(shape[:3]), height * width * len(rows))


def shifted_rows_cpu(grad_output: Tensor, rows: Tensor, kernel: tuple[int, int], around: tuple[int, int]) -> Tensor:
    """The same by the native module."""
    grad = grad_output.permute(0, 2, 3, 1).contiguous()
    size = tuple(n + 2 * a - k + 1 for n, a, k in zip(grad.shape[1:3], around, kernel, strict=True))
    out = grad.new_empty(grad.shape[0] * math.prod(size), math.prod(kernel) * len(rows))
    native.load().shifted_rows_cpu(
        grad=grad.data_ptr(),
        element_size=grad.element_size(),
        grad_shape=tuple(grad.shape),
        rows=rows.data_ptr(),
        num_rows=len(rows),
        kernel=kernel,
        around=around,
        size=size,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def _unfolding_pays(
    grad_output: Tensor,
    input: Tensor,
    rows: int,
    grid: BlockGrid,
    geometry: Geometry,
) -> bool:
    """Whether active rows of a convolution are better one matrix product than a slab of oneDNN's."""
    stride, padding, dilation, _ = geometry
    if len(grid.shape) != 4 or grad_output.device.type != "cpu" or any(step != 1 for step in (*stride, *dilation)):
        return False
    if not input.is_contiguous(memory_format=torch.channels_last):
        return False
    fits = all(pad < size for pad, size in zip(padding, grid.shape[2:], strict=True))
    few = math.prod(grad_output.shape[2:]) <= FEW_POSITIONS or grid.view[2] == 1  # 1x1: nothing to unfold
    return rows > 0 and fits and (few or UNFOLD_COST * rows < -(-rows // SLAB_ROWS) * SLAB_ROWS)


def slabs_pay(grid: BlockGrid, groups: int) -> bool:
    """Whether slabs are cheaper than the dense gradient: not for single weights, thin tiles or grouped convolutions."""
    if groups != 1 or grid.view[0] != grid.shape[0]:
        return False
    wide = len(grid.shape) > 2 or grid.block[1] >= MIN_WIDTH
    return grid.is_rows or (grid.size[0] <= MAX_SLABS and wide)


def _channels(tensor: Tensor, channels: Tensor) -> Tensor:
    """Some channels of (batch, channels, ...), in the memory layout of ``tensor``."""
    if is_channels_last(tensor):  # indexed where they are next to each other, and copied once
        return tensor.permute(0, 2, 3, 1).index_select(3, channels).permute(0, 3, 1, 2)
    return tensor.index_select(1, channels)


def _same_layout(part: Tensor, like: Tensor) -> Tensor:
    return part.contiguous(memory_format=torch.channels_last) if is_channels_last(like) else part


def _widen(grad: Tensor) -> Tensor:
    return grad.to(grad_dtype(grad))
