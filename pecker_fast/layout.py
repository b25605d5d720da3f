"""How the active weights of a model are laid out in one flat buffer: weight after weight, block after block."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.mask import BlockMask
from pecker_fast.ops.layout import is_channels_last


@dataclass(frozen=True)
class Entry:
    """One active parameter and its stretch of the flat buffers.

    Attributes:
        name: Name of the dense weight in the model.
        module: Name of the module that owns it.
        own: Name of the weight there.
        mask: Its active blocks.
        channels_last: Order within blocks, as in ``ParameterMask.index``.
        adopted: The weight itself is the active parameter, because its module cannot be masked.
        offset: Where its stretch begins.
    """

    name: str
    module: str
    own: str
    mask: ParameterMask
    channels_last: bool
    adopted: bool
    offset: int

    def stretch(self, flat: Tensor) -> Tensor:
        """Its part of a flat buffer."""
        return flat[self.offset : self.offset + self.mask.numel]

    def view(self, flat: Tensor) -> Tensor:
        """Its part of a flat buffer in the active parameter's shape and strides."""
        return self.shaped(self.stretch(flat))

    def shaped(self, stretch: Tensor) -> Tensor:
        """A stretch as a view of the active parameter's shape and strides."""
        shape = self.mask.compact_shape
        if self.channels_last and len(shape) == 4:
            out, in_, height, width = shape
            return stretch.view(out, height, width, in_).permute(0, 3, 1, 2)
        return stretch.view(shape)

    def flattened(self, parameter: Tensor) -> Tensor:
        """The other way: a tensor of the active parameter's shape in the order of the stretch, (numel,)."""
        permuted = self.channels_last and parameter.dim() == 4
        return (parameter.permute(0, 2, 3, 1) if permuted else parameter).reshape(-1)

    def to_dense(self, stretch: Tensor, fill: float = 0.0) -> Tensor:
        """A stretch as a new tensor of the weight's shape, in C order, with ``fill`` where nothing is active."""
        if self.mask.is_full:
            return self.shaped(stretch).clone(memory_format=torch.contiguous_format)
        dense = stretch.new_full((self.mask.grid.numel,), fill)
        dense[self.mask.index_on(stretch.device, self.channels_last)] = stretch
        return dense.view(self.mask.grid.shape)

    def of_dense(self, dense: Tensor) -> Tensor:
        """The other way: the active part of a tensor of the weight's shape in the order of the stretch, (numel,)."""
        return self.flattened(self.mask.gather(dense, self.channels_last))


def lay_out(parameters: Mapping[str, nn.Parameter], mask: BlockMask, adopted: Collection[str]) -> tuple[Entry, ...]:
    """One entry for every weight with active blocks, in the model's order.

    Args:
        parameters: The dense weights by name.
        mask: Their active blocks.
        adopted: Weights that train dense because they cannot be masked.
    """
    entries, offset = [], 0
    for name, parameter in parameters.items():
        own_mask = mask.parameters.get(name)
        if name in adopted:
            own_mask = ParameterMask.full(BlockGrid.of(tuple(parameter.shape), "row"))
        if own_mask is None or not own_mask.numel:
            continue
        module, _, own = name.rpartition(".")
        entries.append(Entry(name, module, own, own_mask, is_channels_last(parameter), name in adopted, offset))
        offset += own_mask.numel
    return tuple(entries)
