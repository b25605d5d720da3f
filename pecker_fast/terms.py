"""On what terms blocks are selected: which may be, what they cost, and what their saliency is measured against."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.regions import Region, in_region

Budget: TypeAlias = Literal["parameters", "costs"]
"""What the density is a share of: the number of the model's weights, or the summed cost of its maskable ones."""

PRICE_BITS = 52
"""All prices together fit in so many: sums are exact then, and so is their product with a density of 1."""


@dataclass(frozen=True)
class Terms:
    """What a selection keeps to. Prices are integers, so that whether a block still fits never depends on rounding.

    Attributes:
        grids: How every maskable weight is cut.
        whole: Price of everything: what the density is a share of.
        unit: What prices are in: a weight each, or costs.
        region: Where blocks may lie, as it was asked for.
        forbidden: Blocks that are never selected, name -> bool (num_blocks,); weights that are not named have none.
        prices: Name -> price of one active weight; 1 where the budget is one of weights.
        divisors: Name -> what mean saliency is divided by before blocks are ranked; empty if by nothing.
    """

    grids: Mapping[str, BlockGrid]
    whole: int
    unit: Budget
    region: Region
    forbidden: Mapping[str, Tensor]
    prices: Mapping[str, int]
    divisors: Mapping[str, float]

    @classmethod
    def of(
        cls,
        grids: Mapping[str, BlockGrid],
        total: int,
        exclude: Iterable[Mapping[str, ParameterMask]] = (),
        region: Region = "all",
        costs: Mapping[str, float] | None = None,
        budget: Budget = "parameters",
        per_cost: bool = False,
    ) -> Terms:
        """From what ``BlockMask.from_saliency`` takes; ``total`` is the number of weights of the whole model.

        Raises:
            ValueError: Something is out of range or missing, or nothing is left to select.
        """
        known = _checked(costs, grids, budget, per_cost)
        forbidden = _touched(grids, exclude)
        inside = in_region(grids, region)
        forbidden |= {
            n: torch.ones(g.num_blocks, dtype=torch.bool, device="cpu") for n, g in grids.items() if n not in inside
        }
        prices = _prices(known, grids) if budget == "costs" else dict.fromkeys(grids, 1)
        whole = sum(prices[n] * g.numel for n, g in grids.items()) if budget == "costs" else total
        divisors = _scaled(known, -math.frexp(max(known.values()))[1]) if per_cost else {}
        return cls(grids, whole, budget, region, forbidden, prices, divisors)

    def may_spend(self, density: float) -> int:
        """The budget of the whole network.

        Raises:
            ValueError: The region has not as much.
        """
        asked, available = round(density * self.whole), sum(self._available.values())
        if self.region != "all" and available < max(asked, 1):
            share = math.floor(available / self.whole * 1e6) / 1e6  # what is printed can be asked for
            what = "weights" if self.unit == "parameters" else "costs"
            raise ValueError(
                f"region {self.region!r} holds {share:g} of the model's {what}, less what is excluded, and density "
                f"{density:g} was asked for; lower the density or widen the region"
            )
        return asked

    def may_spend_on(self, layer: Mapping[str, BlockGrid], density: float) -> int:
        """A layer's own share of it: of all that it has, or of what it has in the region.

        Raises:
            ValueError: The region has not as much.
        """
        if self.region == "all":
            return round(density * sum(self.prices[name] * grid.numel for name, grid in layer.items()))
        available = sum(self._available[name] for name in layer)
        return round(self.may_spend(density) * available / sum(self._available.values()))

    def barred(self, name: str) -> Tensor:
        """Which blocks of a weight are never selected: bool (num_blocks,)."""
        if name in self.forbidden:
            return self.forbidden[name]
        return torch.zeros(self.grids[name].num_blocks, dtype=torch.bool, device="cpu")

    def block_prices(self, name: str) -> Tensor:
        """Price of every block of a weight: int64 (num_blocks,)."""
        return self.grids[name].block_numel() * self.prices[name]

    def worth(self, name: str, saliency: Tensor) -> Tensor:
        """What the saliency of a weight, or the mean saliencies of its blocks, are ranked as."""
        return saliency / self.divisors[name] if self.divisors else saliency

    @cached_property
    def _available(self) -> dict[str, int]:
        """Name -> price of what may be selected of it."""
        return {name: int(self.block_prices(name)[~self.barred(name)].sum()) for name in self.grids}


def _checked(
    costs: Mapping[str, float] | None, grids: Mapping[str, BlockGrid], budget: Budget, per_cost: bool
) -> dict[str, float]:
    """The costs of these weights, if they are wanted."""
    if budget not in ("parameters", "costs"):
        raise ValueError(f'budget: expected "parameters" or "costs", got {budget!r}')
    wanted = budget == "costs" or per_cost
    if costs is None:
        if wanted:
            raise ValueError(
                "costs: expected what a weight costs, by name, because budget='costs' or per_cost=True asks for it, "
                "got None; weight_gradient_flops returns FLOPs"
            )
        return {}
    if not wanted:
        raise ValueError("costs: nothing asks for them; say budget='costs' or per_cost=True, or leave them out")
    for name in grids:
        if name not in costs:
            raise ValueError(
                f"costs: expected one for every maskable weight, got none for {name}; if no forward pass reaches it, "
                f"give it one of your choice"
            )
        if not (costs[name] > 0 and math.isfinite(costs[name])):
            raise ValueError(f"costs[{name!r}]: expected a positive number, got {costs[name]}")
    return {name: float(costs[name]) for name in grids}


def _prices(costs: Mapping[str, float], grids: Mapping[str, BlockGrid]) -> dict[str, int]:
    """Costs as integers, in the smallest unit (a power of two) that keeps their sum over all weights within bounds."""
    total = sum(cost * grids[name].numel for name, cost in costs.items())
    if not math.isfinite(total):
        raise ValueError(f"costs: expected numbers with a finite sum over all weights, got {total}")
    return {name: max(1, round(cost)) for name, cost in _scaled(costs, PRICE_BITS - math.frexp(total)[1]).items()}


def _scaled(costs: Mapping[str, float], exponent: int) -> dict[str, float]:
    """Times a power of two, which rounds nothing."""
    return {name: math.ldexp(cost, exponent) for name, cost in costs.items()}


def _touched(grids: Mapping[str, BlockGrid], exclude: Iterable[Mapping[str, ParameterMask]]) -> dict[str, Tensor]:
    """Blocks that share a weight with one of ``exclude``: name -> bool (num_blocks,), for weights with some."""
    forbidden: dict[str, Tensor] = {}
    for parameters in exclude:
        for name, parameter in parameters.items():
            if parameter.numel and name in grids:
                blocks = _shared_blocks(grids[name], parameter)
                forbidden[name] = blocks | forbidden.get(name, blocks)
    if forbidden and all(name in forbidden and bool(forbidden[name].all()) for name in grids):
        raise ValueError("exclude: the masks to leave alone touch every block, so nothing is left to select")
    return forbidden


def _shared_blocks(grid: BlockGrid, other: ParameterMask) -> Tensor:
    """Blocks of ``grid`` that share a weight with ``other``, however that one is cut: bool (num_blocks,)."""
    if other.grid == grid:
        return other.flags()
    return grid.block_sums(other.to_dense().float()) > 0
