"""A pickle's opcodes, interpreted without unpickling: nothing in the file can run.

An interpreter of its own for the opcodes that lists, dicts, strings and numbers are made of. Names of functions and
classes are handed to a subclass as text and never looked up; every opcode that is not known here or there is refused.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from pecker_fast.errors import FileFormatError

_SHORT = 1024
"""Longer strings are not copied out of the file."""
_LONGEST_KEY = 100
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


class _Mark:
    """Where a list of arguments begins on the stack."""


class PickleMachine:
    """Stack, memo and position. What names, calls and states mean, a subclass says; here they are refused.

    Values are int, bool, None, str, bytes, memoryview (long strings: windows into the data), list, tuple and dict with
    keys of text, and whatever the subclass makes.
    """

    max_opcodes: ClassVar[int] = 200_000
    content: ClassVar[str] = "data set"
    """What the file should be, for messages."""

    def __init__(self, file: Path, data: npt.NDArray[np.uint8] | memoryview) -> None:
        """Bytes to read, for instance mapped, and the name of their file for error messages."""
        self.file, self.data, self.position = file, memoryview(data), 0  # type: ignore[arg-type]
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
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
            "GLOBAL": lambda: self.push_name(self.line(), self.line()),
            "STACK_GLOBAL": lambda: self.push_name(*self.pops(2)),
            "REDUCE": lambda: self.stack.append(self.call(*self.pops(2))),
            "BUILD": lambda: self.build(self.pop()),
        }

    def name(self, module: str, attribute: str) -> Any:
        """What stands for a name; ``None`` refuses it."""
        return None

    def call(self, function: Any, arguments: Any) -> Any:
        """What a call of a name gives."""
        self.refuse("a call")

    def build(self, state: Any) -> None:
        """Give the object on top of the stack its state."""
        self.refuse("an object with a state")

    def run(self) -> Any:
        """The value of the pickle, which takes all of the data.

        Raises:
            FileFormatError: The data is truncated, goes on, or holds anything that is not expected.
        """
        value = self.next_value()
        if self.position != len(self.data):
            self.refuse("something after the end of the values")
        return value

    def next_value(self) -> Any:
        """The value of the pickle that begins here; the position is behind it then.

        Raises:
            FileFormatError: As `run`.
        """
        for _ in range(self.max_opcodes):
            code = self.bytes(1)[0]
            name = _OPCODES.get(code) or repr(chr(code))
            if name == "STOP":
                return self._end()
            self._step(name)
        self.refuse(f"more than {self.max_opcodes} opcodes, which is no {self.content} of this kind")

    def _step(self, name: str) -> None:
        if name in self.actions:
            self.actions[name]()
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _ARGUMENTS:
            self._number(name, self.unpack(_ARGUMENTS[name]))
        elif name in _LENGTHS:
            self._string(name, self.unpack(_LENGTHS[name]))
        else:
            self.refuse(f"opcode {name}, which these files do not need and which may run code; do not trust this file")

    def _end(self) -> Any:
        value = self.pop()
        if self.stack:
            self.refuse("something after the end of the values")
        self.memo = {}
        return value

    def _number(self, name: str, value: int) -> None:
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

    def _string(self, name: str, length: int) -> None:
        value = self.bytes(length)
        if not name.endswith("UNICODE") and not name.endswith("UNICODE8"):
            self.stack.append(bytes(value) if length <= _SHORT else value)
            return
        try:
            self.stack.append(str(value, "utf-8"))
        except UnicodeDecodeError as error:
            self.refuse(f"a string that is not UTF-8 ({error.reason})")

    def put(self, index: int) -> None:
        """Remember what is on top of the stack."""
        if not self.stack or self.stack[-1] is _Mark:
            self.refuse("a memo of nothing")
        self.memo[index] = self.stack[-1]

    def extend(self, values: list[Any]) -> None:
        """Give the list on top of the stack more items."""
        if not self.stack or not isinstance(self.stack[-1], list):
            self.refuse("items for a list, but no list")
        self.stack[-1].extend(values)

    def update(self, values: list[Any] | tuple[Any, ...]) -> None:
        """Give the dict on top of the stack more items: key, value, key, value."""
        if not self.stack or not isinstance(self.stack[-1], dict) or len(values) % 2:
            self.refuse("items for a dict, but no dict or no pairs")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | bytes) or len(key) > _LONGEST_KEY:
                self.refuse(f"a dict's key that is {type(key).__name__}; expected at most {_LONGEST_KEY} characters")
            self.stack[-1][key if isinstance(key, str) else key.decode("latin-1")] = value

    def push_name(self, module: Any, attribute: Any) -> None:
        """Push what stands for a name."""
        text = isinstance(module, str) and isinstance(attribute, str)
        found = self.name(module, attribute) if text else None
        if found is None:
            shown = f"{module}.{attribute}"[:100] if text else "?"
            self.refuse(f"{shown!r}, which these files do not need and which may run code; do not trust this file")
        self.stack.append(found)

    def pop(self) -> Any:
        """The top of the stack."""
        if not self.stack or self.stack[-1] is _Mark:
            self.refuse("an empty stack")
        return self.stack.pop()

    def pops(self, count: int) -> tuple[Any, ...]:
        """The uppermost values, the lowest first."""
        return tuple([self.pop() for _ in range(count)][::-1])

    def to_mark(self) -> list[Any]:
        """All values above the mark, which goes too."""
        values: list[Any] = []
        while self.stack and self.stack[-1] is not _Mark:
            values.append(self.stack.pop())
        if not self.stack:
            self.refuse("no mark on the stack")
        self.stack.pop()
        return values[::-1]

    def bytes(self, count: int) -> memoryview:
        """The next bytes, as a window."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            self.position = start
            self.refuse(f"its end where {count} bytes were announced; it is truncated or damaged")
        return self.data[start : self.position]

    def unpack(self, form: struct.Struct) -> Any:
        """The next number."""
        return form.unpack(self.bytes(form.size))[0]

    def line(self) -> str:
        """The next line of text."""
        text = bytes(self.data[self.position : self.position + 100]).partition(b"\n")[0]
        self.bytes(len(text) + 1)
        return text.decode("latin-1")

    def refuse(self, found: str) -> NoReturn:
        """Say where the file holds something else than it should.

        Raises:
            FileFormatError: Always.
        """
        raise FileFormatError(f"{self.file}: byte {self.position}: found {found}")
