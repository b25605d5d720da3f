"""Active weights between the pipeline's file and a network that trains in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pecker_fast.active import ActiveParameters


@torch.no_grad()
def start_masters(active: ActiveParameters, tensors: Mapping[str, Tensor]) -> None:
    """Give the float32 masters the values of the file, of which a bfloat16 or float16 network has the leading bits.

    Args:
        active: Of a network whose dense weights are ``tensors``, rounded.
        tensors: Name -> weight as it is stored.
    """
    for entry in active.entries:
        stored = tensors[entry.name].to(active.values.device, active.values.dtype)
        entry.stretch(active.values).copy_(entry.of_dense(stored))
    active.scatter_()


@torch.no_grad()
def replaced(active: ActiveParameters, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with the active weights of ``active`` in their place, rounded to the stored dtype.

    Plain torch: ``tensors[name].flatten()[index] = masters.to(tensors[name].dtype)``. All else has the same bits.

    Args:
        active: What trained.
        tensors: Name -> weight as it is stored, which is not changed.
    """
    result = dict(tensors)
    for entry in active.entries:
        stored = tensors[entry.name]
        values = active.to_dense(active.values, entry.name).cpu().to(stored.dtype)
        result[entry.name] = torch.where(entry.mask.to_dense(), values, stored).contiguous()
    return result
