"""The few pickles that data sets come in, read without unpickling: nothing in them can run.

An interpreter of its own for the opcodes that lists, dicts, strings, numbers and arrays of bytes are made of. Names of
functions are compared with those that numpy writes and never looked up; every other name and opcode is refused.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pecker_fast.errors import FileFormatError

_MAX_OPCODES = 200_000
_SHORT = 1024
"""Longer strings are not copied out of the file."""
_LONGEST_KEY = 100
_MAX_ENCODED = 2
"""Times the size of the file. What numpy writes is encoded once; a string that is fetched again and again is a bomb."""
_ARGUMENTS = {
    **dict.fromkeys(("PROTO", "BININT1", "BINPUT", "BINGET"), struct.Struct("<B")),
    **dict.fromkeys(("BININT2",), struct.Struct("<H")),
    **dict.fromkeys(("BININT",), struct.Struct("<i")),
    **dict.fromkeys(("LONG_BINPUT", "LONG_BINGET"), struct.Struct("<I")),
    **dict.fromkeys(("FRAME",), struct.Struct("<Q")),
}
_LENGTHS = {
    **dict.fromkeys(("SHORT_BINSTRING", "SHORT_BINBYTES", "SHORT_BINUNICODE"), struct.Struct("<B")),
    **dict.fromkeys(("BINSTRING", "BINBYTES", "BINUNICODE"), struct.Struct("<I")),
    **dict.fromkeys(("BINBYTES8", "BINUNICODE8", "BYTEARRAY8"), struct.Struct("<Q")),
}
_OPCODES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
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


class _Mark:
    """Where a list of arguments begins on the stack."""


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


class _Machine:
    """Stack, memo and position."""

    def __init__(self, file: Path, data: npt.NDArray[np.uint8]) -> None:
        self.file, self.data, self.position = file, memoryview(data), 0  # type: ignore[arg-type]
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.to_encode = _MAX_ENCODED * len(self.data)
        self.actions: dict[str, Callable[[], None]] = {
            "MARK": lambda: self.stack.append(_Mark),
            "EMPTY_DICT": lambda: self.stack.append({}),
            "EMPTY_LIST": lambda: self.stack.append([]),
            "EMPTY_TUPLE": lambda: self.stack.append(()),
            "TUPLE": lambda: self.stack.append(tuple(self.to_mark())),
            "TUPLE1": lambda: self.stack.append((self.pop(),)),
            "TUPLE2": lambda: self.stack.append(self.pops(2)),
            "TUPLE3": lambda: self.stack.append(self.pops(3)),
            "APPEND": lambda: self.extend([self.pop()]),
            "APPENDS": lambda: self.extend(self.to_mark()),
            "SETITEM": lambda: self.update(self.pops(2)),
            "SETITEMS": lambda: self.update(self.to_mark()),
            "MEMOIZE": lambda: self.put(len(self.memo)),
            "GLOBAL": lambda: self.name(self.line(), self.line()),
            "STACK_GLOBAL": lambda: self.name(*self.pops(2)),
            "REDUCE": lambda: self.stack.append(self.call(*self.pops(2))),
            "BUILD": lambda: self.build(self.pop()),
        }

    def run(self) -> Any:
        for _ in range(_MAX_OPCODES):
            code = self.bytes(1)[0]
            name = _OPCODES.get(code) or repr(chr(code))
            if name == "STOP":
                return self.end()
            self.step(name)
        self.refuse(f"more than {_MAX_OPCODES} opcodes, which is no data set of this kind")

    def step(self, name: str) -> None:
        if name in self.actions:
            self.actions[name]()
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _ARGUMENTS:
            self.number(name, self.unpack(_ARGUMENTS[name]))
        elif name in _LENGTHS:
            self.string(name, self.unpack(_LENGTHS[name]))
        else:
            self.refuse(f"opcode {name}, which these files do not need and which may run code; do not trust this file")

    def end(self) -> Any:
        value = self.pop()
        if self.stack or self.position != len(self.data):
            self.refuse("something after the end of the values")
        return value

    def number(self, name: str, value: int) -> None:
        if name.endswith("PUT"):
            self.put(value)
        elif name.endswith("GET"):
            if value not in self.memo:
                self.refuse(f"memo {value}, which was not written")
            self.stack.append(self.memo[value])
        elif name.startswith("BININT"):
            self.stack.append(value)
        elif name == "PROTO" and not 2 <= value <= 5:
            self.refuse(f"pickle protocol {value}; expected 2 to 5")

    def string(self, name: str, length: int) -> None:
        value = self.bytes(length)
        if not name.endswith("UNICODE") and not name.endswith("UNICODE8"):
            self.stack.append(bytes(value) if length <= _SHORT else value)
            return
        try:
            self.stack.append(str(value, "utf-8"))
        except UnicodeDecodeError as error:
            self.refuse(f"a string that is not UTF-8 ({error.reason})")

    def put(self, index: int) -> None:
        if not self.stack or self.stack[-1] is _Mark:
            self.refuse("a memo of nothing")
        self.memo[index] = self.stack[-1]

    def extend(self, values: list[Any]) -> None:
        if not self.stack or not isinstance(self.stack[-1], list):
            self.refuse("items for a list, but no list")
        self.stack[-1].extend(values)

    def update(self, values: list[Any] | tuple[Any, ...]) -> None:
        if not self.stack or not isinstance(self.stack[-1], dict) or len(values) % 2:
            self.refuse("items for a dict, but no dict or no pairs")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | bytes) or len(key) > _LONGEST_KEY:
                self.refuse(f"a dict's key that is {type(key).__name__}; expected at most {_LONGEST_KEY} characters")
            self.stack[-1][key if isinstance(key, str) else key.decode("latin-1")] = value

    def name(self, module: Any, attribute: Any) -> None:
        full = f"{module} {attribute}" if isinstance(module, str) and isinstance(attribute, str) else "?"
        if full not in _NAMES:
            shown = full.replace(" ", ".")[:100]
            self.refuse(f"{shown!r}, which these files do not need and which may run code; do not trust this file")
        self.stack.append(_Name(_NAMES[full]))

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

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _Mark:
            self.refuse("an empty stack")
        return self.stack.pop()

    def pops(self, count: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(count)][::-1])

    def to_mark(self) -> list[Any]:
        values: list[Any] = []
        while self.stack and self.stack[-1] is not _Mark:
            values.append(self.stack.pop())
        if not self.stack:
            self.refuse("no mark on the stack")
        self.stack.pop()
        return values[::-1]

    def bytes(self, count: int) -> memoryview:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            self.position = start
            self.refuse(f"its end where {count} bytes were announced; it is truncated or damaged")
        return self.data[start : self.position]

    def unpack(self, form: struct.Struct) -> int:
        return int(form.unpack(self.bytes(form.size))[0])

    def line(self) -> str:
        text = bytes(self.data[self.position : self.position + 100]).partition(b"\n")[0]
        self.bytes(len(text) + 1)
        return text.decode("latin-1")

    def refuse(self, found: str) -> NoReturn:
        raise FileFormatError(f"{self.file}: byte {self.position}: found {found}")


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value) if isinstance(value, str) else ""
