"""One of two processes of ``pecker-fast``: python unlearn_ranks.py RANK FOLDER (test_unlearn_ranks.py starts it)."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import torch

from pecker_fast import MaskedDistiller
from pecker_fast.cli import main

TEACHER = "--pretrained_model_name_or_path teacher --train_batch_size 4 --t_init 500 --generator_lr 1e-3".split()
REQUEST = "unlearn --init distilled --forget_class 3 --forget_batch_size 4 --mask_batches 2 --block row".split()
STOP = "--stop_on ua>=0.01,retain>=0.99 --stop_every 2 --judge judge".split()
EVERY = "--max_train_steps 4 --checkpointing_steps 2".split()


def scenes(rank):
    """Name -> arguments, and what happens in a step of a rank."""
    yield "distill", ["distill", "--max_train_steps", "2", "--output_dir", "distilled"], None
    yield "again", ["distill", "--max_train_steps", "2", "--output_dir", "distilled"], None
    yield "whole", [*REQUEST, *STOP, "--max_train_steps", "4", "--output_dir", "whole"], None
    terminate = at(2, rank == 1, lambda: signal.raise_signal(signal.SIGTERM))
    yield "interrupted", [*REQUEST, *STOP, *EVERY, "--output_dir", "half"], terminate
    resume = ["--resume_from_checkpoint", "latest", "--output_dir", "half"]
    yield "resumed", [*REQUEST, *STOP, *EVERY, *resume], None
    yield "usage", [*REQUEST, "--output_dir", "new"], at(1, rank == 1, lambda: fail(ValueError("of the second alone")))
    yield "unexpected", [*REQUEST, "--output_dir", "new"], at(1, rank == 1, lambda: fail(LookupError("nobody knew")))
    yield "first", [*REQUEST, "--output_dir", "new"], at(1, rank == 0, lambda: fail(ValueError("of the first alone")))
    yield "unwritable", [*REQUEST, "--output_dir", "file/new"], None
    yield "same mistake", [*REQUEST, "--output_dir", "new", "--forget_class", "11"], None
    yield "alone", ["mask", "--forget_class", "3", "--output_file", "new"], None


def at(step, here, what):
    """``MaskedDistiller.step`` with something after a step."""
    original = MaskedDistiller.step

    def changed(self):
        metrics = original(self)
        if here and self.steps_done == step:
            what()
        return metrics

    return changed


def fail(error):
    raise error


def perform(arguments, step):
    """Exit code, stdout, stderr."""
    torch.manual_seed(0)
    original, out, err = MaskedDistiller.step, io.StringIO(), io.StringIO()
    MaskedDistiller.step = step or original
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            own = [] if arguments[0] == "mask" else TEACHER
            source = TEACHER[:2] if arguments[0] == "mask" else own
            code = main([*arguments, *source, "--device", "cpu", "--quiet"] + (["--json"] if step is None else []))
    finally:
        MaskedDistiller.step = original
    return code, out.getvalue(), err.getvalue()


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    ports = json.loads((folder / "ports.json").read_text())
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    results = {}
    for (name, arguments, step), port in zip(scenes(rank), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        results[name] = perform(arguments, step)
    torch.save(results, folder / f"result{rank}.pt")


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
