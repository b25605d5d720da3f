"""The weight gradient of active blocks by the Triton kernel: what it takes, how it is tiled, what becomes of it."""

from __future__ import annotations

import functools
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pecker_fast.blocks import ParameterMask
from pecker_fast.once import once, to_device
from pecker_fast.ops import triton_kernels
from pecker_fast.ops.problem import Problem
from pecker_fast.ops.tiles import Tiles, best_tiles, choose_splits

Epilogue: TypeAlias = Literal["store", "accumulate", "abs", "square"]

WORKSPACE_BYTES = 256 << 20
"""At most so much memory for the parts of products that a second pass adds up."""
PROGRAMS_A_PROCESSOR = 2
"""How many programs run on a multiprocessor at once: what registers and shared memory of the large tiles allow."""
DEFAULT_PROCESSORS = 132
"""Of an H100 or H200, for kernels that are interpreted."""


def why_not(problem: Problem) -> str | None:
    """Why the kernel does not take this problem, or None if it does."""
    grid, grad_output, input = problem.mask.grid, problem.grad_output, problem.input
    stride, padding, dilation, groups = problem.geometry
    allowed = (torch.bfloat16, torch.float16, torch.float32)
    if grad_output.dtype not in allowed or input.dtype != grad_output.dtype:
        return f"takes bfloat16, float16 or float32, both alike, got {grad_output.dtype} and {input.dtype}"
    if len(grid.shape) not in (2, 4) or grid.view[0] != grid.shape[0]:
        return f"takes rows and tiles of linear layers and 2-d convolutions, got blocks {grid.block} of {grid.shape}"
    if problem.kernel not in ((1, 1), (3, 3)) or groups != 1 or any(step != 1 for step in dilation):
        return f"takes kernels 1x1 and 3x3, no groups, no dilation, got {problem.kernel}, {groups}, {tuple(dilation)}"
    if stride[0] != stride[1] or stride[0] not in (1, 2) or padding[0] != padding[1]:
        return f"takes stride 1 or 2 and padding alike in both directions, got {tuple(stride)} and {tuple(padding)}"
    if precision(problem) == "tf32x3" and problem.kernel != (1, 1):
        return "takes float32 for 3x3 as TF32 only, which torch.backends.cudnn forbids"
    packed = problem.positions * (len(problem.mask.active) + 15) if grid.is_rows else 0
    largest = max(grad_output.numel(), input.numel(), grid.numel, packed)
    if largest >= 2**31:
        return f"takes tensors of fewer than 2**31 elements, got {largest}"
    return None


def tiled_weight_grad(problem: Problem) -> Tensor:
    """The compact gradient, float32, in ``compact_shape``."""
    grad = torch.empty(
        problem.compact_shape, dtype=torch.float32, device=problem.input.device, memory_format=problem.grad_layout
    )
    _compute(problem, problem.mask.grid.is_rows or problem.mask.is_full, grad, "store")
    return grad


def accumulate_tiled_(total: Tensor, problem: Problem) -> None:
    """Add the compact gradient to ``total``, a tensor like the one that ``tiled_weight_grad`` makes."""
    _compute(problem, problem.mask.grid.is_rows or problem.mask.is_full, total, "accumulate")


def score_tiled_(sums: Tensor, problem: Problem, kind: Epilogue) -> None:
    """Add the sum of ``|g|`` or ``g**2`` over each active block to ``sums``, (num_blocks,); no gradient is written."""
    mask, device = problem.mask, sums.device
    tiles, scores = _compute(problem, mask.grid.is_rows, None, kind)
    by_row = torch.cat([scores.sum(1).flatten(), scores.new_zeros(1)])
    sums.index_add_(0, mask.active_on(device), by_row[tiles.block_rows].sum(1).to(sums.dtype))


