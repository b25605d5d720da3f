"""Masks that a saliency mask has to beat: as many weights elsewhere, and as many of each layer by chance."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pecker_fast.blocks import ParameterMask
from pecker_fast.selection import select_random
from pecker_fast.terms import Terms


def random_outside(
    parameters: Mapping[str, ParameterMask], terms: Terms, density: float, seed: int
) -> dict[str, ParameterMask]:
    """Blocks in random order from those that ``parameters`` left, as many as fit within the budget.

    Where less is left than the budget, that is the complement of the mask.

    Args:
        parameters: The mask; ``terms`` must bar its blocks (``exclude`` of ``Terms.of``).
        terms: What may be selected, and at what price.
        density: Of the budget.
        seed: Of the order.

    Raises:
        ValueError: ``terms`` lets blocks of the mask be selected again.
    """
    for name, parameter in parameters.items():
        if parameter.numel and not bool(terms.barred(name)[parameter.active].all()):
            raise ValueError(f"random_outside: {name}: expected terms that bar the mask's own blocks")
    return select_random(terms, density, seed)


def random_within_layers(parameters: Mapping[str, ParameterMask], terms: Terms, seed: int) -> dict[str, ParameterMask]:
    """Of every weight as many blocks as ``parameters`` has of it, by chance: its densities, and nothing else.

    Args:
        parameters: The mask.
        terms: Which blocks may be selected.
        seed: Of the choice.
    """
    rng = torch.Generator().manual_seed(seed)
    chosen = {}
    for name, parameter in parameters.items():
        order = torch.randperm(parameter.grid.num_blocks, generator=rng, device="cpu")
        allowed = order[~terms.barred(name)[order]]
        chosen[name] = ParameterMask(parameter.grid, allowed[: len(parameter.active)].sort().values)
    return chosen
