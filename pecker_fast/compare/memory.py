"""How much memory a training step takes at its height."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.profiler import profile


def peak_mib(step: Callable[[], object], held: Iterable[Tensor], device: torch.device) -> float:
    """Highest memory of tensors while ``step`` runs, MiB: what is held before it, and what comes on top.

    On a GPU it is the allocator's own peak. On a CPU it is counted from what each operator takes and gives back;
    scratch memory within an operator does not show, nor does what libraries allocate by themselves.

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
        return torch.cuda.max_memory_allocated(device) / 2**20
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    with profile(use_kineto=False, profile_memory=True) as recorded:
        step()
    live = top = 0
    for event in sorted(recorded.function_events, key=lambda event: event.time_range.start):
        live += event.self_cpu_memory_usage
        top = max(top, live)
    return (sum(storages.values()) + top) / 2**20
