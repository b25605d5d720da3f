"""The few pickles that data sets come in, read without unpickling: nothing in them can run.

Lists, dicts, strings, numbers and arrays of bytes. Names of functions are compared with those that numpy writes and
never looked up; every other name is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pecker_fast.errors import FileFormatError
from pecker_fast.pickle_machine import PickleMachine

_MAX_ENCODED = 2
"""Times the size of the file. What numpy writes is encoded once; a string that is fetched again and again is a bomb."""
_NAMES = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy.core.numeric _frombuffer": "buffer",
    "numpy._core.numeric _frombuffer": "buffer",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
}
"""What numpy 1 and 2 call what they write; ``encode`` is how protocol 2 of Python 3 spells bytes."""
_BYTE_TYPES = ("u1", "|u1", "uint8")


@dataclass(frozen=True)
class _Name:
    role: str


class _Dtype:
    """Of bytes; the only one there is."""


@dataclass
class _Array:
    pixels: npt.NDArray[np.uint8] | None = None


def read_plain_pickle(file: Path, data: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """Read a pickled dict of plain values, protocols 2 to 5.

    Args:
        file: What error messages name.
        data: Its bytes, for instance mapped; long strings and arrays are windows into them.

    Returns:
        Keys as str; values int, bool, None, str, bytes, memoryview, list, tuple, dict or uint8 arrays.

    Raises:
        FileFormatError: The file is truncated, or holds anything else; names of functions are told.
    """
    values = _Machine(file, data).run()
    if not isinstance(values, dict):
        raise FileFormatError(f"{file}: expected a pickled dict, got {type(values).__name__}")
    return {key: value.pixels if isinstance(value, _Array) else value for key, value in values.items()}


class _Machine(PickleMachine):
    """The names that numpy writes."""

    def __init__(self, file: Path, data: npt.NDArray[np.uint8]) -> None:
        super().__init__(file, data)
        self.to_encode = _MAX_ENCODED * len(self.data)

    def name(self, module: str, attribute: str) -> _Name | None:
        role = _NAMES.get(f"{module} {attribute}")
        return None if role is None else _Name(role)

    def call(self, function: Any, arguments: Any) -> Any:
        role = function.role if isinstance(function, _Name) else None
        match role, arguments:
            case "array", (_Name(role="ndarray"), (0,), b"b" | "b"):
                return _Array()
            case "dtype", (code, *_) if _text(code) in _BYTE_TYPES:
                return _Dtype()
            case "encode", (str(text), "latin1" | b"latin1"):
                return self.encoded(text)
            case "buffer", (bytes() | memoryview() as raw, _Dtype(), tuple(shape), "C" | b"C"):
                return _Array(self.array(shape, raw))
        self.refuse("a call that numpy does not write for an array of bytes; other dtypes are not supported")

    def build(self, state: Any) -> None:
        target = self.stack[-1] if self.stack else None
        match target, state:
            case _Dtype(), (3 | 4, b"|" | "|", None, None, None, -1, -1, 0, *_):
                return
            case _Array(pixels=None), (1, tuple(shape), _Dtype(), False, raw):
                raw = self.encoded(raw) if isinstance(raw, str) else raw
                target.pixels = self.array(shape, raw)
                return
        self.refuse("a state that numpy does not write for an array of bytes")

    def array(self, shape: tuple[Any, ...], raw: Any) -> npt.NDArray[np.uint8]:
        sizes = all(type(size) is int and size >= 0 for size in shape)
        if not sizes or len(shape) > 4 or not isinstance(raw, bytes | memoryview) or math.prod(shape) != len(raw):
            self.refuse("an array whose shape does not fit its bytes")
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape)

    def encoded(self, text: str) -> bytes:
        self.to_encode -= len(text)
        if self.to_encode < 0:
            self.refuse(f"strings that make more than {_MAX_ENCODED} times the file's size in bytes; it is a bomb")
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            self.refuse("bytes spelled with characters that are none")


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value) if isinstance(value, str) else ""
