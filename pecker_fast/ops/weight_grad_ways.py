"""The ways in which a GPU can compute the weight gradient of active blocks, and the choice between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from pecker_fast import native
from pecker_fast.blocks import ParameterMask
from pecker_fast.once import once, remembered
from pecker_fast.ops import triton_kernels
from pecker_fast.ops.dispatch import Op
from pecker_fast.ops.fastest import Choice, fastest, why_fixed, why_not_measured
from pecker_fast.ops.layout import is_channels_last
from pecker_fast.ops.problem import Problem
from pecker_fast.ops.slabs import gathered_weight_grad, masked_weight_grad_cpu, masked_weight_grad_reference, slabs_pay
from pecker_fast.ops.tiled_weight_grad import precision, tiled_weight_grad, why_not
from pecker_fast.ops.tiles import power_of_two


def _slabs(problem: Problem) -> Tensor:
    on_cpu = problem.input.device.type == "cpu" and native.available()
    return (masked_weight_grad_cpu if on_cpu else masked_weight_grad_reference)(problem)


WAYS: Mapping[str, Callable[[Problem], Tensor]] = {
    "triton": tiled_weight_grad,
    "slabs": _slabs,
    "dense": gathered_weight_grad,
}
"""By our kernel; as the library's dense products of slabs of channels; the whole weight's, and then gathered."""

Kind: TypeAlias = tuple[Hashable, ...]

_measured: dict[Kind, Choice] = {}
"""What was measured in this process, or restored from a checkpoint, for every kind of problem."""
_restored: dict[str, str] = {}
"""Choices of a checkpoint whose problems have not come by yet: text of a kind -> name of its way."""


def choose_way(problem: Problem) -> Choice:
    """The fastest way for problems of this kind, measured on the first of them.

    A choice holds for every mask with as many active blocks of as large a weight, so that a mask that changes costs no
    new measurement. It is used for nothing that its way does not take. Where results must repeat, no measured choice is
    used, old or new; while a CUDA graph is captured, none is measured.
    """
    kind = kind_of(problem)
    choice = _choice(problem, kind)
    return once(problem.mask.active, ("way", kind, choice.used, choice.why), lambda: choice)


def _choice(problem: Problem, kind: Kind) -> Choice:
    if reason := why_fixed():
        return usual_way(problem, reason)
    choice = _known(kind)
    if choice is None:
        if reason := why_not_measured():
            return usual_way(problem, reason)
        choice = _measured[kind] = measure_ways(problem)
    if not takes(choice.used, problem):
        return usual_way(problem, f"{choice.used!r} is the way for such problems, and does not take this one")
    return choice


def kind_of(problem: Problem) -> Kind:
    """All that decides which ways take a problem, and which is the fastest; of sizes the next power of two.

    Its text is the same in every process, and on every device of the same name.
    """
    mask, device, sizes = problem.mask, problem.input.device, problem.grad_output.shape
    lengths = [problem.positions] if problem.is_linear else [sizes[0], *sizes[2:]]
    stride, padding, dilation, groups = problem.geometry
    return (
        *(mask.grid, len(mask.active), problem.channels_last),
        *(tuple(stride), tuple(padding), tuple(dilation), groups),
        *(power_of_two(length) for length in lengths),
        *((x.dtype, x.is_contiguous(), is_channels_last(x)) for x in (problem.grad_output, problem.input)),
        *(precision(problem), _autocast_dtype(device.type), torch.backends.cudnn.enabled, _name_of(device)),
    )


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """What the library's products are narrowed to where backward() is called under autocast."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


@functools.cache
def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _known(kind: Kind) -> Choice | None:
    if _restored and kind not in _measured and (way := _restored.pop(str(kind), None)):
        _measured[kind] = Choice(way, "restored from a checkpoint")
    return _measured.get(kind)


def choices_to_save(masks: Iterable[ParameterMask]) -> dict[str, str]:
    """Measured choices for the problems of some masks, for a checkpoint: measured again, they might be others.

    Returns:
        Text of a kind of problem -> name of its way, sorted. What was restored and not needed yet is among them.
    """
    kinds = {key[1] for mask in masks for key, _ in remembered(mask.active) if key[0] == "way"}
    measured = {str(kind): choice.used for kind, choice in _measured.items() if kind in kinds}
    return dict(sorted({**_restored, **measured}.items()))


def restore_choices(saved: Mapping[str, str]) -> None:
    """From now on use the choices of a checkpoint, in place of this process's own for the same kinds of problems.

    Raises:
        ValueError: They are not what ``choices_to_save`` gives; nothing is changed.
    """
    check_choices(saved, "ways of weight gradients")
    _restored.update(saved)
    for kind in [kind for kind in _measured if str(kind) in saved]:
        del _measured[kind]


def check_choices(saved: object, where: str) -> None:
    """Refuse what ``choices_to_save`` does not give.

    Raises:
        ValueError: It is no mapping from kinds of problems to names of ways, in the name of ``where``.
    """
    if not isinstance(saved, Mapping) or not all(isinstance(kind, str) and way in WAYS for kind, way in saved.items()):
        raise ValueError(
            f"{where}: expected kinds of problems, each with one of {', '.join(WAYS)}, got {saved!r:.80}; take what "
            f"was saved with this version"
        )


def measure_ways(problem: Problem) -> Choice:
    """Time every way that takes this problem."""
    candidates = {name: functools.partial(WAYS[name], problem) for name in possible_ways(problem)}
    return fastest(candidates, problem.input.device)


def chosen_ways(mask: ParameterMask) -> list[Choice]:
    """What was chosen for the problems that a mask has had so far."""
    return [choice for key, choice in remembered(mask.active) if key[0] == "way"]


def possible_ways(problem: Problem) -> list[str]:
    """Names of the ways that take this problem on its device: the kernel is for GPUs."""
    on_gpu = problem.input.device.type == "cuda"
    return [name for name in WAYS if (on_gpu or name != "triton") and takes(name, problem)]


def takes(way: str, problem: Problem) -> bool:
    """Whether a way takes this problem, on a device that it is for."""
    if way == "triton":
        return triton_kernels.why_not() is None and why_not(problem) is None
    slabs = slabs_pay(problem.mask.grid, problem.geometry[3]) and not problem.mask.is_full  # else they are the whole
    return slabs if way == "slabs" else True


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
