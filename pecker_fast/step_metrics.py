"""The numbers of a training step, fetched from the device while it goes on with the next."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from pecker_fast.errors import NonFiniteError


class Fetch(Protocol):
    """Numbers on their way to the host."""

    def arrived(self) -> bool:
        """Whether ``numbers`` would not wait."""
        ...

    def numbers(self) -> list[float]:
        """The numbers; waits for them."""
        ...


class StepMetrics(Mapping[str, float]):
    """Step and losses of one step: a mapping to floats, which waits for the device when a loss is first read.

    The numbers are copied as soon as they are computed, into pinned memory; that copy alone is waited for, not what the
    device was given since. On the CPU they are there at once. ``dict(metrics)`` reads all.

    Args:
        step: Number of the step.
        losses: Name -> 0-d tensor, all of one dtype and device.
    """

    def __init__(self, step: int, losses: Mapping[str, Tensor]) -> None:
        self.step = step
        self._names = tuple(losses)
        self._fetch: Fetch | None = fetch(torch.stack([loss.detach() for loss in losses.values()]))
        self._read: dict[str, float] = {}

    def arrived(self) -> bool:
        """Whether reading would not wait."""
        return self._fetch is None or self._fetch.arrived()

    def _losses(self) -> dict[str, float]:
        if self._fetch is not None:
            self._read = dict(zip(self._names, self._fetch.numbers(), strict=True))
            self._fetch = None  # its memory serves the next step
        return self._read

    def __getitem__(self, name: str) -> float:
        return self.step if name == "step" else self._losses()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("step", *self._names))

    def __len__(self) -> int:
        return 1 + len(self._names)

    def __repr__(self) -> str:
        return repr(dict(self)) if self.arrived() else f"<step {self.step}, still computed>"


def check_finite(metrics: Mapping[str, float]) -> None:
    """Read all numbers of a step, and wait for them where they are still computed.

    Raises:
        NonFiniteError: One is NaN or infinite.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"step {metrics['step']}: {name} is {value}; lower the learning rates or raise warmup_steps"
            )


def checked(steps: Iterable[StepMetrics]) -> Iterator[StepMetrics]:
    """Pass on what each step measured, and stop at numbers that are not finite as soon as they are known.

    No step waits for that: those of a device that is still computing are looked at after a later step, or after the
    last one. A loop that is left early, by ``break``, never comes to the last ones: who goes on with what was computed
    calls ``check_finite`` on them.

    Raises:
        NonFiniteError: A loss is NaN or infinite.
    """
    unread: deque[StepMetrics] = deque()
    for metrics in steps:
        unread.append(metrics)
        while unread and unread[0].arrived():
            check_finite(unread.popleft())
        yield metrics
    for metrics in unread:
        check_finite(metrics)


def fetch(numbers: Tensor) -> Fetch:
    """Begin to copy ``numbers`` (n,) to the host."""
    return _FromDevice(numbers) if numbers.is_cuda else _There(numbers)


class _There:
    """On the CPU, where a loss that is there is computed; and of devices that copy only while the host waits."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers

    def arrived(self) -> bool:
        return True

    def numbers(self) -> list[float]:
        return list(self._numbers.tolist())


class _FromDevice:
    """A copy behind the work that the device has been given so far."""

    def __init__(self, numbers: Tensor) -> None:
        self._host = torch.empty_like(numbers, device="cpu", pin_memory=True)
        self._host.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(numbers.device))

    def arrived(self) -> bool:
        return bool(self._copied.query())

    def numbers(self) -> list[float]:
        self._copied.synchronize()
        return list(self._host.tolist())
