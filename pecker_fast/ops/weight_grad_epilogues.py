"""What else can become of a masked weight gradient: added to another, or summed over blocks and never kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pecker_fast.blocks import ParameterMask
from pecker_fast.ops import triton_kernels
from pecker_fast.ops.dispatch import Backend, Op, library
from pecker_fast.ops.problem import SCHEMA, Problem, grad_dtype, problem
from pecker_fast.ops.slabs import masked_weight_grad_reference
from pecker_fast.ops.tiled_weight_grad import accumulate_tiled_, score_tiled_
from pecker_fast.ops.weight_grad_ways import backend_for

BlockSaliency: TypeAlias = Literal["abs", "square"]


def accumulate_weight_grad_(
    total: Tensor,
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
    """Add the weight gradient of active blocks to ``total``, as gradient accumulation does.

    In plain torch: ``total += masked_weight_grad(grad_output, input, mask, ...)``; the Triton kernel does it where the
    product is, so that the gradient itself is never written.

    Args:
        total: A tensor like the one ``masked_weight_grad`` returns, or zeros of that shape and layout. Changed.
        grad_output: This and the others as in ``masked_weight_grad``.
        input: See there.
        mask: See there.
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        channels_last: See there.
        backend: Name of a backend, or None for the best one.

    Returns:
        ``total``.

    Raises:
        ValueError: Shapes do not fit, or ``total`` has another dtype, device or memory order; nothing is changed.
    """
    given = problem(grad_output, input, mask, stride, padding, dilation, groups, channels_last)
    given.check("accumulate_weight_grad_")
    expected = (given.compact_shape, grad_dtype(grad_output), input.device)
    laid_out = total.is_contiguous(memory_format=given.grad_layout)
    if (tuple(total.shape), total.dtype, total.device) != expected or not laid_out:
        raise ValueError(
            f"accumulate_weight_grad_: expected total of {expected[1]} {expected[0]} on {expected[2]} in "
            f"{given.grad_layout}, got {total.dtype} {tuple(total.shape)} on {total.device} with strides "
            f"{total.stride()}"
        )
    torch.ops.pecker_fast.accumulate_weight_grad_(total, *given.arguments(), backend)
    return total


def score_weight_grad_(
    sums: Tensor,
    grad_output: Tensor,
    input: Tensor,
    mask: ParameterMask,
    kind: BlockSaliency = "abs",
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Add the saliency of each active block to ``sums``, without keeping the gradient.

    In plain torch: ``sums[mask.active] += f(gradient of each active block).sum()`` with f(g) = ``|g|`` or ``g**2``. The
    Triton kernel sums what is in its registers, so that no gradient is written or read.

    Args:
        sums: Running saliency of every block, float32 or float64 (num_blocks,). Changed at active blocks.
        grad_output: This and the others as in ``masked_weight_grad``.
        input: See there.
        mask: Blocks to score; ``ParameterMask.full(grid)`` scores all.
        kind: "abs" or "square".
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        backend: Name of a backend, or None for the best one.

    Returns:
        ``sums``.

    Raises:
        ValueError: Shapes do not fit, or ``kind`` is neither; nothing is changed.
    """
    given = problem(grad_output, input, mask, stride, padding, dilation, groups, channels_last=False)
    given.check("score_weight_grad_")
    if kind not in get_args(BlockSaliency):
        raise ValueError(f'score_weight_grad_: kind must be "abs" or "square", got {kind!r}')
    wide = sums.dtype in (torch.float32, torch.float64)
    if tuple(sums.shape) != (mask.grid.num_blocks,) or not wide or sums.device != input.device:
        raise ValueError(
            f"score_weight_grad_: expected sums of float32 or float64 ({mask.grid.num_blocks},) on {input.device}, "
            f"got {sums.dtype} {tuple(sums.shape)} on {sums.device}"
        )
    torch.ops.pecker_fast.score_weight_grad_(sums, *given.arguments(), kind, backend)
    return sums


def _accumulate_reference_(total: Tensor, problem: Problem) -> None:
    total.add_(masked_weight_grad_reference(problem))


def _score_reference_(sums: Tensor, problem: Problem, kind: str) -> None:
    """Block sums in float64: blocks may be large."""
    mask, grid = problem.mask, problem.mask.grid
    grad = masked_weight_grad_reference(problem).double()
    values = grad.abs() if kind == "abs" else grad.square()
    if mask.is_full:
        sums.add_(grid.block_sums(values))
        return
    numbers = torch.arange(len(mask.active), device="cpu")
    owner = numbers.repeat_interleave(grid.block_numel()[mask.active]).to(values.device)
    blocks = values.new_zeros(len(mask.active)).index_add_(0, owner, values.flatten())
    sums.index_add_(0, mask.active_on(sums.device), blocks.to(sums.dtype))


def _op(name: str, reference: Callable[..., None], tiled: Callable[..., None]) -> Op:
    return Op(
        name,
        {
            "reference": Backend(reference),
            "triton": Backend(tiled, devices=triton_kernels.DEVICES, why_not=triton_kernels.why_not),
        },
        prefer={"cuda": ("triton",)},
    )


_ACCUMULATE = _op("accumulate_weight_grad_", _accumulate_reference_, accumulate_tiled_)
_SCORE = _op("score_weight_grad_", _score_reference_, score_tiled_)

library.define(f"accumulate_weight_grad_(Tensor(a!) total, {SCHEMA}, str? backend) -> ()")
library.define(f"score_weight_grad_(Tensor(a!) sums, {SCHEMA}, str kind, str? backend) -> ()")


@torch.library.impl(library, "accumulate_weight_grad_", "CompositeExplicitAutograd")
def _run_accumulate(total: Tensor, *args: Any) -> None:
    *arguments, backend = args
    problem = Problem.of(*arguments)
    _ACCUMULATE.run(backend_for(_ACCUMULATE, problem, backend), total, problem)


@torch.library.impl(library, "score_weight_grad_", "CompositeExplicitAutograd")
def _run_score(sums: Tensor, *args: Any) -> None:
    *arguments, kind, backend = args
    problem = Problem.of(*arguments)
    _SCORE.run(backend_for(_SCORE, problem, backend), sums, problem, kind)


@torch.library.register_fake("pecker_fast::accumulate_weight_grad_")
def _fake_accumulate(*args: Any) -> None:
    return None


@torch.library.register_fake("pecker_fast::score_weight_grad_")
def _fake_score(*args: Any) -> None:
    return None
