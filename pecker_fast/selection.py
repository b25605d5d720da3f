"""Which blocks are active: ranked by saliency, exactly as many weights as were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops.compact_active import compact_active
from pecker_fast.ops.select_threshold import select_threshold

Scope: TypeAlias = Literal["global", "layer"]
"""Rank over the whole network, or within each layer (a module's weight and bias)."""


def select_blocks(
    saliency: Mapping[str, Tensor],
    grids: Mapping[str, BlockGrid],
    budget: int,
    forbidden: Mapping[str, Tensor] | None = None,
) -> dict[str, ParameterMask]:
    """The longest prefix of all blocks, ranked by mean saliency per weight, that has at most ``budget`` weights.

    Ties go by position: the order of ``grids``, then the block's number. At least one block is selected; single
    weights are selected exactly ``budget`` in number.

    Args:
        saliency: Saliency of every weight, name -> tensor of the weight's shape.
        grids: How every weight is cut.
        budget: Weights to select, from 1.
        forbidden: Blocks that are never selected, name -> bool (num_blocks,); weights that are not named have none.
    """
    forbidden = forbidden or {}
    if all(grid.block == (1, 1) and grid.view[2] == 1 for grid in grids.values()):
        return _select_elements(saliency, grids, max(budget, 1), forbidden)
    device = _device_of([saliency[name] for name in grids])
    means = {
        name: grid.block_sums(saliency[name].detach().to(device).double()).cpu() / grid.block_numel().clamp(min=1)
        for name, grid in grids.items()
    }
    return select_ranked(means, grids, budget, forbidden=forbidden)


def select_ranked(
    ranks: Mapping[str, Tensor],
    grids: Mapping[str, BlockGrid],
    budget: int,
    *,
    fill: bool = False,
    forbidden: Mapping[str, Tensor] | None = None,
) -> dict[str, ParameterMask]:
    """The longest prefix of all blocks in descending order of ``ranks`` (one value a block) within ``budget`` weights.

    With ``fill`` blocks that are too large for what is left are passed over instead of ending the prefix.
    """
    sizes = torch.cat([grid.block_numel() for grid in grids.values()])
    order = torch.cat([ranks[name] for name in grids]).argsort(descending=True, stable=True)
    barred = torch.cat([_barred(name, grid, forbidden or {}) for name, grid in grids.items()])
    order = order[~barred[order]]
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[order[:1]] = True  # at least one block, whatever the budget
    left = budget
    while len(order) and int(sizes[order].min()) <= left:
        fits = sizes[order].cumsum(0) <= left
        chosen[order[fits]] = True
        left -= int(sizes[order[fits]].sum())
        order = order[~fits]
        order = order[sizes[order] <= left] if fill else order[:0]
    pieces = chosen.split([grid.num_blocks for grid in grids.values()])
    return {
        name: ParameterMask(grid, piece.nonzero().flatten())
        for (name, grid), piece in zip(grids.items(), pieces, strict=True)
    }


def _select_elements(
    saliency: Mapping[str, Tensor], grids: Mapping[str, BlockGrid], budget: int, forbidden: Mapping[str, Tensor]
) -> dict[str, ParameterMask]:
    """Single weights: a threshold instead of a sort, then the positions of what is above it and of its first ties."""
    device = _device_of([saliency[name] for name in grids])
    values = {name: saliency[name].detach().to(device).float() for name in grids}
    for name, barred in forbidden.items():
        if name in values:
            values[name] = values[name].masked_fill(barred.view(values[name].shape).to(device), -torch.inf)
    allowed = sum(v.numel() - int(_barred(name, grids[name], forbidden).sum()) for name, v in values.items())
    if not allowed:
        return {name: ParameterMask(grid, torch.zeros(0, dtype=torch.int64)) for name, grid in grids.items()}
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
    grids: Mapping[str, BlockGrid],
    density: float,
    scope: Scope,
    total: int,
) -> dict[str, ParameterMask]:
    """Select within the whole network, or within each layer, by its own share of the weights."""
    if scope not in ("global", "layer"):
        raise ValueError(f'scope: expected "global" or "layer", got {scope!r}')
    if scope == "global":
        return select(grids, round(density * total))
    parameters: dict[str, ParameterMask] = {}
    for layer in _layers(grids):
        parameters |= select(layer, round(density * sum(grid.numel for grid in layer.values())))
    return parameters


def forbidden_blocks(
    grids: Mapping[str, BlockGrid], exclude: Iterable[Mapping[str, ParameterMask]]
) -> dict[str, Tensor]:
    """Blocks that share a weight with one of ``exclude``: name -> bool (num_blocks,), for weights with some."""
    forbidden: dict[str, Tensor] = {}
    for parameters in exclude:
        for name, parameter in parameters.items():
            if parameter.numel and name in grids:
                blocks = _excluded_blocks(grids[name], parameter)
                forbidden[name] = blocks | forbidden.get(name, blocks)
    if forbidden and all(name in forbidden and bool(forbidden[name].all()) for name in grids):
        raise ValueError("exclude: the masks to leave alone touch every block, so nothing is left to select")
    return forbidden


def _layers(grids: Mapping[str, BlockGrid]) -> list[dict[str, BlockGrid]]:
    """Weights grouped by the module that owns them."""
    layers: dict[str, dict[str, BlockGrid]] = {}
    for name, grid in grids.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = grid
    return list(layers.values())


def _excluded_blocks(grid: BlockGrid, other: ParameterMask) -> Tensor:
    """Blocks of ``grid`` that share a weight with ``other``, however that one is cut: bool (num_blocks,)."""
    if other.grid == grid:
        return other.flags()
    return grid.block_sums(other.to_dense().float()) > 0


def _barred(name: str, grid: BlockGrid, forbidden: Mapping[str, Tensor]) -> Tensor:
    return forbidden[name] if name in forbidden else torch.zeros(grid.num_blocks, dtype=torch.bool)
