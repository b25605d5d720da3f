"""What runs beneath a benchmark: the fast backends that it means, or nothing is timed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pecker_fast
from pecker_fast import native
from pecker_fast.ops.dispatch import OPS, Op

USED: dict[str, str] = {}
"""Op -> the backend that it took because none was named."""


@contextmanager
def fast_only() -> Iterator[None]:
    """Within the block an op raises where it would take the reference in place of a fast backend that is missing.

    Who names the reference, as an opponent, gets it.
    """
    weight_grads: Any = importlib.import_module("pecker_fast.ops.masked_weight_grad")
    preferred, choose_way = Op.preferred, weight_grads.choose_way

    def fast(op: Op, device: str) -> str:
        name = preferred(op, device)
        if name == "reference" and op.prefer.get(device):
            raise RuntimeError(_refusal(op, device))
        USED[op.name] = name
        return name

    def way_beside_the_kernel(problem: Any) -> Any:  # on a GPU the library's ways may win, but against our kernel
        fast(OPS["masked_weight_grad"], problem.input.device.type)
        return choose_way(problem)

    Op.preferred, weight_grads.choose_way = fast, way_beside_the_kernel  # type: ignore[method-assign]
    try:
        yield
    finally:
        Op.preferred, weight_grads.choose_way = preferred, choose_way  # type: ignore[method-assign]


def _refusal(op: Op, device: str) -> str:
    reasons = "; ".join(f"{name}: {op.why_not(name, device)}" for name in op.prefer[device])
    return (
        f"{op.name}: this benchmark means {' or '.join(op.prefer[device])}, and in {_package()} only the plain-torch "
        f"reference runs for {device!r}. Nothing is timed. {reasons}"
    )


def _package() -> Path:
    return Path(pecker_fast.__file__).parent


def described() -> list[str]:
    """What was imported, and what ran: a line each."""
    build = native.load().build_info() if native.available() else None
    lines = [
        f"pecker_fast {pecker_fast.__version__} of {_package()}, native module: "
        + (f"{build['isa_selected']}{', CUDA' if build['cuda'] else ''}" if build else "none")
    ]
    if USED:
        lines.append("backends: " + ", ".join(f"{op} {name}" for op, name in sorted(USED.items())))
    return lines
