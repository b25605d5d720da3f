"""apply_mask: from a model and a mask to masked layers and their store."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import nn

from pecker_fast import step_hooks
from pecker_fast.active import ActiveParameters
from pecker_fast.layers import MaskedLayer
from pecker_fast.mask import BlockMask
from pecker_fast.maskable import STORE, Survey, is_plain, survey
from pecker_fast.scatter import DTYPE_CODES


def apply_mask(
    model: nn.Module,
    mask: BlockMask,
    *,
    unmaskable: Literal["frozen", "dense"] = "frozen",
    shared: bool = False,
) -> ActiveParameters:
    """Train only the active blocks of ``model``, in place: two changed lines in anybody's loop.

    Every maskable layer with active blocks keeps its object, its hooks and its dense weight, and gets one parameter
    with the active weights; everything else is frozen. Weights outside the mask are never written again. Gradients
    that weights already have are dropped.

    Args:
        model: The model; its ``requires_grad`` flags come back with ``remove()``.
        mask: Which blocks are active, made for this model.
        unmaskable: What becomes of weights that cannot be masked (convolutions other than 2-d, recurrent and fused
            attention weights, ...): they stay "frozen", or train "dense".
        shared: The model's weights are in the storage of another's, as ``dense_copy(share=True)`` leaves them; those
            that train get one of their own.

    Returns:
        The store of the active weights; give its ``parameters()`` to any optimizer, or the store to ``MaskedAdamW``.

    Raises:
        TypeError: ``mask`` is no ``BlockMask``.
        ValueError: The mask is damaged or for another model, activates a weight that cannot be masked, or the model is
            masked already. The model is unchanged.
    """
    if unmaskable not in ("frozen", "dense"):
        raise ValueError(f'unmaskable: expected "frozen" or "dense", got {unmaskable!r}')
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer):
            raise ValueError(
                f"{name or type(model).__name__} is masked already; call active.remove() before apply_mask"
            )
    found = survey(model)
    dense = found.refused if unmaskable == "dense" else {}
    check_mask(model, mask, found, dense)
    layers = layers_to_swap(dict(model.named_modules()), mask, found)
    _refuse_parts_of_masked_models(model, layers)
    if shared:
        _own_weights(model, mask, dense)
    return ActiveParameters(model, mask, layers, found, dense)


def dense_copy(model: nn.Module, *, share: bool = False) -> nn.Module:
    """An ordinary dense copy, in eval mode: what masks are chosen by does not depend on how a model comes.

    Args:
        model: The model, masked or not.
        share: The copy's weights are parameters of their own in the storage of ``model``'s, which must not be masked;
            ``apply_mask(shared=True)`` gives those that train a storage of their own.
    """
    memo: dict[int, object] = {}
    if share and STORE not in vars(model):
        memo = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    copied = copy.deepcopy(model, memo)
    if STORE in vars(copied):
        ActiveParameters.of(copied).remove()
    return copied.eval()


def _own_weights(model: nn.Module, mask: BlockMask, dense: Collection[str]) -> None:
    """Give weights that will train a storage of their own; what trains whole in its masters' dtype gets one anyway."""
    weights = dict(model.named_parameters())
    masters = torch.float64 if any(p.dtype == torch.float64 for p in weights.values()) else torch.float32
    for name, weight in weights.items():
        parameter = mask.parameters.get(name)
        whole = parameter is not None and parameter.is_full and weight.dtype == masters
        if name in dense or (parameter is not None and parameter.numel and not whole):
            weight.data = weight.data.clone()


def check_shared_weights(model: nn.Module, mask: BlockMask, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse to load ``weights`` into a model that shares storage, where they differ in what no mask touches.

    Raises:
        ValueError: They do; loading them would change the other models of that storage.
    """
    for name, own in model.named_parameters():
        touched = name not in mask.parameters or mask.parameters[name].numel
        if not touched and name in weights and not torch.equal(own, weights[name].to(own.device)):
            raise ValueError(
                f"the state is of another model: {name} is frozen and differs, and with share_frozen_weights frozen "
                f"weights are those of the original; load it where it was saved, or do not share"
            )


def check_mask(model: nn.Module, mask: BlockMask, found: Survey, adopted: Collection[str]) -> None:
    """Refuse a mask that does not fit ``model``; ``adopted`` are the weights that train dense.

    Raises:
        TypeError: It is no ``BlockMask``.
        ValueError: It is damaged or for another model, has no active block, or activates a weight that cannot be
            masked.
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask: expected a BlockMask, got {type(mask).__name__}; BlockMask.from_saliency makes one")
    mask.check()
    where = f"the mask was not made for this {type(model).__name__}"
    others = {name: p.dtype for name, p in model.named_parameters() if not p.is_floating_point()}
    for name, parameter in mask.parameters.items():
        if name in found.refused:
            if parameter.numel:
                raise ValueError(f"{name} cannot be masked: {found.refused[name]}; leave it out of the mask")
        elif name in others:
            raise ValueError(f"{name} cannot be masked: it is {others[name]}, not a float; leave it out of the mask")
        elif name not in found.maskable:
            raise ValueError(f"{where}: it masks {name!r}, which the model does not have; make a mask from this model")
        elif found.maskable[name] != parameter.grid.shape:
            raise ValueError(
                f"{where}: {name} has shape {found.maskable[name]}, the mask expects {parameter.grid.shape}; "
                f"make a mask from this model"
            )
    if not mask.numel:
        raise ValueError("the mask has no active block: nothing would train")
    for name, tensor in model.named_parameters():
        active = name in mask.parameters and mask.parameters[name].numel
        if active and tensor.dtype not in DTYPE_CODES:  # converted since it was masked
            raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if name in adopted and (tensor.dtype != torch.float32 or not is_plain(tensor)):
            got = tensor.dtype if is_plain(tensor) else type(tensor).__name__
            raise ValueError(f"{name} cannot train dense: expected a plain float32 tensor, got {got}; keep it frozen")


def _refuse_parts_of_masked_models(model: nn.Module, layers: Collection[str]) -> None:
    """Layers that are frozen in another masked model would get active parameters that its store knows nothing of."""
    modules = {id(model.get_submodule(layer)) for layer in layers}
    for store in step_hooks.watched():
        shared = [name for name, module in store.model.named_modules() if id(module) in modules]
        if shared:
            raise ValueError(
                f"{shared[0] or 'the model'} is a part of a {type(store.model).__name__} that is masked already; mask "
                f"that model as a whole, or call remove() of its store before apply_mask"
            )


def layers_to_swap(modules: Mapping[str, nn.Module], mask: BlockMask, found: Survey) -> list[str]:
    """Modules with active blocks, and frozen convolutions, which would keep their input for nothing."""
    owners = {name.rpartition(".")[0] for name, parameter in mask.parameters.items() if parameter.numel}
    maskable = {name.rpartition(".")[0] for name in found.maskable}
    return [
        name
        for name, module in modules.items()
        if name in owners or (isinstance(module, nn.Conv2d) and name in maskable)
    ]
