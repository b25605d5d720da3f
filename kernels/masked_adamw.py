"""The AdamW step of a whole model in one launch, and the new values into its dense weights.

One program owns one tile of flat weights: it reads and writes them coalesced, and finds in the scatter table (described
in csrc/scatter.h) where each of them goes. Every product and sum is rounded on its own (no contraction to FMA), in the
order of the plain-torch reference, whose bits come out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .build import Build

TILE = tl.constexpr(1024)
"""Flat weights of a program: the tiles of the scatter table."""
NUM_WARPS = 8
"""Four weights a thread: 16 bytes of each buffer."""
OPTIONS = {"enable_fp_fusion": False}
MAX_PROGRAMS = 2**31 - 1
KINDS = ("signed_sum", "abs", "square")
"""Ways to add up the saliency."""


@triton.jit
def _load(pointer, begin, mask):
    # Read once a step: the caches are for the table and the model.
    return tl.load(pointer + begin + tl.arange(0, TILE), mask=mask, eviction_policy="evict_first")


@triton.jit
def _store(pointer, begin, x, mask):
    tl.store(pointer + begin + tl.arange(0, TILE), x, mask=mask, cache_modifier=".cs")


@triton.jit
def _destination(begin, table):
    """Where every weight of the tile at flat element ``begin`` goes: its address (0: nowhere), and the dtype there."""
    dense_pointers, dense_dtypes, run_parameter, run_dense_offset, run_flat_offset, tile_run = table
    tile, i = tl.program_id(0), tl.arange(0, TILE)
    first = tl.load(tile_run + tile)
    span = (tl.load(tile_run + tile + 1) - first).to(tl.int32)
    # Every run has at least one weight, so that the run number rises by less than the element number: where each
    # weight is a run, and where a tile has one run, nothing is left to search.
    low, high = tl.maximum(span - (TILE - i), 0), tl.minimum(i, span)
    width = tl.minimum(span, TILE - span)
    while width > 0:
        middle = (low + high + 1) // 2
        before = tl.load(run_flat_offset + first + middle) <= begin + i
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
        width = width // 2
    run = first + low
    parameter = tl.load(run_parameter + run)
    offset = tl.load(run_dense_offset + run) + (begin - tl.load(run_flat_offset + run)) + i
    address, dtype = tl.load(dense_pointers + parameter), tl.load(dense_dtypes + parameter)
    size = tl.where(dtype == 0, 4, tl.where(dtype == 3, 8, 2))
    return tl.where(address == 0, address, address + offset * size), dtype


@triton.jit
def _bfloat16_bits(x):
    # To nearest even, NaN stays NaN, as csrc/dtype.h has it: triton's interpreter rounds otherwise.
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, (bits >> 16) | 0x40).to(tl.uint16)


@triton.jit
def _store_dense(address, dtype, value, mask, DTYPES: tl.constexpr):
    mask = mask & (address != 0)  # 0: the dense weight is a view of the flat buffer
    if DTYPES & 1:
        tl.store(address.to(tl.pointer_type(tl.float32)), value, mask=mask & (dtype == 0))
    if DTYPES & 2:
        tl.store(address.to(tl.pointer_type(tl.uint16)), _bfloat16_bits(value), mask=mask & (dtype == 1))
    if DTYPES & 4:
        tl.store(address.to(tl.pointer_type(tl.float16)), value.to(tl.float16), mask=mask & (dtype == 2))
    if DTYPES & 8:
        tl.store(address.to(tl.pointer_type(tl.float64)), value.to(tl.float64), mask=mask & (dtype == 3))


@triton.jit
def _step_tile(buffers, begin, left, mask, of_this_step, constants, table, KIND: tl.constexpr, DTYPES: tl.constexpr):
    value_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, ema_ptr, saliency_ptr = buffers
    decay, step_size, bias2_sqrt = of_this_step
    one_minus_beta1, beta2, one_minus_beta2, eps, clip_value, one_minus_ema_decay = constants
    # All loads are on their way before the first is waited for: those of the buffers, then those of the table.
    g = _load(grad_ptr, begin, mask)
    value = _load(value_ptr, begin, mask)
    exp_avg_sq = _load(exp_avg_sq_ptr, begin, mask)
    if exp_avg_ptr is not None:
        exp_avg = _load(exp_avg_ptr, begin, mask)
    if ema_ptr is not None:
        ema = _load(ema_ptr, begin, mask)
    if saliency_ptr is not None:
        saliency = _load(saliency_ptr, begin, mask)
    if table is not None:
        address, dtype = _destination(begin, table)

    if saliency_ptr is not None:
        score = g if KIND == "signed_sum" else tl.abs(g) if KIND == "abs" else g * g
        _store(saliency_ptr, begin, saliency + score, mask)
    g = tl.where(g > clip_value, clip_value, g)  # both comparisons are false for NaN, which stays
    g = tl.where(g < -clip_value, -clip_value, g)
    momentum = g
    if exp_avg_ptr is not None:
        momentum = exp_avg + one_minus_beta1 * (g - exp_avg)
        _store(exp_avg_ptr, begin, momentum, mask)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (g * g)
    _store(exp_avg_sq_ptr, begin, exp_avg_sq, mask)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), bias2_sqrt) + eps
    value = value * decay - step_size * tl.div_rn(momentum, denominator)
    _store(value_ptr, begin, value, mask)
    if ema_ptr is not None:
        _store(ema_ptr, begin, ema + one_minus_ema_decay * (value - ema), mask)
    if table is not None:
        _store_dense(address, dtype, value, tl.arange(0, TILE) < left, DTYPES)


# The length must not choose the code: accesses are wide whatever it is.
@triton.jit(do_not_specialize=["numel"])
def masked_adamw_kernel(
    value_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, ema_ptr, saliency_ptr, numel,
    device_numbers, decay, step_size, bias2_sqrt,
    one_minus_beta1, beta2, one_minus_beta2, eps, clip_value, one_minus_ema_decay,
    dense_pointers, dense_dtypes, run_parameter, run_dense_offset, run_flat_offset, tile_run,
    KIND: tl.constexpr, DTYPES: tl.constexpr,
):  # fmt: skip
    """What is not kept, not scattered or not in device memory is None.

    Args:
        device_numbers: decay, step_size and bias2_sqrt in device memory, instead of the arguments of that name.
    """
    begin = tl.program_id(0).to(tl.int64) * TILE
    left = numel - begin
    if device_numbers is not None:
        decay = tl.load(device_numbers)
        step_size = tl.load(device_numbers + 1)
        bias2_sqrt = tl.load(device_numbers + 2)
    buffers = (value_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, ema_ptr, saliency_ptr)
    of_this_step = (decay, step_size, bias2_sqrt)
    constants = (one_minus_beta1, beta2, one_minus_beta2, eps, clip_value, one_minus_ema_decay)
    table = None
    if dense_pointers is not None:
        table = (dense_pointers, dense_dtypes, run_parameter, run_dense_offset, run_flat_offset, tile_run)
    if left >= TILE:  # without a mask, which would keep the compiler from accesses of 16 bytes
        _step_tile(buffers, begin, left, None, of_this_step, constants, table, KIND, DTYPES)
    else:
        _step_tile(buffers, begin, left, tl.arange(0, TILE) < left, of_this_step, constants, table, KIND, DTYPES)


def masked_adamw_(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    saliency: Tensor | None,
    table: Sequence[Tensor],
    *,
    table_dtypes: int,
    of_this_step: tuple[float, float, float] | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    clip_value: float,
    ema_decay: float,
    saliency_kind: str,
) -> None:
    """One step on flat float32 buffers (n,), in place; the arguments are those of ``pecker_fast.ops.masked_adamw_``.

    Args:
        table: The six tensors of a scatter table, or none of them.
        table_dtypes: Bit c is set where a dense weight has dtype c, as csrc/dtype.h numbers them.
        of_this_step: 1 - lr * weight_decay, lr / (1 - beta1^t) and sqrt(1 - beta2^t); or a tensor (3,) of them.

    Raises:
        ValueError: More tiles than a grid can have.
    """
    programs = triton.cdiv(value.numel(), TILE.value)
    if programs > MAX_PROGRAMS:
        raise ValueError(f"masked_adamw_: at most {MAX_PROGRAMS} tiles of {TILE.value} weights, got {programs}")
    if not programs:
        return
    kind = None if saliency is None else saliency_kind
    on_device = isinstance(of_this_step, Tensor)
    numbers = (of_this_step.float(), None, None, None) if on_device else (None, *of_this_step)
    with torch.cuda.device_of(value):
        masked_adamw_kernel[(programs,)](
            value, grad, exp_avg, exp_avg_sq, ema, saliency, value.numel(),
            *numbers, 1 - beta1, beta2, 1 - beta2, eps, clip_value, 1 - ema_decay,
            *(table or (None,) * 6), kind, table_dtypes,
            num_warps=NUM_WARPS, **OPTIONS,
        )  # fmt: skip


BUFFERS = ("value_ptr", "grad_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "ema_ptr", "saliency_ptr")
NUMBERS = (
    "decay", "step_size", "bias2_sqrt", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "clip_value",
    "one_minus_ema_decay",
)  # fmt: skip
TABLE = {
    "dense_pointers": "*i64", "dense_dtypes": "*i32", "run_parameter": "*i32",
    "run_dense_offset": "*i64", "run_flat_offset": "*i64", "tile_run": "*i64",
}  # fmt: skip


def _build(name: str, registers: int, *without: str, dtypes: int = 1, numel: str = "i32") -> Build:
    """A configuration without some of the arguments. Nothing is said of the length, which accesses do not depend on."""
    signature = dict.fromkeys(BUFFERS, "*fp32") | {"numel": numel, "device_numbers": "*fp32"}
    signature |= dict.fromkeys(NUMBERS, "fp32") | TABLE
    signature = {argument: kind for argument, kind in signature.items() if argument not in without}
    kind = None if "saliency_ptr" in without else "abs"
    return Build(
        name,
        masked_adamw_kernel,
        signature,
        dict.fromkeys(without) | {"KIND": kind, "DTYPES": dtypes},
        aligned=tuple(argument for argument, kind in signature.items() if kind.startswith("*")),
        num_warps=NUM_WARPS,
        registers=registers,
        shared_bytes=8 * TILE.value,  # addresses and values change hands before the scatter
        wide_accesses=True,
        options=OPTIONS,
    )


# A multiprocessor has room for three programs of up to 80 registers, for two of up to 128: 40 KiB or more on their way.
BUILDS = [
    _build("beta1=0", 80, "exp_avg_ptr", "ema_ptr", "saliency_ptr", "device_numbers"),
    _build("beta1=0, ema", 96, "exp_avg_ptr", "saliency_ptr", "device_numbers"),
    _build("beta1=0, saliency", 96, "exp_avg_ptr", "ema_ptr", "device_numbers"),
    _build("beta1=0, ema, saliency", 112, "exp_avg_ptr", "device_numbers"),
    _build("adamw", 96, "ema_ptr", "saliency_ptr", "device_numbers"),
    _build("adamw, ema", 112, "saliency_ptr", "device_numbers"),
    _build("adamw, saliency", 112, "ema_ptr", "device_numbers"),
    _build("adamw, ema, saliency", 128, "device_numbers"),
    _build("adamw, numbers in device memory", 96, "ema_ptr", "saliency_ptr", *NUMBERS[:3]),
    _build("adamw, nothing to scatter", 40, "ema_ptr", "saliency_ptr", "device_numbers", *TABLE, dtypes=0),
    _build("adamw, bfloat16", 96, "ema_ptr", "saliency_ptr", "device_numbers", dtypes=2),
    _build("adamw, all dtypes, 2^31 weights", 96, "ema_ptr", "saliency_ptr", "device_numbers", dtypes=15, numel="i64"),
]
