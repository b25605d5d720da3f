"""SiD generator loss in closed form: loss and both gradients of every sample.

The gradients need the mean of |epsilon - epsilon_true| first. A sample of up to FUSED_ELEMENTS stays in registers: one
program, one read. A larger one is cut into chunks, each read twice: partial sums, then gradients, for which every
program adds up the same partial sums in the same order. No atomics: every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .build import Build

FUSED_ELEMENTS = 16384
"""Largest sample that one program holds: with 32 warps 16 elements a thread. A quarter of it in float64."""
CHUNK = 2048
"""Elements of one program where a sample is cut into chunks."""


@triton.jit
def _load(epsilon_ptr, true_ptr, fake_ptr, offsets, inside, dtype: tl.constexpr):
    """r = epsilon - epsilon_true and d = epsilon_fake - epsilon_true; zeros outside."""
    epsilon = tl.load(epsilon_ptr + offsets, mask=inside, other=0.0).to(dtype)
    true = tl.load(true_ptr + offsets, mask=inside, other=0.0).to(dtype)
    fake = tl.load(fake_ptr + offsets, mask=inside, other=0.0).to(dtype)
    return epsilon - true, fake - true


@triton.jit
def _scale(sigma, sum_abs, numel, OMEGA_MIN: tl.constexpr):
    """sigma^2 / omega; NaN stays NaN."""
    omega = sigma * (sum_abs / numel)
    return sigma * sigma / tl.where(omega < OMEGA_MIN, OMEGA_MIN, omega)


@triton.jit
def _store_grads(grad_true_ptr, grad_fake_ptr, offsets, inside, r, d, scale, ALPHA: tl.constexpr):
    tl.store(grad_true_ptr + offsets, -scale * (r + (1 - 2 * ALPHA) * d), mask=inside)
    tl.store(grad_fake_ptr + offsets, scale * (r - 2 * ALPHA * d), mask=inside)


@triton.jit
def sid_loss_kernel(
    epsilon_ptr,
    true_ptr,
    fake_ptr,
    sigma_ptr,
    loss_ptr,
    grad_true_ptr,
    grad_fake_ptr,
    numel,  # of a sample
    ALPHA: tl.constexpr,
    OMEGA_MIN: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0)
    position = tl.arange(0, BLOCK)
    offsets = sample.to(tl.int64) * numel + position
    inside = position < numel
    r, d = _load(epsilon_ptr, true_ptr, fake_ptr, offsets, inside, DTYPE)
    scale = _scale(tl.load(sigma_ptr + sample).to(DTYPE), tl.sum(tl.abs(r)), numel, OMEGA_MIN)
    tl.store(loss_ptr + sample, scale * tl.sum(d * (r - ALPHA * d)))
    _store_grads(grad_true_ptr, grad_fake_ptr, offsets, inside, r, d, scale, ALPHA)


@triton.jit
def partial_sums_kernel(
    epsilon_ptr,
    true_ptr,
    fake_ptr,
    sums_ptr,  # [2][samples * chunks]: |r| and d (r - alpha d)
    numel,
    chunks,  # of a sample
    ALPHA: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    position = chunk * BLOCK + tl.arange(0, BLOCK)
    offsets = sample.to(tl.int64) * numel + position
    r, d = _load(epsilon_ptr, true_ptr, fake_ptr, offsets, position < numel, DTYPE)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.abs(r)))
    tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(d * (r - ALPHA * d)))


@triton.jit
def _sum(sums_ptr, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), DTYPE)
    begin = 0
    while begin < count:  # triton's interpreter has no range() over numbers that are arguments
        position = begin + tl.arange(0, BLOCK)
        sums += tl.load(sums_ptr + position, mask=position < count, other=0.0)
        begin += BLOCK
    return tl.sum(sums)


@triton.jit
def chunk_grads_kernel(
    epsilon_ptr,
    true_ptr,
    fake_ptr,
    sigma_ptr,
    sums_ptr,
    loss_ptr,
    grad_true_ptr,
    grad_fake_ptr,
    numel,
    chunks,
    ALPHA: tl.constexpr,
    OMEGA_MIN: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    sums_ptr += sample * chunks
    position = chunk * BLOCK + tl.arange(0, BLOCK)
    offsets = sample.to(tl.int64) * numel + position
    inside = position < numel
    r, d = _load(epsilon_ptr, true_ptr, fake_ptr, offsets, inside, DTYPE)
    scale = _scale(tl.load(sigma_ptr + sample).to(DTYPE), _sum(sums_ptr, chunks, DTYPE, SUMS), numel, OMEGA_MIN)
    if chunk == 0:
        tl.store(loss_ptr + sample, scale * _sum(sums_ptr + tl.num_programs(0), chunks, DTYPE, SUMS))
    _store_grads(grad_true_ptr, grad_fake_ptr, offsets, inside, r, d, scale, ALPHA)


def sid_loss_(
    inputs: tuple[Tensor, Tensor, Tensor],
    sigma: Tensor,
    loss: Tensor,
    grads: tuple[Tensor, Tensor],
    alpha: float,
    omega_min: float,
) -> None:
    """Fills ``loss`` (batch,) and the gradients.

    ``inputs`` (epsilon and both predictions) and ``grads`` have at least one element and one layout in memory, sample
    after sample. Whatever their dtypes, float32 is computed in, or float64 if one of them is that.
    """
    samples, numel = len(loss), inputs[0].numel() // len(loss)
    is_double = any(tensor.dtype == torch.float64 for tensor in (*inputs, sigma))
    dtype, constants = tl.float64 if is_double else tl.float32, {"ALPHA": float(alpha)}
    with torch.cuda.device_of(loss):
        if numel <= (FUSED_ELEMENTS // 4 if is_double else FUSED_ELEMENTS):
            block = triton.next_power_of_2(numel)
            sid_loss_kernel[(samples,)](
                *inputs,
                sigma,
                loss,
                *grads,
                numel,
                **constants,
                OMEGA_MIN=omega_min,
                DTYPE=dtype,
                BLOCK=block,
                num_warps=fused_warps(block),
            )
            return
        chunks = triton.cdiv(numel, CHUNK)
        sums = loss.new_empty(2 * samples * chunks, dtype=torch.float64 if is_double else torch.float32)
        constants |= {"DTYPE": dtype, "BLOCK": CHUNK}
        grid = (samples * chunks,)
        partial_sums_kernel[grid](*inputs, sums, numel, chunks, **constants, num_warps=8)
        arguments = *inputs, sigma, sums, loss, *grads, numel, chunks
        chunk_grads_kernel[grid](*arguments, **constants, OMEGA_MIN=omega_min, SUMS=1024, num_warps=8)


def fused_warps(block: int) -> int:
    """16 elements a thread, so that r and d take 32 registers."""
    return max(1, min(32, block // 512))


def _builds() -> list[Build]:
    inputs = ("epsilon_ptr", "true_ptr", "fake_ptr")
    grads = ("grad_true_ptr", "grad_fake_ptr")
    pointers = dict.fromkeys((*inputs, "sigma_ptr", "loss_ptr", *grads), "*fp32")
    constants = {"ALPHA": 1.2, "OMEGA_MIN": 1e-5, "DTYPE": tl.float32}
    builds = [
        Build(
            name=f"{numel} elements",
            kernel=sid_loss_kernel,
            signature={**pointers, "numel": "i32"},
            constants={**constants, "BLOCK": triton.next_power_of_2(numel)},
            aligned=(*inputs, *grads, "numel"),
            num_warps=fused_warps(triton.next_power_of_2(numel)),
            registers=64,
            shared_bytes=128,
            wide_accesses=True,
        )
        for numel in (3 * 32 * 32, 4 * 64 * 64)
    ]
    sizes = {"numel": "i32", "chunks": "i32"}
    sums = {**dict.fromkeys(inputs, "*fp32"), "sums_ptr": "*fp32", **sizes}
    shared = {"num_warps": 8, "registers": 64, "shared_bytes": 128}
    builds.append(
        Build(
            name="partial sums",
            kernel=partial_sums_kernel,
            signature=sums,
            constants={"ALPHA": 1.2, "DTYPE": tl.float32, "BLOCK": CHUNK},
            aligned=(*inputs, "numel"),
            wide_loads=True,
            **shared,
        )
    )
    builds.append(
        Build(
            name="gradients of chunks",
            kernel=chunk_grads_kernel,
            signature={**pointers, "sums_ptr": "*fp32", **sizes},
            constants={**constants, "BLOCK": CHUNK, "SUMS": 1024},
            aligned=(*inputs, *grads, "numel"),
            wide_accesses=True,
            **shared,
        )
    )
    return builds


BUILDS = _builds()
