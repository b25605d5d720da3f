"""Where the weights of a flat buffer lie in the dense weights of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from pecker_fast import native
from pecker_fast.blocks import ParameterMask
from pecker_fast.once import to_device

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""How csrc/scatter.h numbers the dtypes of dense weights."""
TILE = 1024
"""Flat elements that one thread block, or one Triton program, copies: kScatterTile of csrc/scatter.h."""


@dataclass(frozen=True)
class Target:
    """The dense weight that one stretch of the flat buffer is copied to.

    Attributes:
        mask: Its active blocks; the stretch is ``mask.numel`` long.
        dense: The weight, dense in memory (contiguous or channels-last); None where it is a view of the buffer itself.
        channels_last: Order of the stretch within blocks, as in ``ParameterMask.index``.
    """

    mask: ParameterMask
    dense: Tensor | None
    channels_last: bool = False

    def memory_index(self) -> Tensor:
        """Position in memory, in elements, of every active weight in the order of the flat buffer: int64 (n,)."""
        logical = self.mask.index(self.channels_last)
        if self.dense is None or self.dense.is_contiguous():
            return logical
        positions = torch.arange(self.dense.numel(), device="cpu").as_strided(self.dense.shape, self.dense.stride())
        return positions.reshape(-1)[logical]


class ScatterTable:
    """Copies a flat buffer into the dense weights of a model, and only the weights that the buffer holds.

    For the native kernels everything is in one table of runs of neighbouring weights, so that a whole model is one
    call however many weights it has: 20 bytes a run, 12 a weight, 8 for each tile of 1024 flat elements, 16 for both
    ends. A row that is active is one run at most, so that rows and tiles need little; a single weight without active
    neighbours is a run of its own, whose entry takes as many bytes as its value, gradient, two moments and running
    average together. The table keeps the dense tensors, whose addresses it holds, alive.

    Args:
        targets: Where each stretch of the flat buffer goes, in the buffer's order.
        device: Where the buffer and the dense weights are.

    Attributes:
        numel: Length of the flat buffer.
        device: Where the buffer, the table and the dense weights are.
        dtypes: Those of the dense weights: bit c is set where one has code c.
        is_empty: Whether there is nothing to copy: every dense weight is a view of the buffer.

    Raises:
        ValueError: A dense weight is on another device.
    """

    def __init__(self, targets: Sequence[Target], device: torch.device) -> None:
        self.targets = tuple(targets)
        self.numel = sum(target.mask.numel for target in self.targets)
        self.is_empty = all(target.dense is None for target in self.targets)
        runs = [_runs(target) for target in self.targets]
        lengths = [len(offsets) for offsets, _ in runs]
        begins = torch.tensor([0, *(target.mask.numel for target in self.targets)], device="cpu").cumsum(0)
        flat = [starts + begin for (_, starts), begin in zip(runs, begins.tolist(), strict=False)]
        dense = [target.dense for target in self.targets]
        for d in dense:
            if d is not None and not _same_device(d.device, device):
                raise ValueError(f"ScatterTable: dense weights must be on the buffer's {device}, got one on {d.device}")

        def there(values: Tensor | list[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return to_device(torch.as_tensor(values, dtype=dtype, device="cpu"), device)

        self.dense_pointers = there([0 if d is None else d.data_ptr() for d in dense])
        self.dense_dtypes = there([0 if d is None else DTYPE_CODES[d.dtype] for d in dense], torch.int32)
        owners = torch.arange(len(runs), dtype=torch.int32, device="cpu")
        self.run_parameter = there(owners.repeat_interleave(torch.tensor(lengths, device="cpu").long()), torch.int32)
        self.run_dense_offset = there(torch.cat([begins.new_empty(0), *(offsets for offsets, _ in runs)]))
        run_flat_offset = torch.cat([*flat, torch.tensor([self.numel], device="cpu")])
        self.run_flat_offset = there(run_flat_offset)
        # The run of the first element of every tile, and at last of the last element: int64 (ceil(numel / TILE) + 1,).
        ends = torch.tensor([*range(0, self.numel, TILE), max(self.numel - 1, 0)], device="cpu")
        self.tile_run = there(torch.searchsorted(run_flat_offset, ends, right=True) - 1)
        self.dtypes = sum(1 << code for code in {DTYPE_CODES[d.dtype] for d in dense if d is not None})
        self.device = self.tile_run.device
        self._index: dict[int, Tensor] = {}

    def tensors(self) -> list[Tensor]:
        """The table as tensors on the buffer's device; ``native_table`` turns them into what the kernels take."""
        return [
            self.dense_pointers,
            self.dense_dtypes,
            self.run_parameter,
            self.run_dense_offset,
            self.run_flat_offset,
            self.tile_run,
        ]

    @cached_property
    def native_arguments(self) -> dict[str, int]:
        """What the native module takes for it; the tensors stay where they are."""
        return native_table(self.tensors())

    def scatter_(self, values: Tensor) -> None:
        """Copy ``values`` (numel,) into the dense weights, rounded to their dtype.

        Raises:
            ValueError: ``values`` is of another length, or on another device than the table.
        """
        if values.shape != (self.numel,) or values.device != self.device:
            raise ValueError(
                f"ScatterTable: values: expected ({self.numel},) on {self.device}, got {tuple(values.shape)} on "
                f"{values.device}; make the table for the buffer"
            )
        if self.is_empty:
            return
        scatter, where = self._native(values)
        if scatter is None:
            self.scatter_reference_(values)
        else:
            with torch.cuda.device_of(values):
                scatter(value=values.data_ptr(), numel=self.numel, **self.native_arguments, **where)

    def _native(self, values: Tensor) -> tuple[Callable[..., None] | None, dict[str, int]]:
        """The native kernel for a buffer, if there is one, and where it runs."""
        if values.dtype != torch.float32:
            return None, {}
        if values.device.type == "cpu" and native.available():
            return native.load().scatter_cpu, {"threads": torch.get_num_threads()}
        if values.device.type == "cuda" and native.why_not_cuda() is None:
            return native.load().scatter_cuda, {"stream": torch.cuda.current_stream(values.device).cuda_stream}
        return None, {}

    def scatter_reference_(self, values: Tensor) -> None:
        """Plain-torch twin of ``scatter_``."""
        stretches = values.split([target.mask.numel for target in self.targets])
        for number, (target, stretch) in enumerate(zip(self.targets, stretches, strict=True)):
            if target.dense is not None:
                index = self._index_of(number, values.device)
                self._memory(target.dense).index_copy_(0, index, stretch.to(target.dense.dtype))

    def active(self, number: int) -> Tensor:
        """The active weights of a dense tensor, in the order of the flat buffer: (n,), a copy."""
        dense = cast(Tensor, self.targets[number].dense)
        return self._memory(dense)[self._index_of(number, dense.device)]

    def write_active_(self, number: int, weights: Tensor) -> None:
        """The other way; the dense tensor's version counter stays."""
        dense = cast(Tensor, self.targets[number].dense)
        self._memory(dense.data).index_copy_(0, self._index_of(number, dense.device), weights)

    def _index_of(self, number: int, device: torch.device) -> Tensor:
        """Where the active weights of a dense tensor lie in its memory, made when plain torch first needs it."""
        if number not in self._index:
            self._index[number] = to_device(self.targets[number].memory_index(), device)
        return self._index[number]

    @staticmethod
    def _memory(dense: Tensor) -> Tensor:
        return dense.detach().as_strided((dense.numel(),), (1,))


def native_table(tensors: list[Tensor]) -> dict[str, int]:
    """A table's tensors (none: nothing to copy) as addresses and sizes, by the names of the native module."""
    names = ("dense_pointers", "dense_dtypes", "run_parameter", "run_dense_offset", "run_flat_offset", "tile_run")
    if not tensors:
        return dict.fromkeys((*names, "num_parameters", "num_runs"), 0)
    addresses = {name: tensor.data_ptr() for name, tensor in zip(names, tensors, strict=True)}
    return {**addresses, "num_parameters": len(tensors[0]), "num_runs": len(tensors[2])}


def _same_device(one: torch.device, other: torch.device) -> bool:
    """Whether they are the same; "cuda" without a number, which tensors never have, is any of that type."""
    return one == other or (other.index is None and one.type == other.type)


def _runs(target: Target) -> tuple[Tensor, Tensor]:
    """Where each run of neighbours begins: in the dense weight's memory, and in the stretch. Both int64 (runs,)."""
    if target.dense is None or target.mask.numel == 0:
        begin = torch.zeros(min(target.mask.numel, 1), dtype=torch.int64, device="cpu")
        return begin, begin
    index = target.memory_index()
    breaks = torch.ones(len(index), dtype=torch.bool, device="cpu")
    breaks[1:] = index[1:] != index[:-1] + 1
    starts = breaks.nonzero().flatten()
    return index[starts], starts
