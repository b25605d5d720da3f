"""Two processes on this machine, for tests of what several do together."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

WORLD_SIZE = 2

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


def run_ranks(script: str, folder: Path) -> list[dict]:
    """Start ``script RANK FOLDER`` of this folder for each rank; what each gave to ``leave``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    path = Path(__file__).with_name(script)
    processes = [
        subprocess.Popen([sys.executable, path, str(rank), folder], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD_SIZE)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"result{rank}.pt") for rank in range(WORLD_SIZE)]


def join(rank: int, folder: Path) -> None:
    """In a rank's process: meet the other."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=60),
    )


def leave(rank: int, folder: Path, results: dict) -> None:
    """In a rank's process: hand over the results, and end."""
    torch.save(results, folder / f"result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
