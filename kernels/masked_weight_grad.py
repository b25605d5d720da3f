"""Weight gradient of Linear and Conv2d for active blocks: an implicit matrix product over a table of tiles.

A tile is BLOCK_M out channels by BLOCK_N in channels. Its out channels are groups of GROUP, each of another active
block in the same column of blocks, so that few or thin blocks fill tensor cores too and share what is read of the
input. One program computes the taps of one kernel row (three for 3x3, which read the gradient once) over a range of
output positions; where there are too few tiles for the GPU, several programs share the positions, and a second pass
adds up what they found, always in the same order: the same input gives the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .build import Build

STORE, ACCUMULATE, SCORE_ABS, SCORE_SQUARE, PARTIAL = (tl.constexpr(number) for number in range(5))
"""What becomes of a product: stored, added to what is there, summed as |g| or g**2, or left to the second pass."""
EPILOGUES = {"store": STORE.value, "accumulate": ACCUMULATE.value, "abs": SCORE_ABS.value, "square": SCORE_SQUARE.value}
HEAD, PER_GROUP = tl.constexpr(3), tl.constexpr(3)
"""A tile's line in the table: column, columns, width of its blocks; then row, rows, offset of each group."""
REDUCED_ROWS = 8
"""Rows of a tile that one program of the second pass adds up."""


@triton.jit
def _finish(
    product, scores, out, table, tile, tap, first_row,
    TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, GROUP: tl.constexpr, FIELDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Put ROWS rows of one tap's product where they belong, or add them to the running score of each row."""
    i = first_row + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK_N)
    line = table + tile * FIELDS
    group = line + HEAD + i // GROUP * PER_GROUP
    inside = (i % GROUP < tl.load(group + 1))[:, None] & (j < tl.load(line + 1))[None, :]
    if EPILOGUE == SCORE_ABS:
        return scores + tl.sum(tl.where(inside, tl.abs(product), 0.0), axis=1)
    if EPILOGUE == SCORE_SQUARE:
        return scores + tl.sum(tl.where(inside, product * product, 0.0), axis=1)
    width = tl.load(line + 2)
    row = tl.load(group + 2) + i % GROUP * (width * TAPS)
    column = tap * width + j if CHANNELS_LAST else j * TAPS + tap
    where = out + row[:, None] + column[None, :]
    if EPILOGUE == ACCUMULATE:
        product += tl.load(where, mask=inside, other=0.0)
    tl.store(where, product, mask=inside)
    return scores


@triton.jit
def _input_of_tap(source, inside, column, n_inside, in_channels, TAP: tl.constexpr, WIDTH: tl.constexpr):
    """The input under one tap of a kernel row; zeros beyond the left and right border."""
    inside = inside & (column >= -TAP) & (column < WIDTH - TAP)
    return tl.load(source + TAP * in_channels, mask=inside[:, None] & n_inside, other=0.0)


