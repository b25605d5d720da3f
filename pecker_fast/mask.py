"""BlockMask: which weights of a model train. Plain frozen data at the centre of everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pecker_fast.block_scores import BlockScores
from pecker_fast.blocks import Block, ParameterMask
from pecker_fast.checkpoint import atomic_file, read_safetensors, write_safetensors
from pecker_fast.combine import combine
from pecker_fast.errors import FileFormatError
from pecker_fast.maskable import survey
from pecker_fast.packing import grid_of, pack, unpack
from pecker_fast.regions import Region, in_region
from pecker_fast.saliency import Saliency
from pecker_fast.selection import Scope, select_blocks, select_in_scope, select_random, select_ranked
from pecker_fast.settings import check_density
from pecker_fast.terms import Budget, Terms

FORMAT = "pecker_fast.mask"
VERSION = 1


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Active blocks of every maskable weight of a model.

    A weight of shape (out, in, *taps) is a grid of blocks of (out, in) weights over all taps; a bias or a norm is one
    block, an embedding one block a row, and an element-wise mask (SalUn's) has blocks of a single weight.

    Attributes:
        parameters: Name of the weight -> its active blocks, for every maskable weight, in the model's order.
        total: Weights of the whole model, also those that cannot be masked: what ``density`` is a share of.
        density_asked: Share of the weights that was asked for, or of their costs.
        mass: Share of the summed saliency that lies on active weights; None where there was no saliency.
    """

    parameters: Mapping[str, ParameterMask]
    total: int
    density_asked: float
    mass: float | None = None

    @classmethod
    def from_saliency(
        cls,
        saliency: Mapping[str, Tensor],
        density: float = 0.1,
        block: Block = "auto",
        scope: Scope = "global",
        exclude: Iterable[BlockMask] = (),
        *,
        region: Region = "all",
        costs: Mapping[str, float] | None = None,
        budget: Budget = "parameters",
        per_cost: bool = False,
    ) -> BlockMask:
        """The most salient blocks.

        Blocks are ranked by their mean saliency per weight, ties by position; active is the longest prefix with at most
        ``round(density * total)`` weights, at least one block. Element masks hit that number exactly.

        Args:
            saliency: Name -> saliency of every weight, of the weight's shape: from ``compute_saliency``, or any dict.
            density: Share of all weights, in (0, 1].
            block: (out, in) in weights, "row" (1, in), "element", or "auto": 64 x 64 where both sides have 128 channels
                or more, rows elsewhere.
            scope: "global" ranks over the whole network, "layer" within each layer (a module's weight and bias).
            exclude: Masks whose weights are left alone: blocks that share a weight with one of them are not selected,
                so that what is trained under this mask and under those is disjoint.
            region: Where the blocks may lie: "all", "encoder", "middle" or "decoder" of a UNet, or a tuple of prefixes
                of weight names. ``density`` stays a share of the whole model.
            costs: Name -> what one active weight costs, in any unit: ``weight_gradient_flops`` has FLOPs.
            budget: "parameters", or "costs": ``density`` is then the share of the summed costs of all maskable weights,
                and active is the longest prefix whose costs have a sum within it.
            per_cost: Rank by mean saliency per weight divided by what a weight costs.

        Raises:
            ValueError: An argument is out of range; saliency that is empty, not finite, or all equal (it ranks
                nothing); every block excluded; a region that the model has not, or that holds less than ``density``;
                costs that are missing, not positive, or given to no purpose.
        """
        check_density(density)
        if not isinstance(saliency, Saliency):
            saliency = Saliency(saliency)
        saliency.check()
        excluded = (mask.parameters for mask in exclude)
        terms = Terms.of(saliency.grids(block), saliency.total, excluded, region, costs, budget, per_cost)
        parameters = select_in_scope(partial(select_blocks, saliency, terms=terms), terms, density, scope)
        return cls(parameters, saliency.total, density, saliency.mass(parameters))

    @classmethod
    def from_block_scores(
        cls,
        scores: BlockScores,
        density: float = 0.1,
        scope: Scope = "global",
        exclude: Iterable[BlockMask] = (),
        *,
        region: Region = "all",
        costs: Mapping[str, float] | None = None,
        budget: Budget = "parameters",
        per_cost: bool = False,
    ) -> BlockMask:
        """The blocks with the highest mean score per weight; as ``from_saliency``, without a value for every weight.

        ``scores`` come from ``score_blocks``; the rest is as there.

        Raises:
            ValueError: As ``from_saliency``.
        """
        check_density(density)
        scores.check()
        excluded = (mask.parameters for mask in exclude)
        terms = Terms.of(scores.grids, scores.total, excluded, region, costs, budget, per_cost)
        parameters = select_in_scope(partial(select_ranked, scores.means(), terms=terms), terms, density, scope)
        return cls(parameters, scores.total, density, scores.mass(parameters))

    @classmethod
    def random(
        cls,
        model: nn.Module,
        density: float = 0.1,
        block: Block = "auto",
        seed: int = 0,
        exclude: Iterable[BlockMask] = (),
        *,
        region: Region = "all",
        costs: Mapping[str, float] | None = None,
        budget: Budget = "parameters",
    ) -> BlockMask:
        """The control: blocks in random order, as many as fit within the budget. The same for the same seed.

        ``exclude`` and all that follows are as in ``from_saliency``.

        Raises:
            ValueError: As ``from_saliency``, or no maskable weight.
        """
        check_density(density)
        found = survey(model)
        excluded = (mask.parameters for mask in exclude)
        terms = Terms.of(found.grids(block), found.total, excluded, region, costs, budget)
        return cls(select_random(terms, density, seed), found.total, density)

    @classmethod
    def dense(cls, model: nn.Module, region: Region = "all") -> BlockMask:
        """Every maskable weight active, of the whole model (ordinary training) or of a region of it.

        Raises:
            ValueError: No maskable weight, or a region without any.
        """
        found = survey(model)
        inside = in_region(found.maskable, region)
        grids, nothing = found.grids("row"), torch.zeros(0, dtype=torch.int64, device="cpu")
        parameters = {n: ParameterMask.full(g) if n in inside else ParameterMask(g, nothing) for n, g in grids.items()}
        density = sum(parameter.numel for parameter in parameters.values()) / found.total
        return cls(parameters, found.total, 1.0 if region == "all" else density, 1.0 if region == "all" else None)

    # -- combined ----------------------------------------------------------------------------------

    def union(self, other: BlockMask) -> BlockMask:
        """Blocks that are active in either mask; also ``a | b``.

        Raises:
            ValueError: The masks are not of the same weights, cut into the same blocks.
        """
        return self._combine(other, torch.logical_or)

    def intersection(self, other: BlockMask) -> BlockMask:
        """Blocks that are active in both masks; also ``a & b``.

        Raises:
            ValueError: The masks are not of the same weights, cut into the same blocks.
        """
        return self._combine(other, torch.logical_and)

    def difference(self, other: BlockMask) -> BlockMask:
        """Blocks that are active in this mask and not in the other; also ``a - b``.

        Raises:
            ValueError: The masks are not of the same weights, cut into the same blocks.
        """
        return self._combine(other, lambda a, b: a & ~b)

    def complement(self) -> BlockMask:
        """The maskable blocks that are not active; also ``~a``."""
        return self._combine(self, lambda a, _: ~a)

    __or__, __and__, __sub__, __invert__ = union, intersection, difference, complement

    def _combine(self, other: BlockMask, rule: Callable[[Tensor, Tensor], Tensor]) -> BlockMask:
        parameters = combine(self.parameters, other.parameters, rule)
        density = sum(parameter.numel for parameter in parameters.values()) / self.total
        return BlockMask(parameters, self.total, density)

    @property
    def numel(self) -> int:
        """Active weights."""
        return sum(parameter.numel for parameter in self.parameters.values())

    @property
    def density(self) -> float:
        """Share of the model's weights that came out active."""
        return self.numel / self.total

    @property
    def layer_densities(self) -> dict[str, float]:
        """Name of every maskable weight -> active share of it."""
        return {name: parameter.density for name, parameter in self.parameters.items()}

    def to_dense(self, name: str) -> Tensor:
        """Mask of one weight as booleans of its shape.

        Raises:
            KeyError: No such weight.
        """
        if name not in self.parameters:
            raise KeyError(f"no weight {name!r} in this mask; it has {', '.join(list(self.parameters)[:5])}, ...")
        return self.parameters[name].to_dense()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        return dict(self.parameters) == dict(other.parameters) and self.total == other.total

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        active = sum(1 for parameter in self.parameters.values() if parameter.numel)
        return (
            f"BlockMask({self.numel:,} of {self.total:,} weights active: density {self.density:.4f}, asked "
            f"{self.density_asked:g}; {active} of {len(self.parameters)} maskable weights have active blocks)"
        )

    def summary(self) -> str:
        """Density of every weight, one line each."""
        lines = [repr(self)]
        for name, parameter in self.parameters.items():
            blocks = f"{len(parameter.active)}/{parameter.grid.num_blocks} blocks of {parameter.grid.block}"
            lines.append(f"  {name:<40} {parameter.density:7.2%}  {blocks}")
        return "\n".join(lines)

    def check(self) -> None:
        """Refuse a mask that was put together or changed by hand, and wrongly.

        Raises:
            ValueError: Blocks of a weight are out of order, twice or out of range, or its grid is none.
        """
        for name, parameter in self.parameters.items():
            try:
                parameter.check()
            except ValueError as error:
                raise ValueError(f"damaged mask: {name}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as safetensors: one bit a block, and its geometry as JSON in the header.

        Args:
            path: The file. An older mask of that name is replaced, anything else stays.

        Raises:
            FileFormatError: The file cannot be written, or there is one of that name that is no mask; nothing is left
                behind.
            ValueError: The mask is damaged, as ``check`` says.
        """
        if os.path.lexists(path):
            BlockMask.load(path)
        with atomic_file(path) as unfinished:
            write_safetensors(unfinished, *self.to_tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlockMask:
        """Read a mask that ``save`` wrote.

        Raises:
            FileFormatError: The file is missing, truncated, or not a mask.
        """
        tensors, header = read_safetensors(path)
        if header.get("format") != FORMAT or header.get("version") != str(VERSION):
            raise FileFormatError(
                f"{path}: expected a mask ({FORMAT} version {VERSION}), got a file with format "
                f"{header.get('format', 'unknown')!r} version {header.get('version', 'unknown')!r}"
            )
        try:
            return cls.from_tensors(tensors, header)
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise FileFormatError(f"{path}: damaged mask: {error!r}; save it again") from error

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """One bit a block, uint8 a weight, and everything else as strings: what ``save`` writes.

        Raises:
            ValueError: The mask is damaged, as ``check`` says.
        """
        self.check()
        grids = {name: (p.grid.shape, p.grid.view, p.grid.block) for name, p in self.parameters.items()}
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "grids": json.dumps(grids),
            "total": str(self.total),
            "density_asked": repr(self.density_asked),
            "mass": "" if self.mass is None else repr(self.mass),
        }
        return {name: pack(parameter) for name, parameter in self.parameters.items()}, header

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> BlockMask:
        """From ``to_tensors``.

        Raises:
            KeyError, ValueError, TypeError: Something is missing or does not fit together.
        """
        grids = {name: grid_of(*fields) for name, fields in json.loads(header["grids"]).items()}
        parameters = {name: unpack(tensors[name], grid) for name, grid in grids.items()}
        mass = float(header["mass"]) if header["mass"] else None
        return cls(parameters, int(header["total"]), float(header["density_asked"]), mass)
