"""The tensors that a delta reads and writes: a module's or a mapping's, looked at as bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pecker_fast.active import ActiveParameters
from pecker_fast.blocks import ParameterMask
from pecker_fast.delta.fingerprint import flat_bits, layout
from pecker_fast.layers import MaskedLayer
from pecker_fast.maskable import STORE

Weights: TypeAlias = nn.Module | Mapping[str, Tensor]
"""A model, or what its ``state_dict()`` returns."""

DTYPES = {"float32": torch.int32, "bfloat16": torch.int16, "float16": torch.int16, "float64": torch.int64}
"""Dtypes of weights that a delta may change, and the integers that their bits are."""


def tensors_of(model: Weights) -> dict[str, Tensor]:
    """The state dict of a model; of a masked one the dense weights, which are what trains.

    Raises:
        ValueError: An entry is no tensor, or has no memory of its own.
    """
    if isinstance(model, nn.Module):
        for module in model.modules():
            if STORE in module.__dict__:
                ActiveParameters.of(module).sync_()
        model = model.state_dict()
    for name, tensor in model.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}; a delta holds weights only")
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
            raise ValueError(f"{name} is {kind}; load the weights first, as ordinary dense tensors")
    return dict(model)


def check_layout(state: Mapping[str, Tensor], expected: Mapping[str, str], what: str) -> None:
    """Refuse tensors of other names, shapes or dtypes than expected, naming the first.

    Raises:
        ValueError: They differ.
    """
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"{what}: {len(missing)} weights are missing (first: {sorted(missing)[:1]}), "
            f"{len(unexpected)} unexpected (first: {sorted(unexpected)[:1]}); it is another network"
        )
    for name, tensor in state.items():
        if layout(tensor) != expected[name]:
            raise ValueError(f"{what}: {name} is {layout(tensor)}, expected {expected[name]}")


def check_writable(model: Weights, state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Refuse weights that cannot be changed in place, each for itself.

    Raises:
        ValueError: The model is masked, or a weight shares memory, or was made in inference mode.
    """
    if isinstance(model, nn.Module) and any(isinstance(module, MaskedLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is masked; call active.remove() first, or use a copy from before")
    uses = Counter(tensor.data_ptr() for tensor in state.values() if tensor.numel())
    for name in names:
        tensor = state[name]
        folded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        if folded or uses[tensor.data_ptr()] > 1:
            raise ValueError(f"{name} shares memory with another weight; give it memory of its own (.clone())")
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} was made in inference mode and cannot be changed; load it outside of it")


def changed_bits(name: str, before: Tensor, after: Tensor, mask: ParameterMask | None) -> Tensor | None:
    """XOR of the active blocks of a weight, in the order of ``mask.index()``, on the CPU; None without a mask.

    Raises:
        ValueError: Something else differs too.
    """
    difference = flat_bits(before) ^ flat_bits(after.to(before.device))
    active = None if mask is None else difference[mask.index().to(difference.device)]
    outside = int(difference.count_nonzero()) - (0 if active is None else int(active.count_nonzero()))
    if outside:
        raise ValueError(
            f"{name}: {outside} elements outside the mask differ between before and after; a delta holds the active "
            f"weights of its mask only (a buffer, such as a batch norm's statistics, has none)"
        )
    return None if active is None else active.cpu()


def only_weights_changed(before: nn.Module, after: nn.Module) -> bool:
    """Whether dtypes and buffers are the same, as a delta between the two needs it."""
    old, new = before.state_dict(), after.state_dict()
    buffers = dict(before.named_buffers())
    return all(
        new[name].dtype == tensor.dtype and (name not in buffers or torch.equal(new[name], tensor))
        for name, tensor in old.items()
    )


def xor_(state: Mapping[str, Tensor], parameters: Mapping[str, ParameterMask], payload: Mapping[str, Tensor]) -> None:
    """XOR the active blocks in place: all weights, or none where something fails on the way."""
    done: list[str] = []
    try:
        for name, mask in parameters.items():
            _xor_weight(state[name], mask.index(), payload[name])
            done.append(name)
    except BaseException:
        for name in done:
            _xor_weight(state[name], parameters[name].index(), payload[name])
        raise


def _xor_weight(tensor: Tensor, index: Tensor, payload: Tensor) -> None:
    bits = tensor.detach().view(payload.dtype)
    flat, index = bits.reshape(-1), index.to(bits.device)  # a view, or a copy where the layout is another one
    flat[index] = flat[index] ^ payload.to(bits.device)
    if not bits.is_contiguous():
        bits.copy_(flat.view(bits.shape))
