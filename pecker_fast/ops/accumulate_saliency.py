"""Running saliency from gradients: signed sum (SalUn), magnitude or square, per weight or per block."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pecker_fast.blocks import BlockGrid
from pecker_fast.ops.dispatch import Backend, Op, library

Accumulate: TypeAlias = Literal["signed_sum", "abs", "square"]


def accumulate_saliency_(
    total: Tensor,
    grad: Tensor,
    accumulate: Accumulate = "signed_sum",
    *,
    grid: BlockGrid | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add one gradient to a running saliency, in place.

    In plain torch: ``total += f(grad)`` with f(g) = g, ``|g|`` or ``g**2``; with ``grid`` its sum over each block.
    The signed sum is SalUn's: its magnitude is taken once, at the end (Fan et al. 2024, arXiv 2310.12508).

    Args:
        total: Running sums, float32 or float64: of ``grad``'s shape, or (num_blocks,) with ``grid``. Changed.
        grad: Gradient of one weight, any float dtype.
        accumulate: "signed_sum", "abs" or "square".
        grid: Blocks to sum over; None keeps one saliency per weight.
        backend: Name of a backend, or None for the best one.

    Returns:
        ``total``.

    Raises:
        ValueError: Unknown ``accumulate``, shapes that do not fit, or a ``total`` narrower than float32.
    """
    if accumulate not in get_args(Accumulate):
        raise ValueError(
            f"accumulate_saliency_: accumulate must be one of {', '.join(get_args(Accumulate))}, got {accumulate!r}"
        )
    expected = grad.shape if grid is None else (grid.num_blocks,)
    if tuple(total.shape) != tuple(expected) or (grid is not None and tuple(grad.shape) != grid.shape):
        raise ValueError(
            f"accumulate_saliency_: expected total of shape {tuple(expected)} for grad of shape {tuple(grad.shape)}"
            f"{'' if grid is None else f' cut as {grid.shape}'}, got {tuple(total.shape)}"
        )
    if total.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"accumulate_saliency_: total must be float32 or float64, got {total.dtype}")
    view, block = (None, None) if grid is None else (grid.view, grid.block)
    torch.ops.pecker_fast.accumulate_saliency_(total, grad, accumulate, view, block, backend)
    return total


def accumulate_saliency_reference_(
    total: Tensor, grad: Tensor, accumulate: str, view: list[int] | None, block: list[int] | None
) -> None:
    """Plain-torch twin of ``accumulate_saliency_``."""
    grad = grad.to(total.dtype)
    if accumulate == "abs":
        grad = grad.abs()
    elif accumulate == "square":
        grad = grad.square()
    if view is not None and block is not None:
        out, in_, taps = view
        grad = BlockGrid(tuple(grad.shape), (out, in_, taps), (block[0], block[1])).block_sums(grad)
    total.add_(grad)


_OP = Op("accumulate_saliency_", {"reference": Backend(accumulate_saliency_reference_)})

library.define(
    "accumulate_saliency_(Tensor(a!) total, Tensor grad, str accumulate, int[]? view, int[]? block, str? backend) -> ()"
)


@torch.library.impl(library, "accumulate_saliency_", "CompositeExplicitAutograd")
def _run(
    total: Tensor, grad: Tensor, accumulate: str, view: list[int] | None, block: list[int] | None, backend: str | None
) -> None:
    _OP.run(_OP.choose(total.device, backend), total, grad, accumulate, view, block)


@torch.library.register_fake("pecker_fast::accumulate_saliency_")
def _fake(
    total: Tensor, grad: Tensor, accumulate: str, view: list[int] | None, block: list[int] | None, backend: str | None
) -> None:
    return None
