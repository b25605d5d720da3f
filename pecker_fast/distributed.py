"""Several processes that train one masked model: one all-reduce of the gradients, and optimizer state in shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pecker_fast.blocks import ParameterMask

RANK, WORLD_SIZE = "shard_rank", "shard_world_size"
"""What a sharded optimizer's state says of itself."""


@dataclass(frozen=True)
class Shard:
    """One rank's part of a flat buffer: an equal share of it, and the few weights at the end that do not divide.

    Every rank has those last ones, fewer than there are ranks, so that the shares are of one length and can be gathered
    in place.

    Attributes:
        numel: Length of the buffer.
        rank: Which part.
        world_size: Of how many.
        group: The processes that have them.
    """

    numel: int
    rank: int
    world_size: int
    group: dist.ProcessGroup

    @staticmethod
    def of(numel: int, group: dist.ProcessGroup) -> Shard:
        """This process's part."""
        return Shard(numel, dist.get_rank(group), dist.get_world_size(group), group)

    def __deepcopy__(self, memo: dict[int, object]) -> Shard:
        return self  # a process group cannot be copied

    @property
    def share(self) -> int:
        """Length of an equal share."""
        return self.numel // self.world_size

    @property
    def part_numel(self) -> int:
        """Length of this rank's part."""
        return self.share + self.numel % self.world_size

    @property
    def stretches(self) -> list[tuple[slice, slice]]:
        """Where this rank's part lies: in the buffer, and in the part itself."""
        first, end = self.rank * self.share, self.world_size * self.share
        pairs = [
            (slice(first, first + self.share), slice(0, self.share)),
            (slice(end, self.numel), slice(self.share, self.part_numel)),
        ]
        return [(there, here) for there, here in pairs if there.start < there.stop]

    def part_of(self, flat: Tensor) -> Tensor:
        """A copy of this rank's part of a buffer (numel,): (part_numel,)."""
        return torch.cat([flat[there] for there, _ in self.stretches])

    def gather_(self, flat: Tensor) -> None:
        """Fill in what the other ranks have, in place, with one all-gather; every rank must call it."""
        first, end = self.rank * self.share, self.world_size * self.share
        if self.share:
            _all_gather(flat[:end], flat[first : first + self.share], self.group)

    def gather(self, part: Tensor) -> Tensor:
        """The buffer (numel,) of which every rank has its ``part``; every rank must call it."""
        flat = part.new_empty(self.numel)
        for there, here in self.stretches:
            flat[there] = part[here]
        self.gather_(flat)
        return flat


def all_reduce_mean_(flat: Tensor, group: dist.ProcessGroup) -> None:
    """Average a tensor over the processes of ``group``, in place: one all-reduce, then one division."""
    dist.all_reduce(flat, group=group)  # gloo has no average
    flat.div_(dist.get_world_size(group))


def group_or_default(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """``group``, or the group of all processes.

    Raises:
        RuntimeError: There is none, or this process is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised; call torch.distributed.init_process_group() first, and start the "
            "processes with torchrun"
        )
    group = cast("dist.ProcessGroup", dist.group.WORLD) if group is None else group
    if dist.get_rank(group) < 0:
        raise RuntimeError(f"rank {dist.get_rank()} is not in the process group that it was given")
    return group


def fingerprint(dtype: torch.dtype, parameters: Iterable[tuple[str, ParameterMask, bool]]) -> bytes:
    """32 bytes that differ where flat buffers are laid out differently: names, grids, active blocks, memory order."""
    digest = hashlib.sha256(str(dtype).encode())
    for name, mask, channels_last in parameters:
        grid = mask.grid
        digest.update(json.dumps([name, grid.shape, grid.view, grid.block, channels_last, len(mask.active)]).encode())
        digest.update(mask.active.numpy().tobytes())
    return digest.digest()


def gather_rows(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's tensor (n,) as a row, (world_size, n); every rank must call it."""
    rows = own.new_empty(dist.get_world_size(group) * len(own))
    _all_gather(rows, own, group)
    return rows.view(-1, len(own))


def check_agreement(own: bytes, device: torch.device, group: dist.ProcessGroup) -> None:
    """Compare fingerprints; every rank must call it, and every rank raises.

    Raises:
        RuntimeError: Another rank has another one.
    """
    theirs = gather_rows(torch.tensor(list(own), dtype=torch.uint8, device=device), group)
    others = [rank for rank, row in enumerate(theirs) if not torch.equal(row, theirs[0])]
    if others:
        raise RuntimeError(
            f"the masks of ranks 0 and {', '.join(map(str, others[:8]))} differ, so that their buffers do not fit "
            f"together; make the mask on one rank, save it, and load it on every rank: BlockMask.load(path)"
        )


def check_shard(state: Mapping[str, Any], shard: Shard | None) -> None:
    """Refuse an optimizer state that is not of this shard.

    Raises:
        ValueError: It is another rank's, of another number of ranks, or one of the two is not sharded.
    """
    saved = (state.get(RANK), state.get(WORLD_SIZE))
    expected = (None, None) if shard is None else (shard.rank, shard.world_size)
    if saved != expected:
        raise ValueError(
            f"MaskedAdamW: the state is {_describe(*saved)}, this optimizer has {_describe(*expected)}; every rank "
            f"loads what it saved, with as many ranks as then"
        )


def _all_gather(output: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    # torch 2.13 calls the older name deprecated; 2.11 knows no other.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, own, group=group)


def _describe(rank: int | None, world_size: int | None) -> str:
    return "the whole state" if rank is None else f"shard {rank} of {world_size}"