def _compute(problem: Problem, as_rows: bool, out: Tensor | None, epilogue: Epilogue) -> tuple[Tiles, Tensor]:
    """Launch the kernel. Scores get a tensor of their own: (tiles, parts, block_m)."""
    kernels: Any = triton_kernels.load("masked_weight_grad")
    grad_output, input = _as_matrices(problem, as_rows)
    shape = _shape(problem, kernels.Shape)
    small = epilogue == "accumulate" or not _is_aligned(grad_output, input, problem.mask, as_rows)
    largest = kernels.MAX_BLOCK_IF_TIGHT if small else kernels.MAX_BLOCK
    tiles = _tiled(problem, as_rows, [key for key in kernels.CONFIGS if key[2] <= largest])
    tile = (shape.kernel, input.element_size(), tiles.block_m, tiles.block_n)
    parts_bytes = 4 * len(tiles.table) * shape.kernel**2 * tiles.block_m * tiles.block_n
    splits = choose_splits(
        programs=len(tiles.table) * shape.kernel,
        steps=-(-len(grad_output) // kernels.CONFIGS[tile].block_k),
        slots=_processors(input.device) * PROGRAMS_A_PROCESSOR,
        max_splits=WORKSPACE_BYTES // max(parts_bytes, 1),
    )
    if out is None:
        parts = shape.kernel if splits == 1 else shape.kernel**2
        out = torch.empty(len(tiles.table), parts, tiles.block_m, dtype=torch.float32, device=input.device)
    if len(tiles.table):
        kernels.launch(
            grad_output,
            input,
            tiles.table,
            out,
            shape,
            epilogue=kernels.EPILOGUES[epilogue],
            splits=splits,
            group=tiles.group,
            block_m=tiles.block_m,
            block_n=tiles.block_n,
            alignment=tiles.alignment,
            channels_last=problem.channels_last,
            precision=precision(problem),
        )
    return tiles, out


def _tiled(problem: Problem, as_rows: bool, configs: list[tuple[int, int, int, int]]) -> Tiles:
    mask, channels_last, kernel = problem.mask, problem.channels_last, problem.kernel[0]
    size, device = problem.input.element_size(), problem.input.device
    sizes = tuple((m, n) for side, bytes_, m, n in configs if (side, bytes_) == (kernel, size))
    return once(
        mask.active,
        ("tiles", mask.grid, as_rows, channels_last, sizes, device),
        lambda: best_tiles(mask, as_rows, channels_last, sizes, kernel).to(device),
    )


def _as_matrices(problem: Problem, as_rows: bool) -> tuple[Tensor, Tensor]:
    """(positions, out channels) and (positions, in channels); active rows are packed."""
    operands = (problem.grad_output, problem.input)
    if not problem.is_linear:
        operands = (operands[0].permute(0, 2, 3, 1), operands[1].permute(0, 2, 3, 1))
    grad_output, input = (tensor.reshape(-1, tensor.shape[-1]).contiguous() for tensor in operands)
    if as_rows and not problem.mask.is_full:
        active = problem.mask.active
        rows = once(active, ("packed rows", input.device), lambda: to_device(_padded(active), input.device))
        grad_output = grad_output.index_select(1, rows)
    return grad_output, input


def _is_aligned(grad_output: Tensor, input: Tensor, mask: ParameterMask, as_rows: bool) -> bool:
    """Whether channels and blocks begin at multiples of 16 bytes, without which loads are narrow and need registers."""
    channels = grad_output.shape[1] % 16 == 0 and input.shape[1] % 16 == 0
    return channels and (as_rows or all(side % 8 == 0 for side in mask.grid.block))


def _padded(rows: Tensor) -> Tensor:
    """A multiple of 16 rows, so that wide accesses are aligned; what the last ones give is not stored."""
    return torch.cat([rows, rows.new_zeros(-len(rows) % 16)])


def _shape(problem: Problem, shape_type: Any) -> Any:
    """The convolution between the matrices; of what only moves along the positions there is one, for every size."""
    stride, padding = ((1,), (0,)) if problem.is_linear else problem.geometry[:2]
    if problem.kernel == (1, 1) and stride[0] == 1 and padding[0] == 0:
        return shape_type(1, 1, 1, 1, 1, 1, 0)
    size, out_size = problem.input.shape[2:], problem.grad_output.shape[2:]
    return shape_type(*size, *out_size, problem.kernel[0], stride[0], padding[0])


def precision(problem: Problem) -> str:
    """Of float32 products: TF32 where torch may use it for such a layer, else three of them, as good as float32."""
    if problem.input.dtype != torch.float32:
        return "tf32"  # has no say
    backends: Any = torch.backends
    own = [backends.cuda.matmul] if problem.is_linear else [backends.cudnn.conv, backends.cudnn]
    asked = [backend.fp32_precision for backend in (*own, backends)]
    return "tf32" if next((name for name in asked if name != "none"), "ieee") == "tf32" else "tf32x3"


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
