"""What a step of every method takes, all in turn, so that a busy machine is busy for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm import tqdm

from pecker_fast.compare.contestants import Contestant, get_ready, held_tensors
from pecker_fast.compare.store import Line
from pecker_fast.mask import BlockMask
from pecker_fast.memory_meter import peak_mib

ROUNDS = 15
SETUPS, LONG_SETUP = 3, 5.0
"""Setups that are timed, and seconds after which no more are."""


def race(made: Mapping[str, Callable[[], Contestant]], progress: bool = True, known: Line | None = None) -> list[Line]:
    """Time every contestant's setup and steps; one line each.

    Steps are taken in turns, and medians reported: figures of one call compare with each other. With one thread on a
    CPU seconds are the processor's, which others who work there do not prolong; elsewhere they are those of the clock.

    Args:
        made: Method -> how its contestant is made.
        progress: Show a progress bar.
        known: The line of an earlier race; where its method takes part again, all seconds are scaled to it.

    Returns:
        Lines with "method", "setup_seconds", "step_seconds", "peak_mib", "flops" ("step", "setup"), "parameters",
        "trained" and "mask_density".
    """
    contestants, lines = {}, {}
    for name, make in tqdm(made.items(), desc="setting up", unit="method", disable=not progress):
        contestant, mask, setup = _set_up(make)
        contestants[name] = contestant
        flops = contestant.flops()
        contestant.step()  # what only a first step costs
        lines[name] = {
            "phase": "timing",
            "method": name,
            "setup_seconds": setup,
            "peak_mib": peak_mib(contestant.step, held_tensors(contestant), contestant.device),
            "flops": {
                "step": flops["total"],
                "setup": sum(flops.get(k, {}).get("total", 0) for k in ("mask", "setup")),
            },
            "parameters": mask.total,
            "trained": mask.numel,
            "mask_density": mask.density,
        }
    seconds = _in_turns(contestants, progress)
    scale = 1.0 if known is None else known["step_seconds"] / seconds[known["method"]]
    for name, line in lines.items():
        line |= {"step_seconds": seconds[name] * scale, "setup_seconds": line["setup_seconds"] * scale}
    return [line for name, line in lines.items() if known is None or name != known["method"]]


def _set_up(make: Callable[[], Contestant]) -> tuple[Contestant, BlockMask, float]:
    """A contestant that is ready, its mask, and the median seconds of that; once, where it takes long."""
    times: list[float] = []
    while len(times) < SETUPS and sum(times) < LONG_SETUP:
        contestant = make()
        now = _clock(contestant.device)
        started = now()
        mask = get_ready(contestant)
        _wait(contestant.device)
        times.append(now() - started)
    return contestant, mask, statistics.median(times)


def _in_turns(contestants: Mapping[str, Contestant], progress: bool) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in tqdm(range(ROUNDS), desc="timing steps", unit="round", disable=not progress):
        for name, contestant in contestants.items():
            now = _clock(contestant.device)
            started = now()
            contestant.step()
            _wait(contestant.device)
            times[name].append(now() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _clock(device: torch.device) -> Callable[[], float]:
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def of(lines: Sequence[Line]) -> dict[str, Line]:
    """Method -> its timing."""
    return {line["method"]: line for line in lines if line["phase"] == "timing"}
