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
    """Follows the storages of tensors, by weak references, from one operator to the next.

    References keep a storage's address from being used again, so that it is a key.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.transient: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = 0  # of both, with what has expired since they were last looked through
        for tensor in held:
            self._see(tensor, self.held)
        self.peak = self.total

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value, self.transient)
        self._measure()
        return result

    def _see(self, tensor: Tensor, among: dict[int, tuple[StorageWeakRef, int]]) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        among = self.held if reference.cdata in self.held else among
        self.total += storage.nbytes() - among.get(reference.cdata, (None, 0))[1]
        among[reference.cdata] = reference, storage.nbytes()

    def _measure(self) -> None:
        """Look for what is gone only as far as it could matter: ``total`` is at least what is there."""
        for among in (self.transient, self.held):  # a gradient from before the step may be dropped in it
            if self.total <= self.peak:
                return
            for key in [key for key, (reference, _) in among.items() if reference.expired()]:
                self.total -= among.pop(key)[1]
        self.peak = max(self.peak, self.total)
