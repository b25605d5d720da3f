"""BlockScores: one number a block instead of one a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.errors import NonFiniteError

ScoreKind: TypeAlias = Literal["abs", "square"]


@dataclass(frozen=True)
class BlockScores:
    """Gradient magnitude of every maskable block of a model, summed over its weights and over backward passes.

    Attributes:
        sums: Name of the weight -> sum of ``|g|`` or ``g**2`` over each block: float32 (num_blocks,). Grows in place.
        grids: Name of the weight -> how it is cut.
        total: Weights of the whole model, also those that cannot be masked.
        kind: "abs" or "square".
    """

    sums: Mapping[str, Tensor]
    grids: Mapping[str, BlockGrid]
    total: int
    kind: ScoreKind = "abs"

    def means(self) -> dict[str, Tensor]:
        """Mean score per weight of every block: float64 (num_blocks,), on the CPU."""
        return {
            name: self.sums[name].detach().cpu().double() / grid.block_numel().clamp(min=1)
            for name, grid in self.grids.items()
        }

    def check(self) -> None:
        """Refuse scores that rank nothing.

        Raises:
            NonFiniteError: A block's score is NaN or infinite.
            ValueError: Every block has the same.
        """
        for name, value in self.sums.items():
            bad = int((~value.isfinite()).sum())
            if bad:
                raise NonFiniteError(f"block scores of {name}: {bad} of {value.numel()} are NaN or infinite")
        means = [mean for mean in self.means().values() if mean.numel()]
        if not means or min(float(mean.min()) for mean in means) == max(float(mean.max()) for mean in means):
            raise ValueError(
                "block scores: every block has the same, so none ranks above another; was backward() called while "
                "scores were taken?"
            )

    def mass(self, parameters: Mapping[str, ParameterMask]) -> float:
        """Share of the summed magnitude that lies in active blocks; with "square" from each block's root mean."""
        active = everything = 0.0
        for name, mean in self.means().items():
            magnitude = (mean.sqrt() if self.kind == "square" else mean) * self.grids[name].block_numel()
            everything += float(magnitude.sum())
            active += float(magnitude[parameters[name].active].sum())
        return active / everything if everything else 0.0
