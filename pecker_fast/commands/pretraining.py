"""``pecker-fast pretrain`` in several calls: checkpoints, and going on from the model alone where they are lost."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pecker_fast import models
from pecker_fast.checkpoint import read_json
from pecker_fast.commands.resuming import stop_after_step
from pecker_fast.errors import FileFormatError
from pecker_fast.models import DDPMUNet
from pecker_fast.pretrain_checkpoint import Checkpoints

REPORT_NAME = "pretrain.json"


@dataclass(frozen=True)
class Earlier:
    """What is known of earlier calls whose checkpoints are lost.

    Attributes:
        steps_done: Steps of the schedule that are behind.
        seconds: What they took.
        restarts: Steps after which the training went on from the averaged weights alone.
    """

    steps_done: int = 0
    seconds: float = 0.0
    restarts: tuple[int, ...] = ()

    @classmethod
    def of(cls, options: argparse.Namespace, model: DDPMUNet, summary: Mapping[str, Any]) -> Earlier:
        """What ``--init`` names, with its weights put into ``model``.

        Raises:
            FileFormatError: The folder is missing or damaged, or not of an earlier call.
            ValueError: It is of other settings, or has no steps left; or a checkpoint is asked for too.
        """
        if options.init is None:
            return cls()
        if options.resume_from_checkpoint is not None:
            raise ValueError("--init: a checkpoint has weights of its own; give it or --resume_from_checkpoint")
        path = options.init / REPORT_NAME
        report, start = read_json(path), models.load(options.init, torch.float32)
        if not isinstance(start, DDPMUNet) or start.config != model.config:
            raise ValueError(f"--init: {options.init} is another network than these flags ask for")
        for name, value in summary.items():
            if report.get(name) != value:
                raise ValueError(
                    f"{path}: was trained with {name} = {report.get(name)!r:.80}, here it is {value!r:.80}"
                )
        try:
            done, restarts = int(report["steps_done"]), tuple(map(int, report["restarts"]))
            earlier = cls(done, float(report["seconds"]), (*restarts, done))
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: incomplete: {error!r}; start anew") from error
        if not 0 < done < options.max_train_steps:
            raise ValueError(f"--init: {path} says that {done} of {options.max_train_steps} steps are done")
        model.load_state_dict(start.state_dict())
        return earlier


@contextmanager
def checkpoints_of(options: argparse.Namespace, earlier: Earlier) -> Iterator[Checkpoints | None]:
    """What the flags ask for; with it, SIGINT and SIGTERM wait for the step to end and a checkpoint to be written.

    Raises:
        ValueError: A limit on checkpoints, and none are written.
    """
    every, resume, limit = options.checkpointing_steps, options.resume_from_checkpoint, options.max_train_seconds
    if every is None and resume is None and limit is None:
        if options.checkpoints_total_limit is not None:
            raise ValueError("--checkpoints_total_limit: there are no checkpoints; give --checkpointing_steps too")
        yield None
        return
    with stop_after_step() as interrupted:
        yield Checkpoints(
            options.output_dir,
            every=every,
            total_limit=options.checkpoints_total_limit,
            resume_from=resume,
            max_seconds=limit,
            interrupted=interrupted,
            extra={"restarts": list(earlier.restarts)},
            seconds=earlier.seconds,
        )


def machine(model: nn.Module) -> dict[str, str]:
    """Where it was trained."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "torch": torch.__version__}
