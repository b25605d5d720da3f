"""``pecker-fast doctor``: what is installed, what is used, and why not the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from dataclasses import asdict
from typing import Any

import torch

import pecker_fast
from pecker_fast import native
from pecker_fast.commands import Outcome, iteration
from pecker_fast.commands.source import SWITCH_FLAGS, torch_device
from pecker_fast.crossovers import Measured, measure_crossovers

_PACKAGES = ("torch", "numpy", "safetensors", "triton", "diffusers", "matplotlib", "scikit-learn")
_OF_FLOPS = ("model", "mask_density", "block", "max_train_steps", "fake_score_mask", *SWITCH_FLAGS)


def run(options: argparse.Namespace) -> Outcome:
    """Look around; nothing is changed, and optional packages are not imported."""
    _refuse_idle_flags(options)
    versions = {"pecker_fast": pecker_fast.__version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in _PACKAGES}
    build: Any = native.load().build_info() if native.available() else native.why_not()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = {
        "system": platform.platform(),
        "cpu_isa": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
    table = pecker_fast.backends()
    choices = {
        op: {device: {"used": choice.used, "not_used": choice.not_used} for device, choice in devices.items()}
        for op, devices in table.items()
    }
    values = {"versions": versions, "machine": machine, "native": build, "backends": choices}
    sections = {"versions": versions, "machine": machine, "native": build}
    text = "\n\n".join([*(_section(name, entries) for name, entries in sections.items()), f"backends\n{table!r}"])
    if options.measure:
        measured = measure_crossovers(torch_device(options.device), progress=not options.quiet)
        rows = [{"layer": m.layer, "block": m.block, "density": m.density, **asdict(m.choice)} for m in measured]
        values, text = values | {"weight_gradients": rows}, f"{text}\n\n{_crossovers(measured)}"
    if options.flops:
        counted, lines = iteration.count(options)
        values, text = values | {"flops": counted}, f"{text}\n\n{lines}"
    return Outcome(values, text)


def _refuse_idle_flags(options: argparse.Namespace) -> None:
    """Flags of a count that is not asked for."""
    for flag in _OF_FLOPS:
        if getattr(options, flag) is not None and not options.flops:
            raise ValueError(f"--{flag} says what --flops counts; add --flops")


def _crossovers(measured: list[Measured]) -> str:
    """One line a layer and density: what is fastest, and the time of every way."""
    lines = ["weight gradients of random blocks, milliseconds of each way"]
    for m in measured:
        block = m.block if isinstance(m.block, str) else "x".join(map(str, m.block))
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in m.choice.ms.items())
        lines.append(f"  {m.layer:<46}{block:<8}{m.density:<7g}{m.choice.used:<8}{times}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _section(name: str, entries: Any) -> str:
    if not isinstance(entries, dict):
        return f"{name}\n  {entries}"
    lines = []
    for key, value in entries.items():
        shown = (", ".join(map(str, value)) or "none") if isinstance(value, list) else value
        lines.append(f"  {key:<20}{shown}")
    return "\n".join([name, *lines])
