"""A mask as one tensor of bits and a header of strings; only weights with active blocks are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from pecker_fast.blocks import ParameterMask
from pecker_fast.mask import BlockMask


def active_part(mask: BlockMask) -> BlockMask:
    """The same mask without the weights that have no active block.

    Raises:
        ValueError: The mask is damaged, as ``BlockMask.check`` says.
    """
    mask.check()
    parameters = {name: parameter for name, parameter in mask.parameters.items() if parameter.numel}
    return BlockMask(parameters, mask.total, mask.density_asked, mask.mass)


def pack_mask(mask: BlockMask) -> tuple[Tensor, dict[str, str]]:
    """One bit a block, uint8, weight after weight, each from a byte of its own; and what ``unpack_mask`` needs."""
    tensors, header = mask.to_tensors()
    bits = torch.cat([torch.empty(0, dtype=torch.uint8, device="cpu"), *tensors.values()])
    return bits, header | {"bytes": json.dumps([len(tensor) for tensor in tensors.values()])}


def unpack_mask(bits: Tensor, header: Mapping[str, str]) -> BlockMask:
    """From ``pack_mask``.

    Raises:
        KeyError, ValueError, TypeError: Something is missing or does not fit together.
    """
    names, sizes = list(json.loads(header["grids"])), json.loads(header["bytes"])
    if bits.dtype != torch.uint8 or bits.shape != (sum(sizes),) or min(sizes, default=0) < 0:
        raise ValueError(f"mask: {sum(sizes)} bytes expected, got {bits.dtype} {tuple(bits.shape)}")
    return BlockMask.from_tensors(dict(zip(names, bits.split(sizes), strict=True)), header)


def overlaps(a: Mapping[str, ParameterMask], b: Mapping[str, ParameterMask]) -> list[str]:
    """Names of the weights of which both have an active weight in common."""
    return [name for name in a if name in b and _intersect(a[name], b[name])]


def _intersect(a: ParameterMask, b: ParameterMask) -> bool:
    if a.grid == b.grid:
        return bool(torch.isin(a.active, b.active).any())
    return a.grid.shape == b.grid.shape and bool((a.to_dense() & b.to_dense()).any())
