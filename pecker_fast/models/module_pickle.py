"""A network that was pickled as a whole, read for its weights and settings without running anything.

`PickleMachine` interprets the opcodes. Classes of torch.nn and diffusers become inert objects that only hold what the
file gives them; the few functions of torch that make tensors are done here; every other name is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from pecker_fast.errors import FileFormatError
from pecker_fast.foreign_weights import MODULE, WRAPPERS, unwrapped
from pecker_fast.models.pickled_storage import PickledStorage, PickledTensor, read_storage, refuse_torch_file, window
from pecker_fast.pickle_machine import PickleMachine

_ROLES = {
    "torch._utils _rebuild_parameter": "parameter",
    "torch._utils _rebuild_tensor_v2": "tensor",
    "torch.storage _load_from_bytes": "storage",
    "torch Size": "size",
    "torch device": "device",
    "collections OrderedDict": "dict",
    "builtins set": "set",
    **{f"{module} {system}Path": "path" for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")},
}
"""Paths are what diffusers notes down as the folder that a model came from."""
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_PACKAGES = ("torch.nn.", "diffusers.")
_T = TypeVar("_T")
_FLOAT = struct.Struct(">d")
_MAX_MODULES = 20_000
_MAX_DEPTH = 20
_MAX_TENSORS = 100_000
_LONGEST_NAME = 100
_MAX_NUMBERS = 32
"""In a setting that is a list."""


@dataclass(frozen=True)
class _Name:
    role: str
    full: str


class Inert:
    """Stands for an object of torch.nn or diffusers; has its state and its items, and does nothing."""

    __slots__ = ("items", "kind", "state")

    def __init__(self, kind: str) -> None:
        """Of the class with this name."""
        self.kind = kind
        self.state: dict[str, Any] | None = None
        self.items: dict[str, Any] = {}


@dataclass(frozen=True)
class PickledModule:
    """A network out of a pickle.

    Attributes:
        class_name: Such as "UNet2DConditionModel", without its module.
        config: The settings that diffusers keeps with a model: plain values; others are left out.
        tensors: What ``state_dict()`` would have had, not read yet.
    """

    class_name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, PickledTensor]


def read_module(file: Path, key: str) -> PickledModule:
    """Read one network of a file of ``pickle.dump({key: network, ...})``, protocols 3 to 5.

    Gives what ``pickle.load(open(file, "rb"))[key]`` would, as far as ``state_dict()`` and ``config`` go. Nothing in
    the file is run, imported or looked up, and memory stays within a small multiple of what its opcodes take.

    Args:
        file: The file.
        key: Of the network; other entries are read and dropped.

    Raises:
        FileFormatError: The file is missing, truncated, a file of ``torch.save``, or holds anything but networks of
            torch.nn and diffusers; names are told.
    """
    try:
        data = memoryview(np.memmap(file, dtype=np.uint8, mode="r"))  # type: ignore[arg-type]
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        reason = error.strerror if isinstance(error, OSError) else "it is empty"
        raise FileFormatError(f"{file}: cannot be read ({reason})") from error
    refuse_torch_file(file, data)
    values = _ModuleMachine(file, data).run()
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, Inert):
        has = f"a dict with {sorted(values)[:10]}" if isinstance(values, dict) else type(values).__name__
        raise FileFormatError(f"{file}: expected a pickled dict with a network as {key!r}, got {has}")
    found = _inner(file, found)
    tensors = unwrapped(str(file), dict(_walk(file, found)))
    return PickledModule(found.kind.rpartition(".")[2], _config(found), tensors)


class _ModuleMachine(PickleMachine):
    """The names that a network of torch.nn and diffusers is pickled with."""

    content: ClassVar[str] = "network"
    max_opcodes: ClassVar[int] = 2_000_000

    def __init__(self, file: Path, data: memoryview) -> None:
        super().__init__(file, data)
        self.storages = 0
        self.actions |= {
            "NEWOBJ": self._new,
            "EMPTY_SET": lambda: self.stack.append(set()),
            "ADDITEMS": self._add,
            "BINFLOAT": lambda: self.stack.append(self.unpack(_FLOAT)),
        }

    def name(self, module: str, attribute: str) -> _Name | None:
        full = f"{module} {attribute}"
        if full in _ROLES:
            return _Name(_ROLES[full], full)
        if module == "torch" and attribute in _DTYPES:
            return _Name("dtype", full)
        known = f"{module}.".startswith(_PACKAGES) and attribute.isidentifier() and len(full) <= 2 * _LONGEST_NAME
        return _Name("object", f"{module}.{attribute}") if known else None

    def call(self, function: Any, arguments: Any) -> Any:
        match getattr(function, "role", None), arguments:
            case "object", ():
                return Inert(function.full)
            case "dict", ():
                return {}
            case "storage", (bytes() | memoryview() as raw,):
                self.storages += 1
                if self.storages > _MAX_TENSORS:
                    self.refuse(f"more than {_MAX_TENSORS} storages, which is no network of this kind")
                return read_storage(self.file, raw)
            case "tensor", (PickledStorage() as storage, offset, size, stride, bool(), dict() as hooks) if not hooks:
                return self._tensor(storage, offset, size, stride)
            case "parameter", (PickledTensor() as tensor, bool(), dict() as hooks) if not hooks:
                return tensor
            case "size", (tuple(size),) | (list(size),):
                return tuple(size)
            case "device" | "path", tuple():
                return Inert(function.full)
            case "set", (list(items),):
                return self._texts(items)
        self.refuse(f"a call of {self._shown(function)} that a network of torch.nn or diffusers is not pickled with")

    def build(self, state: Any) -> None:
        target = self.stack[-1] if self.stack else None
        match target, state:
            case Inert(state=None), dict():
                target.state = state
            case _:
                self.refuse("a state that a network of torch.nn or diffusers is not pickled with")

    def update(self, values: list[Any] | tuple[Any, ...]) -> None:
        target = self.stack[-1] if self.stack else None
        if isinstance(target, Inert):  # of a class that is a dict
            self.stack[-1] = target.items
            super().update(values)
            self.stack[-1] = target
        else:
            super().update(values)

    def _new(self) -> None:
        function, arguments = self.pops(2)
        if getattr(function, "role", None) != "object" or arguments != ():
            self.refuse(f"an object of {self._shown(function)} with arguments")
        self.stack.append(Inert(function.full))

    def _add(self) -> None:
        items = self._texts(self.to_mark())
        if not self.stack or not isinstance(self.stack[-1], set):
            self.refuse("items for a set, but no set")
        self.stack[-1].update(items)

    def _texts(self, items: list[Any]) -> set[str]:
        if not all(isinstance(item, str) for item in items):
            self.refuse("a set of something else than texts")
        return set(items)

    def _tensor(self, storage: PickledStorage, offset: Any, size: Any, stride: Any) -> PickledTensor:
        tensor = window(storage, offset, size, stride)
        if tensor is None:
            self.refuse("a tensor whose shape does not fit its numbers")
        return tensor

    @staticmethod
    def _shown(function: Any) -> str:
        return function.full[:100] if isinstance(function, _Name) else type(function).__name__


def _inner(file: Path, network: Inert) -> Inert:
    """The network within DataParallel and the like, whose settings and class are what is asked for."""
    while len(children := _part(file, "", network, "_modules", Inert)) == 1 and children[0][0] in (MODULE, *WRAPPERS):
        network = children[0][1]
    return network


def _walk(file: Path, network: Inert) -> Iterator[tuple[str, PickledTensor]]:
    """Tensors by their names in the state dict."""
    pending, modules, tensors = [("", network, 0)], 0, 0
    while pending:
        prefix, module, depth = pending.pop()
        found = _tensors_of(file, prefix, module)
        children = _part(file, prefix, module, "_modules", Inert)
        pending += [(f"{prefix}{name}.", child, depth + 1) for name, child in children]
        modules, tensors = modules + 1, tensors + len(found)
        if depth > _MAX_DEPTH or modules + len(pending) > _MAX_MODULES or tensors > _MAX_TENSORS:
            raise FileFormatError(
                f"{file}: more than {_MAX_DEPTH} modules within one another, {_MAX_MODULES} modules or {_MAX_TENSORS} "
                f"tensors, which is no network of this kind"
            )
        yield from ((prefix + name, tensor) for name, tensor in found)


def _tensors_of(file: Path, prefix: str, module: Inert) -> list[tuple[str, PickledTensor]]:
    state = module.state or {}
    left_out = state.get("_non_persistent_buffers_set")
    buffers = _part(file, prefix, module, "_buffers", PickledTensor)
    kept = [(name, tensor) for name, tensor in buffers if not isinstance(left_out, set) or name not in left_out]
    return _part(file, prefix, module, "_parameters", PickledTensor) + kept


def _part(file: Path, prefix: str, module: Inert, name: str, kind: type[_T]) -> list[tuple[str, _T]]:
    """One of the three dicts of a module, without what is None."""
    values = (module.state or {}).get(name, {})
    items = list(values.items()) if isinstance(values, dict) else [("", None)]
    for key, value in items:
        if not key or "." in key or not (value is None or isinstance(value, kind)):
            raise FileFormatError(
                f"{file}: {prefix}{name}[{key!r}]: expected {kind.__name__}, got {type(value).__name__}"
            )
    return [(key, value) for key, value in items if value is not None]


def _config(network: Inert) -> dict[str, Any]:
    held = (network.state or {}).get("_internal_dict")
    items = held.items if isinstance(held, Inert) else {}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items.items() if _plain(value)}


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _MAX_NUMBERS and all(isinstance(item, bool | int | float | str) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
