"""How much memory a training step takes at its height."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_mib(step: Callable[[], object], held: Iterable[Tensor], device: torch.device) -> float:
    """Highest memory of tensors while ``step`` runs, MiB: what is held before it, and what comes on top.

    On a GPU it is the allocator's own peak. On a CPU the tensors that operators return are counted for as long as they
    live; scratch memory within an operator does not show.

    Args:
        step: One training step; it should not be the first.
        held: Tensors that are there before it: weights, optimizer state. Shared memory counts once; a GPU's allocator
            knows them.
        device: Where it runs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak / 2**20
    meter = _Meter(held)
    with meter:
        step()
    return meter.peak / 2**20


class _Meter(TorchDispatchMode):
    """Follows the storages of tensors, by weak references, from one operator to the next."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        for tensor in held:
            self._see(tensor)
        self._measure()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value)
        self._measure()
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self.live[reference.cdata] = reference, storage.nbytes()

    def _measure(self) -> None:
        self.live = {key: found for key, found in self.live.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
