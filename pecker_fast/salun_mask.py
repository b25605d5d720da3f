"""Masks of single weights: from tensors of zeros and ones, as SalUn writes them (``with_0.5.pt``)."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from pecker_fast.blocks import ParameterMask
from pecker_fast.errors import FileFormatError
from pecker_fast.mask import BlockMask
from pecker_fast.maskable import survey
from pecker_fast.models.published_names import NULL, build, infer_architecture, to_own_names
from pecker_fast.torch_file import read_torch, weights_of


def element_mask(masks: Mapping[str, Tensor], model: nn.Module) -> BlockMask:
    """A mask of single weights; the plain-torch equivalent is ``gradient *= masks[name]`` for every weight.

    Args:
        masks: Name -> zeros and ones of the weight's shape, of any dtype, for every maskable weight of ``model``.
        model: The network that they were made for; nothing in it is changed.

    Returns:
        The mask, with blocks of one weight; ``density_asked`` is the density that it has.

    Raises:
        ValueError: A name is missing or foreign, a shape is another, a value is neither 0 nor 1, or no value is 1.
    """
    found = survey(model)
    missing, foreign = sorted(found.maskable.keys() - masks.keys()), sorted(masks.keys() - found.maskable.keys())
    if missing or foreign:
        raise ValueError(
            f"expected a mask for each of the {len(found.maskable)} weights of {type(model).__name__}: {len(missing)} "
            f"missing (first: {missing[:1]}), {len(foreign)} unknown (first: {foreign[:1]})"
        )
    grids = found.grids("element")
    parameters = {
        name: ParameterMask.of_flags(grid, _flags(name, masks[name], grid.shape)) for name, grid in grids.items()
    }
    active = sum(parameter.numel for parameter in parameters.values())
    if not active:
        raise ValueError("no value is 1: nothing would train under this mask")
    return BlockMask(parameters, found.total, active / found.total)


def load_salun_mask(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, image_size: int | None = None
) -> BlockMask:
    """Read a mask that SalUn or SFD wrote for their DDPM: a dict from names to zeros and ones.

    Names may begin with ``module.``; the null vector's mask becomes that of the last row of ``classes_emb``. No code in
    the file is run.

    Args:
        path: The file, such as ``with_0.5.pt``.
        model: The network that it is for; None takes the `DDPMUNet` that its names and shapes are those of.
        image_size: As in `load_published`; only without ``model``.

    Raises:
        FileFormatError: The file is damaged, foreign, for another network, or no mask.
        ValueError: ``image_size`` is needed or wrong.
    """
    values = weights_of(str(path), read_torch(path))
    own = values
    if model is None:
        architecture = infer_architecture(str(path), values, image_size=image_size)
        own = to_own_names(str(path), values)
        model = build(str(path), own, architecture).to_empty(device="cpu")  # memory that nobody touches costs nothing
    elif NULL in values:
        own = to_own_names(str(path), values)
    try:
        return element_mask(own, model)
    except ValueError as error:
        raise FileFormatError(f"{path}: {error}") from error


def _flags(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {shape}")
    flags = mask == 1
    foreign = int((~flags & (mask != 0)).sum())
    if foreign:
        raise ValueError(f"{name} has {foreign} of {mask.numel()} values that are neither 0 nor 1")
    return flags.flatten()
