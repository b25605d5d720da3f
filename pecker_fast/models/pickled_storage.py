"""Tensors in a plain pickle of modules: described at first, and read only once somebody wants them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pecker_fast.errors import FileFormatError
from pecker_fast.pickle_machine import PickleMachine

_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""What files of ``torch.save`` began with before they were archives. torch still pickles storages in that form."""
_PROTOCOL = 1001
_LONGEST_INTEGER = 16
_MAX_DIMENSIONS = 8
_MAX_NUMEL = 1 << 40
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class PickledStorage:
    """Numbers of one dtype, as they lie in the file: little-endian."""

    dtype: torch.dtype
    numel: int
    data: memoryview


@dataclass(frozen=True)
class PickledTensor:
    """A window into a storage, which lies within it."""

    storage: PickledStorage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.storage.dtype

    def read(self) -> Tensor:
        """The tensor, contiguous, in memory of its own."""
        if 0 in self.size:
            return torch.empty(self.size, dtype=self.dtype, device="cpu")
        numbers = torch.from_numpy(np.frombuffer(self.storage.data, dtype=np.uint8).copy()).view(self.dtype)
        return numbers.as_strided(self.size, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


def window(storage: PickledStorage, offset: Any, size: Any, stride: Any) -> PickledTensor | None:
    """A tensor of a storage, or None where numbers are wrong, lie outside, or are used more than once."""
    lists = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= _MAX_DIMENSIONS
    if not lists or not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
        return None
    if math.prod(max(length, 1) for length in size) > _MAX_NUMEL:
        return None
    numel = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if numel and (numel > storage.numel or last >= storage.numel):
        return None
    return PickledTensor(storage, offset, size, stride)


def read_storage(file: Path, data: bytes | memoryview) -> PickledStorage:
    """Read what ``torch.save(storage, file, _use_new_zipfile_serialization=False)`` wrote, without torch.

    Args:
        file: What error messages name.
        data: The bytes.

    Raises:
        FileFormatError: They are truncated or go on, or hold anything else.
    """
    return _StorageMachine(file, memoryview(data)).storage()


@dataclass(frozen=True)
class _Described:
    dtype: torch.dtype
    key: str
    numel: int


class _StorageMachine(PickleMachine):
    """Four pickles and the numbers."""

    content: ClassVar[str] = "storage"
    max_opcodes: ClassVar[int] = 200

    def __init__(self, file: Path, data: memoryview) -> None:
        super().__init__(file, data)
        self.actions |= {"LONG1": self._long, "BINPERSID": lambda: self.stack.append(self._described(self.pop()))}

    def name(self, module: str, attribute: str) -> torch.dtype | None:
        return _DTYPES.get(attribute) if module == "torch" else None

    def storage(self) -> PickledStorage:
        if self.next_value() != _MAGIC or self.next_value() != _PROTOCOL:
            self.refuse("a storage of another form; save the module with pickle.dump by torch of today")
        system = self.next_value()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            self.refuse("numbers of a machine that is not little-endian")
        described, keys = self.next_value(), self.next_value()
        if not isinstance(described, _Described) or keys != [described.key]:
            self.refuse("something else than one storage")
        dtype, numel = described.dtype, described.numel
        written, numbers = self.unpack(struct.Struct("<q")), self.data[self.position :]
        if written != numel or len(numbers) != numel * dtype.itemsize:
            self.refuse(f"{len(numbers)} bytes of numbers; expected {numel} x {dtype.itemsize}")
        return PickledStorage(dtype, numel, numbers)

    def _long(self) -> None:
        length = self.bytes(1)[0]
        if length > _LONGEST_INTEGER:
            self.refuse(f"an integer of {length} bytes")
        self.stack.append(bytes(self.bytes(length)))  # only ever compared

    def _described(self, value: Any) -> _Described:
        match value:
            case "storage", torch.dtype() as dtype, str(key), str(), int(numel), None if numel >= 0:
                return _Described(dtype, key, numel)
        self.refuse("something else than a storage of numbers")


def refuse_torch_file(file: Path, data: memoryview) -> None:
    """Name the two other kinds of files that are taken for pickles.

    Raises:
        FileFormatError: It is one of them.
    """
    if bytes(data[:2]) == b"PK" or _MAGIC in bytes(data[:32]):
        raise FileFormatError(
            f"{file}: is a file of torch.save, not a plain pickle; expected a snapshot of SiD-LSG or SFD, such as "
            "batch512_cfg4.54.54.5_t625_8380_v2.pkl, that holds the network as 'ema'"
        )
