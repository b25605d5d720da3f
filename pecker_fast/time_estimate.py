"""How long training will take, from what it computes and how fast this machine does."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from pecker_fast.distiller import MaskedDistiller
from pecker_fast.flops import count_flops
from pecker_fast.iteration_flops import without_data
from pecker_fast.memory_parts import Trainer, networks_of

By = Literal["network", "matmul"]
SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the product that is timed."""


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of a run.

    Attributes:
        steps: How many.
        step_seconds: Of one.
        setup_seconds: Of what comes before the first: choosing the mask, remembering.
        flops_per_second: What was measured here.
        by: Whether on the network itself ("network": a forward and backward of the true score) or on a large product
            ("matmul": a bound from below, networks do not come near it).
    """

    steps: int
    step_seconds: float
    setup_seconds: float
    flops_per_second: float
    by: By

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.setup_seconds + self.steps * self.step_seconds

    def describe(self) -> str:
        """A line for people."""
        how = {
            "network": "a forward and backward pass timed here",
            "matmul": "a product timed here, at least",
        }
        rate = f"{self.flops_per_second / 1e9:.3g} GFLOP/s"
        return (
            f"estimated time: {_duration(self.seconds)} ({self.steps} steps of {_duration(self.step_seconds)}, "
            f"{_duration(self.setup_seconds)} before them), by {how[self.by]} ({rate})"
        )


def estimate_seconds(trainer: Trainer, steps: int, by: By = "network") -> TimeEstimate:
    """Time to finish: counted FLOPs of the run over FLOPs a second, measured here and now.

    Elementwise work, norms, optimizers and saving are not in it. Nothing of the run changes, no random number is drawn.

    Args:
        trainer: A ``MaskedDistiller`` or ``Baseline`` that has a mask.
        steps: Iterations.
        by: Measure "network", one warm forward and backward of the true score on a batch (of one micro-batch, where the
            trainer takes them), or "matmul", a large product of its dtype.

    Raises:
        RuntimeError: There is no mask yet.
        ValueError: ``steps`` is no positive integer, or ``by`` unknown.
    """
    if by not in get_args(By):
        raise ValueError(f"estimate_seconds: by: expected one of {', '.join(get_args(By))}, got {by!r}")
    counted = _at_once(trainer).flops(steps)
    setup = sum(counted.get(part, {}).get("total", 0) for part in ("mask", "setup"))
    rate = _of_network(trainer) if by == "network" else _of_matmul(trainer)
    return TimeEstimate(steps, counted["total"] / rate, setup / rate, rate, by)


def _at_once(trainer: Trainer) -> Trainer:
    """The same without micro-batches, which compute as much, and take longer to be counted."""
    if not isinstance(trainer, MaskedDistiller) or trainer.config.micro_batch_size is None:
        return trainer
    whole = copy.copy(trainer)
    whole.config = dataclasses.replace(trainer.config, micro_batch_size=None)
    whole.losses = dataclasses.replace(trainer.losses, config=whole.config)
    return whole


def _of_network(trainer: Trainer) -> float:
    with count_flops() as counted:
        _forward_backward(without_data(trainer, tuple(networks_of(trainer))))()
    return counted.total / _seconds(_forward_backward(trainer), trainer.device)


def _forward_backward(trainer: Trainer) -> Callable[[], object]:
    """Of the true score, which draws nothing; the gradient is that of its input."""
    config = trainer.config
    count = getattr(config, "micro_batch_size", None) or config.batch_size
    leaf = torch.zeros((count, *config.sample_shape), device=trainer.device, dtype=trainer.dtype, requires_grad=True)
    x = leaf.clone()  # torch's counter cannot follow a gradient of a leaf
    index = torch.zeros(count, dtype=torch.int64, device=trainer.device)

    def run() -> object:
        prediction = trainer.losses.predict(trainer.true_score, x, index, index)
        return torch.autograd.grad(prediction, x, prediction.detach())

    return run


def _of_matmul(trainer: Trainer) -> float:
    dtype = next(trainer.true_score.parameters()).dtype
    side = SIDE[trainer.device.type]
    a, b = (torch.ones(side, side, device=trainer.device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: a @ b, trainer.device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of the second call."""
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
