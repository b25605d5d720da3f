"""Which weights of a model can be masked, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from pecker_fast.blocks import Block, BlockGrid
from pecker_fast.scatter import DTYPE_CODES

NORMS: tuple[type[nn.Module], ...] = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)
MASKABLE_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, nn.Embedding, *NORMS)
"""Modules whose forward ``layers.py`` knows; exactly these, because a subclass may use its weights in another way."""


STORE = "_pecker_active"
"""Where a masked model keeps its store (``ActiveParameters``), so that copies of the model get their own."""


@dataclass(frozen=True)
class Survey:
    """Every floating-point weight of a model, in the order of ``named_parameters``.

    Attributes:
        maskable: Weights that can be masked, name -> shape.
        refused: The others, name -> reason.
        embeddings: Names of maskable weights that are cut by rows whatever the block.
        total: Weights of the whole model, the refused ones included.
    """

    maskable: dict[str, tuple[int, ...]]
    refused: dict[str, str]
    embeddings: frozenset[str]
    total: int

    def grids(self, block: Block) -> dict[str, BlockGrid]:
        """Every maskable weight cut as ``block`` asks."""
        return {
            name: BlockGrid.of(shape, block, by_row=name in self.embeddings) for name, shape in self.maskable.items()
        }


def survey(model: nn.Module) -> Survey:
    """Look at every weight of ``model``; nothing is changed. Of a masked model: what it was before.

    Raises:
        ValueError: The model has no maskable weight.
    """
    if STORE in vars(model):
        return cast(Survey, vars(model)[STORE].found)
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    maskable: dict[str, tuple[int, ...]] = {}
    refused: dict[str, str] = {}
    embeddings: set[str] = set()
    total = 0
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        total += parameter.numel()
        module_name, _, own_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        reason = _why_not(module, own_name, parameter, uses[id(parameter)])
        if reason is not None:
            refused[name] = reason
            continue
        maskable[name] = tuple(parameter.shape)
        if isinstance(module, nn.Embedding):
            embeddings.add(name)
    if not maskable:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:3]) or "it has no weights"
        raise ValueError(
            f"{type(model).__name__} has no maskable weight ({reasons}). Maskable are the weights and biases of "
            f"{', '.join(kind.__name__ for kind in MASKABLE_TYPES)}"
        )
    return Survey(maskable, refused, frozenset(embeddings), total)


def _why_not(module: nn.Module, own_name: str, parameter: nn.Parameter, uses: int) -> str | None:
    if type(module) not in MASKABLE_TYPES:
        return f"{type(module).__name__} is not a layer that can be masked"
    if (computed := _computed(module)) is not None:
        return computed
    if own_name not in ("weight", "bias"):
        return f"{type(module).__name__} computes its weight from it (a parametrization)"
    if uses > 1:
        return f"it is shared by {uses} modules"
    if "forward" in vars(module):
        return "its module's forward was replaced on the instance"
    if parameter.is_meta:
        return "it is on the meta device"
    if not is_plain(parameter):
        return f"it is a {type(parameter).__name__}, whose memory is not that of a plain tensor"
    if parameter.dtype not in DTYPE_CODES:
        return f"expected float32, bfloat16, float16 or float64, got {parameter.dtype}"
    if not _is_dense_in_memory(parameter):
        return f"it is not dense in memory (strides {parameter.stride()})"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return "an embedding with max_norm, sparse or scale_grad_by_freq"
    return None


def _computed(module: nn.Module) -> str | None:
    """Why a layer's weight is not what trains: a hook writes it before each forward, out of other parameters."""
    lost = [own for own in ("weight", "bias") if hasattr(module, own) and own not in module._parameters]
    if not lost:
        return None
    hooks = {hook for hook in _HOOKS for h in module._forward_pre_hooks.values() if hook in type(h).__module__}
    if hooks:
        return f"{hooks.pop()} computes the layer's {lost[0]} in a hook; remove it from the layer to mask that"
    return f"the layer's {lost[0]} is not a parameter of its own"


_HOOKS = ("weight_norm", "spectral_norm", "prune")
"""Modules of torch.nn.utils whose hooks take a weight away and set it anew before each forward."""


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory of its own; subclasses that wrap others (DTensor, quantised weights) have none."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _is_dense_in_memory(tensor: torch.Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
