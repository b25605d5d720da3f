"""Running saliency: one gradient, its magnitude or its square is added per weight, or summed over blocks.

One pass over memory. Per weight the bits are those of plain torch (no contraction); a block is summed by one program
in an order of its own, without atomics, so that every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .build import Build

SIGNED_SUM, ABS, SQUARE = 0, 1, 2
ELEMENTS = 1024
"""Weights of one program: with 4 warps 32 bytes a thread in flight of each float32 tensor."""
TILE_ELEMENTS = 2048
"""Weights of a block that a program reads at a time."""


@triton.jit
def _saliency(grad, dtype: tl.constexpr, KIND: tl.constexpr):
    value = grad.to(dtype)
    if KIND == 1:
        value = tl.abs(value)
    elif KIND == 2:
        value = value * value
    return value


@triton.jit
def accumulate_kernel(total_ptr, grad_ptr, numel, KIND: tl.constexpr, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = begin + tl.arange(0, BLOCK)
    dtype: tl.constexpr = total_ptr.dtype.element_ty
    if begin + BLOCK <= numel:  # a mask, at any length, would cost the 16-byte accesses
        total = tl.load(total_ptr + offsets)
        value = _saliency(tl.load(grad_ptr + offsets), dtype, KIND)
        tl.store(total_ptr + offsets, total + value)
    else:
        inside = offsets < numel
        total = tl.load(total_ptr + offsets, mask=inside, other=0.0)
        value = _saliency(tl.load(grad_ptr + offsets, mask=inside, other=0.0), dtype, KIND)
        tl.store(total_ptr + offsets, total + value, mask=inside)


# The weight lies in memory as [out][repeat][in * unit] (csrc/accumulate_saliency.h), so that a block is a stack of
# stretches: `block_out * repeat` of them, `block_width` long and `width` apart.
@triton.jit
def accumulate_blocks_kernel(
    total_ptr,
    grad_ptr,
    stretches,  # out * repeat
    width,  # in * unit
    block_stretches,
    block_width,
    columns,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    block = tl.program_id(0)
    first_stretch = (block // columns).to(tl.int64) * block_stretches
    first_column = (block % columns).to(tl.int64) * block_width
    dtype: tl.constexpr = total_ptr.dtype.element_ty
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    sums = tl.zeros((ROWS, COLS), dtype)
    row = 0
    while row < block_stretches:  # triton's interpreter has no range() over numbers that are arguments
        row_inside = (row + rows < block_stretches) & (first_stretch + row + rows < stretches)
        col = 0
        while col < block_width:
            inside = row_inside & (col + cols < block_width) & (first_column + col + cols < width)
            offsets = (first_stretch + row + rows) * width + (first_column + col + cols)
            sums += _saliency(tl.load(grad_ptr + offsets, mask=inside, other=0.0), dtype, KIND)
            col += COLS
        row += ROWS
    total = tl.load(total_ptr + block)
    tl.store(total_ptr + block, total + tl.sum(tl.sum(sums, 1), 0))


def accumulate_(total: Tensor, grad: Tensor, kind: int) -> None:
    """Adds ``grad`` to ``total``: both dense, with their elements in the same places."""
    numel = total.numel()
    if numel == 0:
        return
    with torch.cuda.device_of(total):
        accumulate_kernel[(triton.cdiv(numel, ELEMENTS),)](
            total, grad, numel, KIND=kind, BLOCK=ELEMENTS, num_warps=4, enable_fp_fusion=False
        )


def accumulate_blocks_(total: Tensor, grad: Tensor, kind: int, memory: list[int], block: list[int]) -> None:
    """Adds the sums of ``grad`` over blocks to ``total`` (num_blocks,).

    ``memory`` is the weight as it lies, [out, repeat, in, unit]: (out, 1, in, taps), or (out, taps, in, 1) in
    channels-last.
    """
    out, repeat, in_, unit = memory
    (block_out, block_in), width = block, in_ * unit
    if total.numel() == 0 or grad.numel() == 0:
        return
    stretches, block_stretches, block_width = out * repeat, block_out * repeat, block_in * unit
    if block_in == in_:  # stretches without gaps are one
        stretches, width = out, width * repeat
        block_stretches, block_width = block_out, width
    rows, cols = tile(block_stretches, block_width)
    with torch.cuda.device_of(total):
        accumulate_blocks_kernel[(total.numel(),)](
            total,
            grad,
            stretches,
            width,
            block_stretches,
            block_width,
            triton.cdiv(in_, block_in),
            KIND=kind,
            ROWS=rows,
            COLS=cols,
            num_warps=warps(rows * cols),
            enable_fp_fusion=False,
        )


def tile(block_stretches: int, block_width: int) -> tuple[int, int]:
    """Stretches and columns that a program reads at a time: powers of two, as little beyond the block as possible."""
    cols = min(triton.next_power_of_2(block_width), TILE_ELEMENTS)
    return min(triton.next_power_of_2(block_stretches), TILE_ELEMENTS // cols), cols


def warps(elements: int) -> int:
    """16 elements a thread, in 1 to 4 warps."""
    return max(1, min(4, elements // 512))


def _builds() -> list[Build]:
    builds = []
    for grad in ("fp32", "bf16", "fp16"):
        signature = {"total_ptr": "*fp32", "grad_ptr": f"*{grad}"}
        builds += [
            Build(
                name=f"{grad} per weight, kind {kind}",
                kernel=accumulate_kernel,
                signature={**signature, "numel": "i32"},
                constants={"KIND": kind, "BLOCK": ELEMENTS},
                aligned=("total_ptr", "grad_ptr"),
                num_warps=4,
                registers=48,
                shared_bytes=0 if grad == "fp32" else 4096,  # from 8 to 4 weights a thread
                wide_accesses=True,
                options={"enable_fp_fusion": False},
            )
            for kind in (ABS, SQUARE)
        ]
        # Rows of 2880, 64 x 64 tiles of a 3 x 3 convolution and of the same in channels-last.
        for name, sides in {"rows": (1, 2880), "tiles": (64, 576), "channels-last tiles": (576, 64)}.items():
            rows, cols = tile(*sides)
            ones = {"block_stretches": 1, "columns": 1} if name == "rows" else {}  # triton makes them constants
            sizes = {"stretches", "width", "block_stretches", "block_width", "columns"} - set(ones)
            builds.append(
                Build(
                    name=f"{grad} {name}",
                    kernel=accumulate_blocks_kernel,
                    signature={**signature, **dict.fromkeys(sizes, "i32")},
                    constants={"KIND": ABS, "ROWS": rows, "COLS": cols, **ones},
                    aligned=("total_ptr", "grad_ptr", "width", "block_width"),
                    num_warps=warps(rows * cols),
                    registers=64,
                    shared_bytes=64,
                    wide_loads=True,
                    options={"enable_fp_fusion": False},
                )
            )
    return builds


BUILDS = _builds()
