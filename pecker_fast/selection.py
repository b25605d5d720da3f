"""Which blocks are active: ranked by saliency, exactly as many weights as were asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops.compact_active import compact_active
from pecker_fast.ops.select_threshold import select_threshold
from pecker_fast.terms import Terms

Scope: TypeAlias = Literal["global", "layer"]
"""Rank over the whole network, or within each layer (a module's weight and bias)."""


def select_blocks(
    saliency: Mapping[str, Tensor], grids: Mapping[str, BlockGrid], budget: int, terms: Terms
) -> dict[str, ParameterMask]:
    """The longest prefix of all blocks, ranked by mean saliency per weight, whose price is at most ``budget``.

    Ties go by position: the order of ``grids``, then the block's number. At least one block is selected; single
    weights with a price of 1 are selected exactly ``budget`` in number.

    Args:
        saliency: Saliency of every weight, name -> tensor of the weight's shape.
        grids: How the weights to select from are cut: some of ``terms.grids``, or all.
        budget: What may be spent, from 1.
        terms: What may be selected, at what price, and what saliency is divided by.
    """
    elements = all(grid.block == (1, 1) and grid.view[2] == 1 for grid in grids.values())
    if elements and terms.unit == "parameters":
        return _select_elements(saliency, grids, max(budget, 1), terms)
    device = _device_of([saliency[name] for name in grids])
    means = {
        name: grid.block_sums(saliency[name].detach().to(device).double()).cpu() / grid.block_numel().clamp(min=1)
        for name, grid in grids.items()
    }
    return select_ranked(means, grids, budget, terms)


def select_ranked(
    means: Mapping[str, Tensor], grids: Mapping[str, BlockGrid], budget: int, terms: Terms, *, fill: bool = False
) -> dict[str, ParameterMask]:
    """The longest prefix of all blocks in descending order of ``means`` (one value a block) within ``budget``.

    With ``fill`` blocks that are too dear for what is left are passed over instead of ending the prefix. At least one
    block is selected: where the budget has none, the first in that order alone, which is then beyond the budget.
    """
    prices = torch.cat([terms.block_prices(name) for name in grids])
    order = torch.cat([terms.worth(name, means[name]) for name in grids]).argsort(descending=True, stable=True)
    barred = torch.cat([terms.barred(name) for name in grids])
    order = order[~barred[order]]
    chosen = torch.zeros(len(prices), dtype=torch.bool, device="cpu")
    first, left = order[:1], budget
    while len(order) and int(prices[order].min()) <= left:
        fits = prices[order].cumsum(0) <= left
        chosen[order[fits]] = True
        left -= int(prices[order[fits]].sum())
        order = order[~fits]
        order = order[prices[order] <= left] if fill else order[:0]
    if not chosen.any():
        chosen[first] = True
    pieces = chosen.split([grid.num_blocks for grid in grids.values()])
    return {
        name: ParameterMask(grid, piece.nonzero().flatten())
        for (name, grid), piece in zip(grids.items(), pieces, strict=True)
    }


def select_random(terms: Terms, density: float, seed: int) -> dict[str, ParameterMask]:
    """Blocks of the whole network in random order, as many as fit within the budget, at least one."""
    blocks = [grid.num_blocks for grid in terms.grids.values()]
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(seed), device="cpu")
    ranks = dict(zip(terms.grids, order.split(blocks), strict=True))
    return select_ranked(ranks, terms.grids, terms.may_spend(density), terms, fill=True)


def _select_elements(
    saliency: Mapping[str, Tensor], grids: Mapping[str, BlockGrid], budget: int, terms: Terms
) -> dict[str, ParameterMask]:
    """Single weights: a threshold instead of a sort, then the positions of what is above it and of its first ties."""
    device = _device_of([saliency[name] for name in grids])
    values = {name: terms.worth(name, saliency[name].detach().to(device).float()) for name in grids}
    for name, barred in terms.forbidden.items():
        if name in values:
            values[name] = values[name].masked_fill(barred.view(values[name].shape).to(device), -torch.inf)
    allowed = sum(int((~terms.barred(name)).sum()) for name in grids)
    if not allowed:
        return {
            name: ParameterMask(grid, torch.zeros(0, dtype=torch.int64, device="cpu")) for name, grid in grids.items()
        }
    k = min(budget, allowed)
    threshold, ties = select_threshold(list(values.values()), k)
    index, offsets = compact_active(list(values.values()), threshold, ties, k)
    pieces = index.cpu().split(offsets.diff().tolist())
    return {name: ParameterMask(grid, piece) for (name, grid), piece in zip(grids.items(), pieces, strict=True)}


def _device_of(tensors: Sequence[Tensor]) -> torch.device:
    """Where to rank them: the one GPU that has all, so that only the resulting lists travel; else the CPU."""
    devices = {tensor.device for tensor in tensors}
    return devices.pop() if len(devices) == 1 and all(d.type == "cuda" for d in devices) else torch.device("cpu")


def select_in_scope(
    select: Callable[[Mapping[str, BlockGrid], int], dict[str, ParameterMask]],
    terms: Terms,
    density: float,
    scope: Scope,
) -> dict[str, ParameterMask]:
    """Select within the whole network, or within each layer, by its own share."""
    if scope not in ("global", "layer"):
        raise ValueError(f'scope: expected "global" or "layer", got {scope!r}')
    if scope == "global":
        return select(terms.grids, terms.may_spend(density))
    parameters: dict[str, ParameterMask] = {}
    for layer in _layers(terms.grids):
        parameters |= select(layer, terms.may_spend_on(layer, density))
    return parameters


def _layers(grids: Mapping[str, BlockGrid]) -> list[dict[str, BlockGrid]]:
    """Weights grouped by the module that owns them."""
    layers: dict[str, dict[str, BlockGrid]] = {}
    for name, grid in grids.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = grid
    return list(layers.values())