@triton.jit
def weight_grad_kernel(
    grad_output, input, table, out, tiles, positions, split_positions, out_channels, in_channels,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr, ALIGNMENT: tl.constexpr, EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile, one kernel row, one range of positions.

    grad_output (positions, out_channels), input (batch, HEIGHT, WIDTH, in_channels); out is the compact gradient, or
    (splits, tiles, taps, BLOCK_M, BLOCK_N) where the second pass finishes, or scores (tiles, KERNEL, BLOCK_M).
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    FIELDS: tl.constexpr = HEAD + PER_GROUP * (BLOCK_M // GROUP)
    tap_row = tl.program_id(0) % KERNEL
    tile = tl.program_id(0) // KERNEL
    split = tl.program_id(1)
    i = tl.arange(0, BLOCK_M)
    # The table's rows and columns are multiples of ALIGNMENT, which the compiler cannot see: it needs it for 16 bytes.
    m = tl.load(table + tile * FIELDS + HEAD + i // GROUP * PER_GROUP) + i % GROUP
    m = tl.max_contiguous(tl.multiple_of(m, ALIGNMENT), ALIGNMENT)
    n = tl.load(table + tile * FIELDS) + tl.arange(0, BLOCK_N)
    n = tl.max_contiguous(tl.multiple_of(n, ALIGNMENT), ALIGNMENT)
    m_inside, n_inside = (m < out_channels)[None, :], (n < in_channels)[None, :]

    left = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    middle = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    right = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = split * split_positions
    end = tl.minimum(begin + split_positions, positions)
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_inside = k < end
        grad = tl.load(
            grad_output + k[:, None] * out_channels + m[None, :], mask=k_inside[:, None] & m_inside, other=0.0
        )
        grad = tl.trans(grad)
        if KERNEL == 1 and STRIDE == 1 and PADDING == 0:
            source = input + k[:, None] * in_channels + n[None, :]
            x = tl.load(source, mask=k_inside[:, None] & n_inside, other=0.0)
            left = tl.dot(grad, x, left, input_precision=PRECISION)
        else:
            y = k // OUT_WIDTH % OUT_HEIGHT * STRIDE - PADDING + tap_row
            column = k % OUT_WIDTH * STRIDE - PADDING
            position = (k // (OUT_HEIGHT * OUT_WIDTH) * HEIGHT + y) * WIDTH + column
            k_inside = k_inside & (y >= 0) & (y < HEIGHT)
            source = input + position[:, None] * in_channels + n[None, :]
            x = _input_of_tap(source, k_inside, column, n_inside, in_channels, 0, WIDTH)
            left = tl.dot(grad, x, left, input_precision=PRECISION)
            if KERNEL == 3:
                x = _input_of_tap(source, k_inside, column, n_inside, in_channels, 1, WIDTH)
                middle = tl.dot(grad, x, middle, input_precision=PRECISION)
                x = _input_of_tap(source, k_inside, column, n_inside, in_channels, 2, WIDTH)
                right = tl.dot(grad, x, right, input_precision=PRECISION)

    tap = tap_row * KERNEL
    if EPILOGUE == PARTIAL:
        j = tl.arange(0, BLOCK_N)
        where = out + ((split * tiles + tile) * TAPS + tap) * (BLOCK_M * BLOCK_N) + i[:, None] * BLOCK_N + j[None, :]
        tl.store(where, left)
        if KERNEL == 3:
            tl.store(where + BLOCK_M * BLOCK_N, middle)
            tl.store(where + 2 * BLOCK_M * BLOCK_N, right)
    else:
        scores = tl.zeros((BLOCK_M,), tl.float32)
        scores = _finish(
            left, scores, out, table, tile, tap, 0, TAPS, CHANNELS_LAST, GROUP, FIELDS, BLOCK_M, BLOCK_N, EPILOGUE
        )
        if KERNEL == 3:
            scores = _finish(
                middle, scores, out, table, tile, tap + 1, 0,
                TAPS, CHANNELS_LAST, GROUP, FIELDS, BLOCK_M, BLOCK_N, EPILOGUE,
            )  # fmt: skip
            scores = _finish(
                right, scores, out, table, tile, tap + 2, 0,
                TAPS, CHANNELS_LAST, GROUP, FIELDS, BLOCK_M, BLOCK_N, EPILOGUE,
            )  # fmt: skip
        if EPILOGUE == SCORE_ABS or EPILOGUE == SCORE_SQUARE:
            tl.store(out + (tile * KERNEL + tap_row) * BLOCK_M + i, scores)


@triton.jit
def reduce_kernel(
    partial, table, out, tiles, splits,
    TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, GROUP: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Second pass: ROWS rows of one tap of one tile, over all splits in order. Scores are (tiles, TAPS, BLOCK_M)."""
    FIELDS: tl.constexpr = HEAD + PER_GROUP * (BLOCK_M // GROUP)
    tap = tl.program_id(0) % TAPS
    tile = tl.program_id(0) // TAPS
    first_row = tl.program_id(1) * ROWS
    i = first_row + tl.arange(0, ROWS)
    where = partial + (tile * TAPS + tap) * (BLOCK_M * BLOCK_N) + i[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for _ in range(splits):
        total += tl.load(where)
        where += tiles * TAPS * BLOCK_M * BLOCK_N
    scores = tl.zeros((ROWS,), tl.float32)
    scores = _finish(
        total, scores, out, table, tile, tap, first_row,
        TAPS, CHANNELS_LAST, GROUP, FIELDS, ROWS, BLOCK_N, EPILOGUE,
    )  # fmt: skip
    if EPILOGUE == SCORE_ABS or EPILOGUE == SCORE_SQUARE:
        tl.store(out + (tile * TAPS + tap) * BLOCK_M + i, scores)


class Config(NamedTuple):
    """How a tile is computed: positions at a time, warps, depth of the pipeline, most registers a thread on sm_90."""

    block_k: int
    num_warps: int
    num_stages: int
    registers_sm_90: int | None = None


CONFIGS: dict[tuple[int, int, int, int], Config] = {
    # kernel, element bytes, BLOCK_M, BLOCK_N
    (3, 2, 64, 16): Config(64, 4, 2),
    (3, 2, 64, 32): Config(64, 4, 3),
    (3, 2, 64, 64): Config(32, 8, 4),
    (3, 2, 128, 64): Config(32, 8, 4, 128),  # so that two programs fit a multiprocessor
    (3, 4, 64, 16): Config(32, 4, 3),
    (3, 4, 64, 32): Config(32, 4, 3),
    (3, 4, 64, 64): Config(32, 8, 3),
    (1, 2, 64, 16): Config(64, 4, 4),
    (1, 2, 64, 32): Config(64, 4, 4),
    (1, 2, 64, 64): Config(64, 4, 4),
    (1, 2, 128, 64): Config(64, 8, 4),
    (1, 2, 128, 128): Config(64, 8, 3),
    (1, 4, 64, 16): Config(32, 4, 4),
    (1, 4, 64, 32): Config(32, 4, 4),
    (1, 4, 64, 64): Config(32, 4, 4),
}
"""The tiles there are. Chosen by what compiles well (registers, shared memory, tensor cores), not yet by time."""


MAX_GROUP = 64
"""Largest GROUP: groups that are smaller need a few registers more."""
MAX_BLOCK, MAX_BLOCK_IF_TIGHT = 128, 64
"""Largest BLOCK_M; and where registers are short: products are added to what is there, or loads cannot be wide."""


class Shape(NamedTuple):
    """A convolution as the kernel sees it; a linear layer is one of kernel 1 over positions in a row."""

    height: int
    width: int
    out_height: int
    out_width: int
    kernel: int
    stride: int
    padding: int


def launch(
    grad_output: Tensor,
    input: Tensor,
    table: Tensor,
    out: Tensor,
    shape: Shape,
    *,
    epilogue: int,
    splits: int,
    group: int,
    block_m: int,
    block_n: int,
    alignment: int,
    channels_last: bool,
    precision: str,
) -> None:
    """Compute all tiles of ``table`` and finish as ``epilogue`` says.

    Args:
        grad_output: (positions, out channels), contiguous.
        input: (batch * height * width, in channels), contiguous, same dtype.
        table: Tiles, int32 (tiles, HEAD + PER_GROUP * block_m / group), on the device.
        out: Compact gradient, or scores (tiles, parts, block_m): parts is 1 or 3 kernel rows, or all taps if split.
        shape: Of the convolution.
        epilogue: One of EPILOGUES.
        splits: How many programs share the positions of one tile.
        group: Out channels of a group.
        block_m: Out channels of a tile.
        block_n: In channels of a tile.
        alignment: What all rows and columns of the table are multiples of.
        channels_last: Order within blocks: out, taps, in.
        precision: Of float32 products: "tf32" or "tf32x3".
    """
    tiles, taps = len(table), shape.kernel**2
    positions, out_channels = grad_output.shape
    config = CONFIGS[shape.kernel, grad_output.element_size(), block_m, block_n]
    split_positions = -(-positions // splits)
    split_positions = -(-split_positions // config.block_k) * config.block_k
    first = out
    if splits > 1:
        first = torch.empty(splits * tiles * taps * block_m * block_n, dtype=torch.float32, device=out.device)
    capped = config.registers_sm_90 is not None and group == MAX_GROUP and is_sm_90(grad_output.device)
    with torch.cuda.device_of(grad_output):
        weight_grad_kernel[(tiles * shape.kernel, splits)](
            grad_output, input, table, first, tiles, positions, split_positions, out_channels, input.shape[1],
            shape.height, shape.width, shape.out_height, shape.out_width, shape.kernel, shape.stride, shape.padding,
            channels_last, group, alignment, PARTIAL.value if splits > 1 else epilogue, precision,
            block_m, block_n, config.block_k, num_warps=config.num_warps, num_stages=config.num_stages,
            **({"maxnreg": config.registers_sm_90} if capped else {}),
        )  # fmt: skip
        if splits > 1:
            reduce_kernel[(tiles * taps, block_m // REDUCED_ROWS)](
                first, table, out, tiles, splits, taps, channels_last, group, epilogue, block_m, block_n, REDUCED_ROWS
            )  # fmt: skip


@functools.cache
def is_sm_90(device: torch.device) -> bool:
    """Whether a GPU is of compute capability 9.0 or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


REGISTERS = {(3, 2): 192, (3, 4): 184, (1, 2): 224, (1, 4): 208}
"""Kernel, element bytes -> registers a thread at most: sm_80 needs more, its tensor cores read registers alone."""
SHARED_BYTES = 96 << 10
"""Of a program at most, so that two fit a multiprocessor of sm_90."""


def _build(key: tuple[int, int, int, int], epilogue: str, element: str = "bf16", **changed: object) -> Build:
    (kernel, size, block_m, block_n), config = key, CONFIGS[key]
    element = element if size == 2 else "fp32"
    constants = {
        "HEIGHT": 32, "WIDTH": 32, "OUT_HEIGHT": 32, "OUT_WIDTH": 32, "KERNEL": kernel, "STRIDE": 1,
        "PADDING": kernel // 2, "CHANNELS_LAST": True, "GROUP": 64, "ALIGNMENT": 16,
        "EPILOGUE": EPILOGUES.get(epilogue, PARTIAL.value), "PRECISION": "tf32",
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    sizes = ("positions", "split_positions", "out_channels", "in_channels")
    what = " ".join(
        [f"{kernel}x{kernel} {element} {block_m}x{block_n}x{config.block_k} {epilogue}", *map(str, changed.values())]
    )
    return Build(
        what,
        weight_grad_kernel,
        dict.fromkeys(("grad_output", "input"), f"*{element}")
        | {"table": "*i32", "out": "*fp32", "tiles": "i32"}
        | dict.fromkeys(sizes, "i32"),
        constants | changed,
        ("grad_output", "input", "table", "out", *sizes),
        config.num_warps,
        config.num_stages,
        registers=REGISTERS[kernel, size],
        shared_bytes=SHARED_BYTES,
        tensor_cores=True,
        async_copies=size == 2,  # TF32 operands are transposed on their way into shared memory on sm_90
        options_sm_90={} if config.registers_sm_90 is None else {"maxnreg": config.registers_sm_90},
    )


def _unaligned(build: Build) -> Build:
    """The same where channels are no multiples of 16, and blocks of nothing."""
    return replace(
        build,
        name=f"{build.name} unaligned",
        constants=build.constants | {"ALIGNMENT": 1},
        aligned=("grad_output", "input", "table", "out"),
        registers=255,
        async_copies=False,
    )


def _reduce_build(taps: int, block_m: int, block_n: int, epilogue: str) -> Build:
    return Build(
        f"reduce {taps} taps {block_m}x{block_n} {epilogue}",
        reduce_kernel,
        {"partial": "*fp32", "table": "*i32", "out": "*fp32", "tiles": "i32", "splits": "i32"},
        {
            "TAPS": taps, "CHANNELS_LAST": True, "GROUP": 64, "EPILOGUE": EPILOGUES[epilogue],
            "BLOCK_M": block_m, "BLOCK_N": block_n, "ROWS": REDUCED_ROWS,
        },
        ("partial", "table", "out"),
        num_warps=4,
        num_stages=3,
        registers=64,
        shared_bytes=16 << 10,
    )  # fmt: skip


BUILDS = [
    *(_build(key, epilogue) for key in CONFIGS for epilogue in ("store", "partial")),
    *(_build(key, "accumulate") for key in CONFIGS if key[2] <= MAX_BLOCK_IF_TIGHT),
    *(_build(key, epilogue) for key in [(3, 2, 128, 64), (1, 2, 128, 128)] for epilogue in ("abs", "square")),
    *(_build((kernel, 2, 64, 64), "store", "fp16", STRIDE=2, OUT_HEIGHT=16, OUT_WIDTH=16) for kernel in (1, 3)),
    *(_build((3, 2, 128, 64), "store", **changed) for changed in ({"CHANNELS_LAST": False}, {"ALIGNMENT": 8})),
    *(_unaligned(_build((kernel, size, 64, 64), "store")) for kernel in (1, 3) for size in (2, 4)),
    *(_build(key, "store", PRECISION="tf32x3") for key in CONFIGS if key[:2] == (1, 4)),
    *(_reduce_build(taps, 128, 64, epilogue) for taps in (1, 9) for epilogue in ("store", "accumulate", "abs")),
]
