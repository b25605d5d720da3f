"""One operation, its backends, and which of them runs.

Choice: an explicit ``backend=``, then ``use_backend(...)``, then the measured preference of the op, then the reference.
What was asked for and is missing raises with the original cause; nothing falls back silently.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

NAMES = ("reference", "cpu", "triton", "cuda")
DEVICES = ("cpu", "cuda")

library = torch.library.Library("pecker_fast", "DEF")
"""Where every op declares its schema: ``torch.ops.pecker_fast.<op>``."""

_requested: str | None = None
"""What ``use_backend`` asks for; of the whole process, because autograd runs a GPU's backward in threads of its own."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        run: The implementation, with the op's own arguments.
        devices: Device types whose tensors it takes.
        why_not: Why it cannot run here, or None if it can. Called only when the backend is considered.
    """

    run: Callable[..., Any]
    devices: tuple[str, ...] = DEVICES
    why_not: Callable[[], str | None] = lambda: None


@dataclass
class Op:
    """An operation and the table of its backends.

    Attributes:
        name: Name of the op, also in error messages and in ``torch.ops.pecker_fast``.
        backends: Name of the backend -> implementation; "reference" is always there.
        prefer: Device type -> backends in the order that was measured to be best.
    """

    name: str
    backends: Mapping[str, Backend]
    prefer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _warned: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def choose(self, device: torch.device, backend: str | None = None) -> str:
        """Name of the backend that runs on ``device``.

        Raises:
            ValueError: ``backend`` is not the name of a backend.
            RuntimeError: The backend that was asked for cannot run here; the message says why.
        """
        asked = backend or self.requested()
        if asked is not None:
            reason = self.why_not(asked, device.type)
            if reason is not None:
                raise RuntimeError(f"{self.name}: backend {asked!r} cannot run on {device.type!r}: {reason}")
            return asked
        used = self.preferred(device.type)
        if used == "reference" and device.type == "cuda" and not self._warned:
            self._warned = True
            warnings.warn(f"{self.name}: no fast backend on {device.type!r}, the slow reference is used", stacklevel=3)
        return used

    def preferred(self, device: str) -> str:
        """The best backend that can run for tensors on ``device``."""
        ranked = (*self.prefer.get(device, ()), "reference")
        return next(name for name in ranked if self.why_not(name, device) is None)

    def requested(self) -> str | None:
        """What ``use_backend`` asks for, if it was ever written for this op."""
        return _requested if _requested in self.backends else None

    def why_not(self, name: str, device: str) -> str | None:
        """Why backend ``name`` is not available for tensors on ``device``; None if it is."""
        _check_name(name)
        if name not in self.backends:
            return "not written for this op"
        candidate = self.backends[name]
        if name != "reference" and device not in candidate.devices:
            return f"takes tensors on {' or '.join(candidate.devices)} only"
        return candidate.why_not()

    def run(self, backend: str, *args: Any, **kwargs: Any) -> Any:
        """Call one backend by name."""
        return self.backends[backend].run(*args, **kwargs)


OPS: dict[str, Op] = {}
"""Every op by name; filled as the files of ``pecker_fast.ops`` are imported."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every op that has backend ``name`` uses it, and raises where it cannot run; in all threads.

    Args:
        name: "reference", "cpu", "triton" or "cuda". An op that was never written for it keeps its own choice.
    """
    global _requested
    _check_name(name)
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


@dataclass(frozen=True)
class Choice:
    """What runs for one op on one device type, and why the others do not."""

    used: str
    not_used: dict[str, str]


class BackendTable(dict[str, dict[str, Choice]]):
    """Op -> device type -> ``Choice``; prints as a table."""

    def __repr__(self) -> str:
        lines = [f"{'op':<22}{'device':<8}{'used':<11}not used"]
        for op, devices in self.items():
            for device, choice in devices.items():
                reasons = dict.fromkeys(choice.not_used.values())
                others = "; ".join(
                    f"{', '.join(name for name, why in choice.not_used.items() if why == reason)}: {reason}"
                    for reason in reasons
                )
                lines.append(f"{op:<22}{device:<8}{choice.used:<11}{others}")
        return "\n".join(lines)


def backends() -> BackendTable:
    """What is used for every op on every device type, and why not the others."""
    table = BackendTable()
    for op in OPS.values():
        table[op.name] = {device: _choice(op, device) for device in DEVICES}
    return table


def _choice(op: Op, device: str) -> Choice:
    if device == "cuda" and not torch.cuda.is_available():
        return Choice("none", dict.fromkeys(NAMES, "no CUDA device here"))
    reasons = {name: op.why_not(name, device) for name in NAMES}
    requested = op.requested()
    used = requested if requested and reasons[requested] is None else op.preferred(device)
    return Choice(used, {name: why or "not preferred" for name, why in reasons.items() if name != used})


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
