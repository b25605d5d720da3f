"""Scores of all blocks, active or not, out of ordinary backward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from pecker_fast.active import ActiveParameters
from pecker_fast.block_scores import BlockScores, ScoreKind
from pecker_fast.blocks import Block, BlockGrid
from pecker_fast.layers import MaskedLayer, mask_layer, unmask_layer
from pecker_fast.maskable import survey


@contextmanager
def score_blocks(model: nn.Module, block: Block | None = None, kind: ScoreKind = "abs") -> Iterator[BlockScores]:
    """Within the block every backward pass through ``model`` also scores all its blocks, frozen ones included.

    In plain torch, for every maskable weight: ``scores += block_sums(weight.grad.abs())``. The gradient of one weight
    at a time exists and is dropped as soon as it is summed; no dense gradient is kept. Gradients of weights that train
    come out as always, so a training step and its scores are one pass. Forward and backward belong within the block::

        with score_blocks(model) as scores:
            loss_fn(model(x)).backward()
        mask = BlockMask.from_block_scores(scores, density=0.1)

    Args:
        model: Masked or not. While the block lasts, its maskable layers are masked layers.
        block: How weights are cut; None is "auto". A masked model is scored in the blocks of its mask: leave it out.
        kind: "abs" sums ``|g|``, "square" ``g**2``.

    Yields:
        The scores, which grow with every backward pass.

    Raises:
        ValueError: ``block`` or ``kind`` is none of these, a masked model and a ``block``, or nothing is maskable.
    """
    if kind not in ("abs", "square"):
        raise ValueError(f'kind: expected "abs" or "square", got {kind!r}')
    grids, total = _grids(model, block)
    parameters = dict(model.named_parameters())
    sums = {
        name: torch.zeros(grid.num_blocks, dtype=torch.float32, device=parameters[name].device)
        for name, grid in grids.items()
    }
    swapped, layers = [], {name.rpartition(".")[0] for name in grids}
    try:
        for layer in layers:
            module = model.get_submodule(layer)
            if not isinstance(module, MaskedLayer):
                mask_layer(module, {}, {})
                swapped.append(module)
            prefix = f"{layer}." if layer else ""
            owned = {own: prefix + own for own in ("weight", "bias") if prefix + own in grids}
            cast(MaskedLayer, module).scored = {own: (sums[n], grids[n], kind) for own, n in owned.items()}
        yield BlockScores(sums, grids, total, kind)
    finally:
        for layer in layers:
            vars(model.get_submodule(layer)).pop("scored", None)
        for module in swapped:
            unmask_layer(module)


def _grids(model: nn.Module, block: Block | None) -> tuple[dict[str, BlockGrid], int]:
    """How every maskable weight is cut, and the weights of the whole model."""
    if not any(isinstance(module, MaskedLayer) for module in model.modules()):
        found = survey(model)
        return found.grids(block or "auto"), found.total
    active = ActiveParameters.of(model)
    if block is not None:
        raise ValueError("block: a masked model is scored in the blocks of its mask; leave it out")
    return {name: parameter.grid for name, parameter in active.mask.parameters.items()}, active.mask.total
