"""How much memory tensors take at the height of a step, whether they have data or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
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
    meter = TensorMeter(held)
    with meter:
        step()
    return meter.peak / 2**20


class TensorMeter(TorchDispatchMode):
    """Follows the storages of tensors, by weak references, from one operator to the next; fake tensors count as real.

    References keep a storage's address from being used again, so that it is a key.

    Args:
        held: Tensors that are there already.
        block: Bytes that an allocator rounds up to.

    Attributes:
        held_bytes: What ``held`` takes.
        peak: Most bytes at any time so far, those included.
        operators: Names of the operators that have run, such as "aten::mm".
    """

    def __init__(self, held: Iterable[Tensor] = (), block: int = 1) -> None:
        super().__init__()
        self._block = block
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self._transient: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = 0  # of both, with what has expired since they were last looked through
        for tensor in held:
            self._see(tensor, self._held)
        self.held_bytes = self.peak = self._total
        self.operators: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.add(func._schema.name)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value, self._transient)
        self._measure()
        return result

    def _see(self, tensor: Tensor, among: dict[int, tuple[StorageWeakRef, int]]) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        among = self._held if reference.cdata in self._held else among
        size = -(-storage.nbytes() // self._block) * self._block
        self._total += size - among.get(reference.cdata, (None, 0))[1]
        among[reference.cdata] = reference, size

    def _measure(self) -> None:
        """Look for what is gone only as far as it could matter: the total is at least what is there."""
        for among in (self._transient, self._held):  # a gradient from before the step may be dropped in it
            if self._total <= self.peak:
                return
            for key in [key for key, (reference, _) in among.items() if reference.expired()]:
                self._total -= among.pop(key)[1]
        self.peak = max(self.peak, self._total)


def tensors_of(thing: object) -> Iterator[Tensor]:
    """Every tensor that is reachable from ``thing``: through modules, optimizers, containers and objects of ours."""
    seen: set[int] = set()
    stack: list[Any] = [thing]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
            stack.append(item.grad if item.is_leaf else None)
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set):
            stack.extend(item)
        elif isinstance(item, nn.Module | torch.optim.Optimizer) or type(item).__module__.startswith("pecker_fast"):
            stack.extend(vars(item).values() if hasattr(item, "__dict__") else ())
            stack.extend(getattr(item, name, None) for name in getattr(type(item), "__slots__", ()))


def bytes_by_claim(claims: Mapping[str, Iterable[Tensor]]) -> dict[frozenset[str], int]:
    """Bytes of memory by who claims them: memory that several tensors share counts once, for all their claimants.

    Args:
        claims: Who -> tensors, all on one device; a tensor claims the whole of its storage.
    """
    borders = []
    for who, tensors in claims.items():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if size := storage.nbytes():
                borders += [(storage.data_ptr(), 1, who), (storage.data_ptr() + size, -1, who)]
    found: dict[frozenset[str], int] = {}
    holders = dict.fromkeys(claims, 0)
    last = 0
    for place, change, who in sorted(borders):
        owners = frozenset(name for name, count in holders.items() if count)
        if owners and place > last:
            found[owners] = found.get(owners, 0) + place - last
        last = place
        holders[who] += change
    return found
