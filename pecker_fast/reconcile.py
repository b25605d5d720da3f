"""A flat buffer and the dense weights of a model, brought together again whichever of the two was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pecker_fast import native
from pecker_fast.scatter import ScatterTable

_FACTOR, _WORD = 0x9E3779B9, 0xFFFFFFFF
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def dense_checksums(table: ScatterTable, dtype: torch.dtype, base: int = 0) -> Tensor:
    """A checksum of the active weights of every dense tensor, as they are there.

    It is ``sum(bits(weight) * factor(element))`` modulo 2**64, with the bits of the weight as ``dtype`` and an odd
    factor for each element of the flat buffer: one weight that changed always shows, and so do two that changed
    places. Converting the dense weights to another dtype keeps the sum if it keeps their values.

    Args:
        table: Where the weights are.
        dtype: That of the flat buffer, float32 or float64.
        base: Number of the table's first element in the buffer that factors are counted in.

    Returns:
        int64 (parameters,) on the table's device; 0 for a weight that is a view of the buffer.
    """
    sums = torch.zeros(len(table.targets), dtype=torch.int64, device=table.device)
    run, where = _native("dense_checksums", table, dtype)
    if run is not None:
        run(sums=sums.data_ptr(), numel=table.numel, base=base, **table.native_arguments, **where)
        return sums
    begin = base
    for number, target in enumerate(table.targets):
        if target.dense is not None:
            sums[number] = _checksum(table.active(number).to(dtype), begin)
        begin += target.mask.numel
    return sums


def reconcile_(values: Tensor, table: ScatterTable, written: Tensor, *, follow: bool = True, base: int = 0) -> Tensor:
    """Make a flat buffer and the dense weights agree.

    In plain torch, for every weight with its stretch of the buffer and its active weights ``dense``::

        differ = dense != stretch.to(dense.dtype)  # in any bit
        if written:
            stretch[differ] = dense[differ]
        elif follow:
            dense[differ] = stretch[differ]

    Args:
        values: The buffer, float32 or float64 (numel,). Changed.
        table: Where its weights lie in the dense tensors, which are changed; their version counters stay.
        written: Whether the dense weights of a parameter are the newer ones, bool (parameters,) on the same device.
        follow: Whether the others follow the buffer; else they are left alone.
        base: As in ``dense_checksums``.

    Returns:
        ``dense_checksums`` as they are now.
    """
    run, where = _native("reconcile", table, values.dtype)
    if run is None:
        reconcile_reference_(values, table, written, follow=follow)
        return dense_checksums(table, values.dtype, base)
    sums = torch.zeros(len(table.targets), dtype=torch.int64, device=table.device)
    addresses = {"value": values.data_ptr(), "written": written.data_ptr(), "sums": sums.data_ptr()}
    run(**addresses, follow=follow, numel=table.numel, base=base, **table.native_arguments, **where)
    return sums


def reconcile_reference_(values: Tensor, table: ScatterTable, written: Tensor, *, follow: bool) -> None:
    """Plain-torch twin of ``reconcile_``, without a decision on the host."""
    stretches = values.split([target.mask.numel for target in table.targets])
    for number, (target, stretch) in enumerate(zip(table.targets, stretches, strict=True)):
        if target.dense is None:
            continue
        dense = table.active(number)
        differ = _bits(dense) != _bits(stretch.to(dense.dtype))
        stretch.copy_(torch.where(differ & written[number], dense.to(stretch.dtype), stretch))
        wanted = stretch.to(dense.dtype)
        table.write_active_(number, wanted if follow else torch.where(written[number], wanted, dense))


def _checksum(active: Tensor, begin: int) -> Tensor:
    count = active.itemsize // 4  # the second word of a float64 has the factor of the next element
    words = active.view(torch.int32).view(len(active), count).long() & _WORD
    elements = torch.arange(begin, begin + len(active), device=active.device)[:, None]
    factors = (elements + torch.arange(1, count + 1, device=active.device)) * _FACTOR & _WORD | 1
    return (words * factors).sum()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.itemsize])


def _native(op: str, table: ScatterTable, dtype: torch.dtype) -> tuple[Callable[..., None] | None, dict[str, Any]]:
    """The native kernel of ``op`` and where it runs; None where plain torch serves the buffer."""
    if table.is_empty or dtype != torch.float32:
        return None, {}
    if table.device.type == "cpu" and native.available():
        return getattr(native.load(), f"{op}_cpu"), {"threads": torch.get_num_threads()}
    if table.device.type == "cuda" and native.why_not_cuda() is None:
        stream = torch.cuda.current_stream(table.device).cuda_stream
        return _on_device(getattr(native.load(), f"{op}_cuda"), table.device), {"stream": stream}
    return None, {}


def _on_device(run: Callable[..., None], device: torch.device) -> Callable[..., None]:
    def with_device(**arguments: Any) -> None:
        with torch.cuda.device(device):
            run(**arguments)

    return with_device
