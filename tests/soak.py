"""Kill ``pecker-fast unlearn`` again and again, resume it, and compare what comes out with an uninterrupted run.

Run it: python tests/soak.py [--kills 200] [--seed 0] [--max_train_steps 6]

Every second kill comes at any moment, every other one while something is being written. Needs fork.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from pecker_fast import models
from pecker_fast.checkpoint import read_safetensors
from pecker_fast.checkpoint_folders import finished
from pecker_fast.cli import main
from pecker_fast.distill_checkpoint import KIND
from pecker_fast.models import DDPMUNet
from pecker_fast.schedule import NoiseSchedule

SAME = ("distill_config.json", "metrics.jsonl")
TENSORS = (
    "model/diffusion_pytorch_model.safetensors",
    "delta/pecker_delta.safetensors",
    "mask.safetensors",
)
_PATIENCE = 120.0
"""Seconds in which a run ends that nobody kills."""


@dataclass
class Tally:
    """What happened.

    Attributes:
        kills: Runs that were killed.
        while_writing: Those of them that were writing something.
        finished: Trainings that came to their end.
        wrong: What was not as in the uninterrupted one.
    """

    kills: int = 0
    while_writing: int = 0
    finished: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.kills} kills, {self.while_writing} of them while it wrote; {self.finished} trainings finished"
        return f"{text}, all as the uninterrupted one" if not self.wrong else "\n".join([text, *self.wrong])


def soak(place: Path, kills: int, seed: int = 0, steps: int = 6, *, progress: bool = True) -> Tally:
    """Kill and resume until there were so many kills and the last training is finished.

    Args:
        place: An empty folder.
        kills: How many.
        seed: Of the moments; what they hit also depends on the machine.
        steps: Of each training, with a checkpoint after each.
        progress: Whether to show a bar.
    """
    draw, tally = random.Random(seed), Tally()
    _write_teacher(place / "teacher")
    models.load(place / "teacher")  # what torch imports for that takes longer than the training: once, before we fork
    started = time.perf_counter()
    with _child(place, "whole", steps) as child:
        if (code := _wait(child, _PATIENCE)) != 0:
            raise RuntimeError(f"the uninterrupted training ended with {code}")
    seconds = time.perf_counter() - started
    with tqdm(total=kills, desc="soak", unit="kill", disable=not progress) as bar:
        while tally.kills < kills:
            out = f"run{tally.finished}"
            while not _one(place, out, steps, draw, seconds if tally.kills < kills else None, tally):
                bar.update()
            tally.finished += 1
            tally.wrong += [f"{out}: {what}" for what in _differences(place / out, place / "whole")]
    return tally


def _one(place: Path, out: str, steps: int, draw: random.Random, seconds: float | None, tally: Tally) -> bool:
    """One process, killed unless ``seconds`` is None; whether the training is finished."""
    with _child(place, out, steps) as child:
        if seconds is None:
            code = _wait(child, _PATIENCE)
        elif draw.random() < 0.5:
            code = _wait(child, draw.uniform(0, seconds))
        else:
            code = _wait_until_it_writes(child, place / out, draw.randrange(2 * steps), draw.uniform(0, 0.01))
            tally.while_writing += code is None
        if code is not None:
            if code != 0:
                raise RuntimeError(f"{place / out}: ended with {code}; it is left as it is")
            return True
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    tally.kills += 1
    return False


@contextmanager
def _child(place: Path, out: str, steps: int) -> Iterator[int]:
    """A process that runs the command, resuming where there is a checkpoint."""
    flags = ["--pretrained_model_name_or_path", place / "teacher", "--forget_class", 3, "--output_dir", place / out]
    flags += ["--train_batch_size", 4, "--forget_batch_size", 4, "--t_init", 500, "--mask", "random", "--quiet"]
    flags += ["--max_train_steps", steps, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    if finished(place / out, KIND):
        flags += ["--resume_from_checkpoint", "latest"]
    child = os.fork()
    if child == 0:
        code = 70
        try:
            torch.manual_seed(0)  # dropout draws from it
            code = main(["unlearn", *map(str, flags)])
        finally:
            os._exit(code)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            if os.waitpid(child, os.WNOHANG)[0] == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _wait(child: int, seconds: float) -> int | None:
    """Its exit code; None if it has not ended by then."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def _wait_until_it_writes(child: int, folder: Path, skip: int, seconds: float) -> int | None:
    """Its exit code; None a bit after something appears that is not finished, ``skip`` others before it."""
    seen: set[str] = set()
    until = time.perf_counter() + _PATIENCE
    while len(seen) <= skip and time.perf_counter() < until:
        if (code := _wait(child, 0.0002)) is not None:
            return code
        with suppress(FileNotFoundError):
            seen |= {name for name in os.listdir(folder) if ".tmp-" in name or ".old-" in name}
    return _wait(child, seconds)


def _differences(folder: Path, whole: Path) -> Iterator[str]:
    """Files that are missing or left over, and contents that are not the same."""
    names, expected = ({path.relative_to(root).as_posix() for path in root.rglob("*")} for root in (folder, whole))
    yield from (f"{name} is left over" for name in sorted(names - expected))
    yield from (f"{name} is missing" for name in sorted(expected - names))
    yield from (f"{name} differs" for name in SAME if (folder / name).read_bytes() != (whole / name).read_bytes())
    for name in TENSORS:
        ours, theirs = (read_safetensors(root / name)[0] for root in (folder, whole))
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        yield from () if same else (f"{name} differs",)


def _write_teacher(folder: Path) -> None:
    torch.manual_seed(0)
    network = DDPMUNet(
        width=4,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        image_size=8,
        channels=1,
        norm_groups=2,
        dropout=0.2,
    )
    schedule = NoiseSchedule.linear().to_dict()
    models.save(network, folder, {"kind": "ddim", "steps": 2, "schedule": schedule, "sample_shape": [1, 8, 8]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_train_steps", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)  # before any network computes: a fork takes no threads along
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        found = soak(Path(place), given.kills, given.seed, given.max_train_steps)
    print(found)
    sys.exit(bool(found.wrong))
