"""The ways in which a GPU can compute the weight gradient of active blocks, and the choice between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping

from torch import Tensor

from pecker_fast import native
from pecker_fast.blocks import ParameterMask
from pecker_fast.once import known, once, remembered
from pecker_fast.ops import triton_kernels
from pecker_fast.ops.dispatch import Op
from pecker_fast.ops.fastest import Choice, fastest, why_not_measured
from pecker_fast.ops.layout import is_channels_last
from pecker_fast.ops.problem import Problem
from pecker_fast.ops.slabs import gathered_weight_grad, masked_weight_grad_cpu, masked_weight_grad_reference, slabs_pay
from pecker_fast.ops.tiled_weight_grad import precision, tiled_weight_grad, why_not


def _slabs(problem: Problem) -> Tensor:
    on_cpu = problem.input.device.type == "cpu" and native.available()
    return (masked_weight_grad_cpu if on_cpu else masked_weight_grad_reference)(problem)


WAYS: Mapping[str, Callable[[Problem], Tensor]] = {
    "triton": tiled_weight_grad,
    "slabs": _slabs,
    "dense": gathered_weight_grad,
}
"""By our kernel; as the library's dense products of slabs of channels; the whole weight's, and then gathered."""


_measured: dict[tuple[Hashable, ...], Choice] = {}


def choose_way(problem: Problem) -> Choice:
    """The fastest way for problems like this one, measured on the first of them and remembered for the mask.

    Another mask with as many blocks of as large a weight takes the same, so that a mask that changes costs no new
    measurement. While a CUDA graph is captured, or deterministic algorithms are asked for, nothing is measured.
    """
    operands = (problem.grad_output, problem.input)
    layout = [(x.shape, x.dtype, x.device, is_channels_last(x)) for x in operands]
    key = ("way", problem.mask.grid, problem.geometry[0][0], precision(problem), *layout)
    reason = None if known(problem.mask.active, key) else why_not_measured()
    if reason is not None:
        return once(problem.mask.active, ("way", "usual", *key), lambda: usual_way(problem, reason))
    return once(problem.mask.active, key, lambda: _measured_once(problem, (*key, len(problem.mask.active))))


def _measured_once(problem: Problem, key: tuple[Hashable, ...]) -> Choice:
    if key not in _measured:
        _measured[key] = measure_ways(problem)
    return _measured[key]


def measure_ways(problem: Problem) -> Choice:
    """Time every way that takes this problem."""
    candidates = {name: functools.partial(WAYS[name], problem) for name in possible_ways(problem)}
    return fastest(candidates, problem.input.device)


def chosen_ways(mask: ParameterMask) -> list[Choice]:
    """What was chosen for the problems that a mask has had so far."""
    return [choice for key, choice in remembered(mask.active) if key[0] == "way"]


def possible_ways(problem: Problem) -> list[str]:
    """Names of the ways that take this problem on its device."""
    slabs = slabs_pay(problem.mask.grid, problem.geometry[3]) and not problem.mask.is_full  # else they are the whole
    kernel = problem.input.device.type == "cuda" and triton_kernels.why_not() is None and why_not(problem) is None
    return [name for name in WAYS if {"triton": kernel, "slabs": slabs, "dense": True}[name]]


def usual_way(problem: Problem, why: str) -> Choice:
    """Where nothing is measured: our kernel for tiles, which no library has; a library for rows, which are dense."""
    possible = possible_ways(problem)
    if "triton" in possible and not problem.mask.grid.is_rows:
        return Choice("triton", why)
    return Choice("slabs" if "slabs" in possible else "dense", why)


def backend_for(op: Op, problem: Problem, backend: str | None) -> str:
    """The backend that runs; a problem that our kernel does not take is the library's, unless the kernel was named.

    Raises:
        ValueError: The kernel was asked for and does not take the problem.
        RuntimeError: The backend that was asked for cannot run here.
    """
    name = op.choose(problem.input.device, backend)
    reason = why_not(problem) if name == "triton" else None
    if reason is None:
        return name
    if backend is not None or op.requested() is not None:
        raise ValueError(f"{op.name}: backend 'triton' {reason}; leave the backend open, or take 'reference'")
    return "reference"
