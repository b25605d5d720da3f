"""A delta as an adapter for peft: its SHiRA format, sparse values to add to the weights of linear layers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pecker_fast.blocks import ParameterMask
from pecker_fast.checkpoint import StrPath, write_json, write_safetensors
from pecker_fast.delta import Delta
from pecker_fast.delta.ledger import Ledger
from pecker_fast.delta.state import tensors_of
from pecker_fast.output_folder import claim

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(frozen=True)
class _Layer:
    """The changes of one linear layer: where, in the flattened weight, and by how much."""

    name: str
    shape: tuple[int, int]
    index: Tensor
    values: Tensor

    @property
    def rank(self) -> int:
        """Smallest r with r * (out + in) places: what peft reserves for a layer."""
        return -(-len(self.index) // sum(self.shape))


def export_shira(delta: Delta, base: nn.Module, folder: StrPath, *, overwrite: bool = False) -> None:
    """Write a delta of single weights of linear layers as a SHiRA adapter of peft.

    ``PeftModel.from_pretrained(base, folder)`` then computes with ``base + (new - old)`` in float32, which is the
    trained weight up to rounding; the delta itself is exact. peft gives every layer ``r * (out + in)`` values with one
    r for all: it is that of the fullest layer, and the others are filled up with zeros at weights that do not change.

    Args:
        delta: Made with an element mask (``block="element"``) that is active in linear weights only.
        base: The model that the delta was made from, without the delta; unchanged.
        folder: Gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        overwrite: Whether an older result there, of this function, may go.

    Raises:
        FileFormatError: The folder cannot be written, or has an older result or files of yours in the way.
        ValueError: The delta changes other layers or whole blocks, or peft's count does not fit into a layer, or the
            model is not the delta's base.
    """
    for name, mask in delta.mask.parameters.items():
        _check(name, mask, base)
    old = tensors_of(base)
    new = old | {name: old[name].clone() for name in delta.payload}
    delta.apply(new, ledger=Ledger.of(base))
    layers = [_layer(name, old[name], new[name], mask) for name, mask in delta.mask.parameters.items()]
    rank = max((layer.rank for layer in layers), default=1)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        prefix = f"base_model.model.{layer.name}"
        indices, values = _filled(layer, rank)
        tensors |= {f"{prefix}.shira_weight": values, f"{prefix}.shira_indices": indices}
    with claim(folder, "export_shira", (WEIGHTS_NAME, CONFIG_NAME), replace=overwrite) as unfinished:
        write_safetensors(unfinished / WEIGHTS_NAME, tensors, {"format": "pt"})
        write_json(unfinished / CONFIG_NAME, _config(rank, [layer.name for layer in layers]))


def _check(name: str, mask: ParameterMask, base: nn.Module) -> None:
    module_name, _, own = name.rpartition(".")
    if mask.grid.block != (1, 1) or mask.grid.view[0] != mask.grid.numel:
        raise ValueError(
            f"{name}: SHiRA adapters hold single weights; the mask has blocks of {mask.grid.block}, so "
            f'make one with block="element"'
        )
    try:
        module = base.get_submodule(module_name)
    except AttributeError as error:
        raise ValueError(
            f"{name}: {type(base).__name__} has no layer {module_name!r}; give the delta's base"
        ) from error
    if not isinstance(module, nn.Linear) or own != "weight":
        raise ValueError(
            f"{name}: SHiRA adapters change weights of nn.Linear only, this is the {own} of {type(module).__name__}; "
            f"leave it out of the mask, or keep the delta as it is"
        )


def _layer(name: str, old: Tensor, new: Tensor, mask: ParameterMask) -> _Layer:
    difference = (new.float() - old.float()).flatten().cpu()
    out, in_ = mask.grid.shape
    return _Layer(name.removesuffix(".weight"), (out, in_), mask.active, difference[mask.active])


def _filled(layer: _Layer, rank: int) -> tuple[Tensor, Tensor]:
    """Indices (2, n) int32 and values (n,) float32, with zeros at the first weights that are not active."""
    count, size = rank * sum(layer.shape), layer.shape[0] * layer.shape[1]
    if count > size:
        raise ValueError(
            f"{layer.name}: peft needs r * (out + in) = {rank} * {sum(layer.shape)} places in a layer, which has "
            f'{size} weights; use a lower density, or scope="layer" so that no layer needs a high r'
        )
    free = torch.ones(size, dtype=torch.bool, device="cpu")
    free[layer.index] = False
    missing = count - len(layer.index)
    index = torch.cat([layer.index, free.nonzero().flatten()[:missing]])
    values = torch.cat([layer.values, torch.zeros(missing, device="cpu")])
    return torch.stack([index // layer.shape[1], index % layer.shape[1]]).to(torch.int32), values


def _config(rank: int, names: list[str]) -> dict[str, object]:
    """What peft's ShiraConfig reads; a pattern, because a name in a list would also match as the end of others."""
    return {
        "peft_type": "SHIRA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "mask_type": "random",  # a placeholder of peft's: the indices in the file replace it
        "random_seed": None,
        "target_modules": "|".join(re.escape(name) for name in names),
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }
