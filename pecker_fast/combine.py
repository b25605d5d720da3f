"""Masks of the same weights, combined block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from pecker_fast.blocks import BlockGrid, ParameterMask


def combine(
    first: Mapping[str, ParameterMask],
    second: Mapping[str, ParameterMask],
    rule: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, ParameterMask]:
    """The blocks for which ``rule`` of both flags holds.

    Raises:
        ValueError: The masks are not of the same weights, cut into the same blocks.
    """
    for name in dict.fromkeys((*first, *second)):
        grids = [parameters[name].grid if name in parameters else None for parameters in (first, second)]
        if grids[0] != grids[1]:
            raise ValueError(
                f"masks combine block by block, but {name} is {_cut(grids[0])} in one and {_cut(grids[1])} in the "
                f"other; make both from one model with the same block"
            )
    return {
        name: ParameterMask.of_flags(mine.grid, rule(mine.flags(), second[name].flags()))
        for name, mine in first.items()
    }


def _cut(grid: BlockGrid | None) -> str:
    return "missing" if grid is None else f"{grid.shape} in blocks of {grid.block}"
