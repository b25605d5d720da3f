"""What a model needs to train under a mask, made before anything of the model is changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pecker_fast.blocks import ParameterMask
from pecker_fast.layers import SUFFIX, MaskedLayer
from pecker_fast.layout import Entry, lay_out
from pecker_fast.mask import BlockMask


@dataclass(frozen=True)
class Arrangement:
    """Buffers, active parameters and views; to use them is a matter of assignments, which cannot run out of memory.

    Attributes:
        mask: The mask.
        entries: How the buffers are laid out.
        values: Active weights, float32 or float64 (numel,).
        grads: Zeros, same shape.
        active: The active parameter of every entry; the weight itself where it need not be copied.
        views: Its stretch of ``values``.
        layers: Module, and the masks and active parameters of its weights, by own name.
    """

    mask: BlockMask
    entries: tuple[Entry, ...]
    values: Tensor
    grads: Tensor
    active: list[nn.Parameter]
    views: list[Tensor]
    layers: list[tuple[nn.Module, dict[str, ParameterMask], dict[str, nn.Parameter]]]


@torch.no_grad()
def arrange(
    modules: Mapping[str, nn.Module], mask: BlockMask, layers: Sequence[str], adopted: Collection[str]
) -> Arrangement:
    """Lay out the active weights of a model.

    Args:
        modules: Its modules by name.
        mask: Which blocks are active.
        layers: Names of the modules that become masked layers.
        adopted: Weights that cannot be masked, and train dense.
    """
    parameters = dense_parameters(modules)
    entries = lay_out(parameters, mask, adopted)
    # Masters are float32, but those of a float64 model must not lose digits.
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
    values = torch.zeros(sum(entry.mask.numel for entry in entries), dtype=dtype, device=_device(parameters, entries))
    active, views = [], []
    masters: dict[str, dict[str, nn.Parameter]] = {layer: {} for layer in layers}
    for entry in entries:
        dense, view = parameters[entry.name], view_of(values, entry)
        view.copy_(entry.mask.gather(dense.detach(), entry.channels_last))
        # A weight that trains as a whole, as it is, is its own active parameter.
        itself = entry.adopted or (entry.mask.is_full and dense.dtype == dtype)
        parameter = dense if itself else nn.Parameter(view)
        active.append(parameter)
        views.append(view)
        if not entry.adopted:
            masters[entry.module][entry.own] = parameter
    own_masks = {(entry.module, entry.own): entry.mask for entry in entries}
    found = [(modules[name], {own: own_masks[name, own] for own in masters[name]}, masters[name]) for name in layers]
    return Arrangement(mask, entries, values, torch.zeros_like(values), active, views, found)


def dense_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The weights of a model, masked or not, by the names that they have without a mask; each once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for module_name, module in modules.items():
        masked = {own + SUFFIX for own in module.masks} if isinstance(module, MaskedLayer) else set()
        for own, parameter in module._parameters.items():
            if parameter is not None and own not in masked and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{module_name}.{own}" if module_name else own] = parameter
    return found


def view_of(flat: Tensor, entry: Entry) -> Tensor:
    """A parameter's stretch of a flat buffer, under a storage of its own.

    Accelerate takes weights that share a storage for tied ones, and leaves all but one out of its checkpoints.
    """
    view = entry.view(flat)
    with torch.cuda.device_of(view):  # else it is refused where another GPU is the current one
        return torch.utils.dlpack.from_dlpack(view) if view.numel() else view


def same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride()


def _device(parameters: Mapping[str, nn.Parameter], entries: Sequence[Entry]) -> torch.device:
    return parameters[entries[0].name].device
