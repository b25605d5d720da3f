"""What the names and shapes of a published checkpoint say about its network.

The class-conditional DDPM of Score Forgetting Distillation, Selective Amnesia and SalUn has the names of `DDPMUNet`,
but for the vector of "no class", which is a parameter of its own there and the last row of ``classes_emb`` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pecker_fast.errors import FileFormatError
from pecker_fast.models.ddpm import DDPMUNet

NULL = "null_classes_emb"
TABLE = "classes_emb.weight"
ATTENTION_SIZE = 16
"""Height of the feature maps that have attention in every published network."""


def infer_architecture(
    where: str,
    weights: Mapping[str, Tensor],
    *,
    image_size: int | None = None,
    norm_groups: int = 32,
    dropout: float = 0.1,
) -> dict[str, Any]:
    """Arguments of the `DDPMUNet` whose published weights these are.

    Args:
        where: What to call them in messages.
        weights: Published name -> tensor.
        image_size: Height of the images. Without it the one level with attention is taken to be 16 x 16.
        norm_groups: Groups of the group norms, which no weight tells.
        dropout: Likewise.

    Raises:
        FileFormatError: A name is missing, or the shapes are no such network's.
        ValueError: ``image_size`` is needed, or does not fit.
    """
    width, channels = _shape(where, weights, "conv_in.weight", 4)[:2]
    levels = _count(weights, "down.{}.block.0.conv1.weight")
    outs = [_shape(where, weights, f"down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    if not outs or width < 1 or any(out % width or not out for out in outs):
        raise FileFormatError(
            f"{where}: expected down.N.block.0.conv1.weight with multiples of the {width} channels of conv_in, "
            f"got {outs}"
        )
    attention = [level for level in range(levels) if f"down.{level}.attn.0.q.weight" in weights]
    size = _image_size(where, attention) if image_size is None else image_size
    return {
        "width": width,
        "channel_mult": [out // width for out in outs],
        "num_res_blocks": _count(weights, "down.0.block.{}.conv1.weight"),
        "attention_resolutions": [size >> level for level in attention],
        "image_size": size,
        "channels": channels,
        "num_classes": _shape(where, weights, TABLE, 2)[0],
        "dropout": dropout,
        "norm_groups": norm_groups,
    }


def to_own_names(where: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under the names of `DDPMUNet`: the null vector becomes the last row of the table.

    A network that was trained without one gets a row of zeros there.

    Raises:
        FileFormatError: The table is missing, or the null vector is not a row of it.
    """
    _shape(where, weights, TABLE, 2)
    own, table = dict(weights), weights[TABLE]
    null = own.pop(NULL, table.new_zeros(table.shape[1]))
    if null.shape != table.shape[1:]:
        raise FileFormatError(
            f"{where}: {NULL} has shape {tuple(null.shape)}, expected {tuple(table.shape[1:])}, a row of {TABLE}"
        )
    own[TABLE] = torch.cat([table, null[None]])
    return own


def build(where: str, weights: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> DDPMUNet:
    """The network of that architecture on the meta device, once every name and shape of ``weights`` fits it.

    Raises:
        FileFormatError: A name is missing or foreign, or a shape is wrong; the first is named.
    """
    try:
        with torch.device("meta"):
            model = DDPMUNet(**architecture)
    except (ValueError, TypeError, RuntimeError) as error:
        raise FileFormatError(f"{where}: its shapes are of no DDPMUNet: {error}") from error
    expected = model.state_dict()
    missing, foreign = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or foreign:
        raise FileFormatError(
            f"{where}: not the weights of one network: {len(missing)} of {len(expected)} missing "
            f"(first: {missing[:1]}), {len(foreign)} unknown (first: {foreign[:1]})"
        )
    for name, wanted in expected.items():
        if weights[name].shape != wanted.shape:
            raise FileFormatError(
                f"{where}: {name} has shape {tuple(weights[name].shape)}, expected {tuple(wanted.shape)}"
            )
    return model


def _image_size(where: str, attention: list[int]) -> int:
    if len(attention) != 1:
        raise ValueError(
            f"{where}: has attention at {len(attention)} levels, so its weights do not tell the size of its images; "
            "give image_size"
        )
    return ATTENTION_SIZE << attention[0]


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    number = 0
    while pattern.format(number) in weights:
        number += 1
    return number


def _shape(where: str, weights: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in weights:
        raise FileFormatError(
            f"{where}: has no {name}; expected the class-conditional DDPM of SFD, SA or SalUn, whose names it lacks "
            f"(it has {', '.join(list(weights)[:3])}, ...)"
        )
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions:
        raise FileFormatError(f"{where}: {name} has shape {shape}, expected {dimensions} dimensions")
    return shape
