"""One command in several processes, as ``torchrun`` starts them: one of them speaks and writes, all end alike."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from pecker_fast.commands import Outcome
from pecker_fast.stopping import fresh_seed

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")
UNEXPECTED = 1
COMMANDS = ("distill", "unlearn")
"""Those that several processes can run."""
_PATIENCE = datetime.timedelta(minutes=10)
_PATIENCE_AFTER_FAILURE = datetime.timedelta(minutes=1)
_LINGER = 10.0  # seconds in which the others read what the first process keeps


@dataclass
class Ended:
    """How a command ended in one process.

    Attributes:
        code: Exit code.
        message: What went wrong.
        outcome: What came out.
        order: How many processes had failed by then, this one included.
    """

    code: int
    message: str = ""
    outcome: Outcome | None = None
    order: int = 0


def launched() -> bool:
    """Whether a launcher such as torchrun started several processes of this command."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run(options: argparse.Namespace, attempt: Callable[[argparse.Namespace], Ended]) -> Ended:
    """Do the command together with the other processes; they all get one exit code, and only the first a text.

    Args:
        options: Gets ``process_group``; all but the first process are quiet.
        attempt: Runs the command and raises nothing.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    cuda = torch.cuda.is_available() and options.device != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size)
    options.process_group, options.quiet = dist.group.WORLD, options.quiet or rank > 0
    if rank > 0:  # dropout draws from torch's own random state
        torch.manual_seed(fresh_seed("rank", options.seed or 0, rank))
    ended = attempt(options)
    options.process_group = None
    own_keys = dist.PrefixStore("pecker_fast", store)  # type: ignore[attr-defined]
    if ended.code:
        ended.order = own_keys.add("failed", 1)
        # Others may wait for this process in the midst of a step: without its connections they give up at once.
        gc.collect()
        dist.destroy_process_group()
    agreed = _agreed(ended, own_keys, rank, world_size)
    if dist.is_initialized():
        dist.destroy_process_group()
    return agreed


def _agreed(ended: Ended, store: Store, rank: int, world_size: int) -> Ended:
    """This process's end, or that of the one whose failure made the others fail."""
    keys = [f"ended {other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps(asdict(replace(ended, outcome=None))))
    try:
        store.wait(keys, _PATIENCE_AFTER_FAILURE if ended.code else _PATIENCE)
        ends = [Ended(**json.loads(store.get(key))) for key in keys]
        _linger(store, rank, world_size)
    except RuntimeError:  # a process was killed, and says nothing any more
        return ended if ended.code else Ended(UNEXPECTED, "another process ended without a word")
    failed = [(other, end) for other, end in enumerate(ends) if end.code]
    if not failed:
        return ended
    # What fails because another process did is unexpected, and comes later.
    first, cause = min(failed, key=lambda pair: (pair[1].code == UNEXPECTED, pair[1].order))
    if cause.code == ends[0].code != UNEXPECTED:  # most often all make the same mistake
        first, cause = 0, ends[0]
    return Ended(cause.code, cause.message if first == 0 else f"rank {first}: {cause.message}")


def _linger(store: Store, rank: int, world_size: int) -> None:
    """The first process may be where the others read: it waits until they have."""
    read, until = store.add("read", 1), time.monotonic() + _LINGER
    while rank == 0 and read < world_size and time.monotonic() < until:
        time.sleep(0.02)
        read = store.add("read", 0)


def group_of(options: argparse.Namespace) -> Any:
    """The process group of the command; None where it runs alone."""
    return getattr(options, "process_group", None)


def is_first(options: argparse.Namespace) -> bool:
    """Whether this process writes."""
    group = group_of(options)
    return group is None or dist.get_rank(group) == 0


def first_then_others(options: argparse.Namespace, load: Callable[[], T]) -> T:
    """``load()`` in the first process, and only then in the others, which find what it left in a cache."""
    group = group_of(options)
    if group is None:
        return load()
    if is_first(options):
        found = load()
        dist.barrier(group)
    else:
        dist.barrier(group)
        found = load()
    return found
