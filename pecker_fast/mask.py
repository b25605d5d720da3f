"""BlockMask: which weights of a model train. Plain frozen data at the centre of everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pecker_fast.blocks import Block, BlockGrid, ParameterMask
from pecker_fast.checkpoint import atomic_file, read_safetensors, write_safetensors
from pecker_fast.config import check_density
from pecker_fast.errors import FileFormatError
from pecker_fast.maskable import survey
from pecker_fast.saliency import Saliency
from pecker_fast.selection import select_blocks, select_ranked

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
        density_asked: Share of the weights that was asked for.
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
        scope: Literal["global", "layer"] = "global",
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

        Raises:
            ValueError: ``density`` or ``block`` out of range, or saliency that is empty, not finite, or all equal: it
                ranks nothing.
        """
        check_density(density)
        if scope not in ("global", "layer"):
            raise ValueError(f'scope: expected "global" or "layer", got {scope!r}')
        if not isinstance(saliency, Saliency):
            saliency = Saliency(saliency)
        saliency.check()
        grids = saliency.grids(block)
        if scope == "global":
            parameters = select_blocks(saliency, grids, round(density * saliency.total))
        else:
            parameters = {}
            for layer in _layers(grids):
                weights = sum(grid.numel for grid in layer.values())
                parameters |= select_blocks(saliency, layer, round(density * weights))
        return cls(parameters, saliency.total, density, saliency.mass(parameters))

    @classmethod
    def random(cls, model: nn.Module, density: float = 0.1, block: Block = "auto", seed: int = 0) -> BlockMask:
        """The control: blocks in random order, as many as fit within the density. The same for the same seed.

        Raises:
            ValueError: ``density`` or ``block`` out of range, or a model without a maskable weight.
        """
        check_density(density)
        found = survey(model)
        grids = found.grids(block)
        generator = torch.Generator().manual_seed(seed)
        ranks = torch.randperm(sum(grid.num_blocks for grid in grids.values()), generator=generator)
        pieces = dict(zip(grids, ranks.split([grid.num_blocks for grid in grids.values()]), strict=True))
        return cls(select_ranked(pieces, grids, round(density * found.total), fill=True), found.total, density)

    @classmethod
    def dense(cls, model: nn.Module) -> BlockMask:
        """Every maskable weight active: ordinary training."""
        found = survey(model)
        grids = found.grids("row")
        return cls({name: ParameterMask.full(grid) for name, grid in grids.items()}, found.total, 1.0, 1.0)

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as safetensors: one bit a block, and its geometry as JSON in the header.

        Raises:
            FileFormatError: The file cannot be written; nothing is left behind.
        """
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
        except (KeyError, ValueError, TypeError) as error:
            raise FileFormatError(f"{path}: damaged mask: {error!r}; save it again") from error

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """One bit a block, uint8 a weight, and everything else as strings: what ``save`` writes."""
        grids = {name: (p.grid.shape, p.grid.view, p.grid.block) for name, p in self.parameters.items()}
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "grids": json.dumps(grids),
            "total": str(self.total),
            "density_asked": repr(self.density_asked),
            "mass": "" if self.mass is None else repr(self.mass),
        }
        return {name: _pack(parameter) for name, parameter in self.parameters.items()}, header

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> BlockMask:
        """From ``to_tensors``.

        Raises:
            KeyError, ValueError, TypeError: Something is missing or does not fit together.
        """
        grids = {name: _grid(*fields) for name, fields in json.loads(header["grids"]).items()}
        parameters = {name: _unpack(tensors[name], grid) for name, grid in grids.items()}
        mass = float(header["mass"]) if header["mass"] else None
        return cls(parameters, int(header["total"]), float(header["density_asked"]), mass)


def _layers(grids: Mapping[str, BlockGrid]) -> list[dict[str, BlockGrid]]:
    """Weights grouped by the module that owns them."""
    layers: dict[str, dict[str, BlockGrid]] = {}
    for name, grid in grids.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = grid
    return list(layers.values())


def _pack(parameter: ParameterMask) -> Tensor:
    bits = np.zeros(parameter.grid.num_blocks, dtype=np.uint8)
    bits[parameter.active.numpy()] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def _unpack(packed: Tensor, grid: BlockGrid) -> ParameterMask:
    if packed.dtype != torch.uint8 or packed.shape != (-(-grid.num_blocks // 8),):
        raise ValueError(f"{grid.num_blocks} blocks as bits, got {packed.dtype} {tuple(packed.shape)}")
    bits = np.unpackbits(packed.numpy(), bitorder="little")
    if bits[grid.num_blocks :].any():
        raise ValueError("bits beyond the last block")
    return ParameterMask(grid, torch.from_numpy(bits[: grid.num_blocks].nonzero()[0]))


def _grid(shape: Any, view: Any, block: Any) -> BlockGrid:
    grid = BlockGrid(tuple(shape), tuple(view), tuple(block))
    sizes = (*grid.shape, *grid.view, *grid.block)
    if len(grid.view) != 3 or len(grid.block) != 2 or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise ValueError(f"not a grid: {shape}, {view}, {block}")
    if grid.view[0] * grid.view[1] * grid.view[2] != grid.numel or min(grid.block) < 1:
        raise ValueError(f"view {grid.view} and block {grid.block} do not fit shape {grid.shape}")
    return grid
