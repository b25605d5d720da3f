"""The processes that train one distiller together: what they must agree on, and what each does for itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pecker_fast.distributed import gather_rows, group_or_default
from pecker_fast.mask import BlockMask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """The processes of a group, of which this is one; without a group, this process alone.

    Args:
        group: The processes; None is this one.
        device: Where their messages are made: what their backend sends.

    Raises:
        RuntimeError: torch.distributed is not initialised, or this process is not in ``group``.
    """

    def __init__(self, group: ProcessGroup | None, device: torch.device) -> None:
        self.group = None if group is None else group_or_default(group)
        self.device = device
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.world_size = 1 if self.group is None else dist.get_world_size(self.group)

    def seed(self, seed: int) -> int:
        """Of this rank's draws: ``seed`` itself for the first, and far from every other run's seeds for the rest."""
        if self.rank == 0:
            return seed
        digest = hashlib.sha256(f"{seed} {self.rank}".encode()).digest()
        return int.from_bytes(digest[:7], "little")

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's ``tensor`` (n,) as a row: (world_size, n), on the CPU; every rank must call it."""
        if self.group is None:
            return tensor.cpu()[None]
        return gather_rows(tensor.to(self.device), self.group).cpu()

    def gather_texts(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks; every rank must call it."""
        message = torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")
        lengths = self.gather(torch.tensor([len(message)], device="cpu")).flatten().tolist()
        rows = self.gather(F.pad(message, (0, max(lengths) - len(message))))
        return [row[:length].numpy().tobytes().decode() for row, length in zip(rows, lengths, strict=True)]

    def check_same(self, parts: Mapping[str, bytes]) -> None:
        """Compare what all ranks must have the same; every rank must call it, and every rank raises.

        Args:
            parts: What it is called in the error -> the bytes that are compared.

        Raises:
            RuntimeError: A rank has something else.
        """
        if self.group is None:
            return
        hashes = [list(hashlib.sha256(part).digest()) for part in parts.values()]
        digests = [torch.tensor(digest, dtype=torch.uint8, device="cpu") for digest in hashes]
        for name, rows in zip(parts, self.gather(torch.cat(digests)).split(32, dim=1), strict=True):
            others = [str(rank) for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
            if others:
                raise RuntimeError(
                    f"MaskedDistiller: ranks 0 and {', '.join(others[:8])} have another {name}; load the same on every "
                    f"rank"
                )

    def shared_mask(self, make: Callable[[], BlockMask]) -> BlockMask:
        """The mask that the first rank makes, on every rank; every rank must call it.

        Raises:
            RuntimeError: The first rank could not make it.
        """
        if self.group is None:
            return make()
        message = b""
        try:
            if self.rank == 0:
                message = _packed(make())
        finally:
            message = self._from_first(message, self.group)
        if not message:
            raise RuntimeError("rank 0 could not make the mask; its own error says why")
        return _unpacked(message)

    @contextmanager
    def first_writes(self) -> Iterator[bool]:
        """A block in which the first rank alone writes files; the others leave it when they are complete.

        Yields:
            Whether this rank writes.

        Raises:
            RuntimeError: On the other ranks, where the first one failed.
        """
        outcome = b"failed"
        try:
            yield self.rank == 0
            outcome = b"written"
        finally:
            if self.group is not None:
                outcome = self._from_first(outcome, self.group)
        if outcome != b"written":
            raise RuntimeError("rank 0 could not write; its own error says why")

    def _from_first(self, message: bytes, group: ProcessGroup) -> bytes:
        """The first rank's message, of whatever length, on every rank."""
        first = dist.get_global_rank(group, 0)
        length = torch.tensor([len(message)], device=self.device)
        dist.broadcast(length, first, group=group)
        if not int(length):
            return b""
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            content.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        dist.broadcast(content, first, group=group)
        return content.cpu().numpy().tobytes()


def _packed(mask: BlockMask) -> bytes:
    return bytes(safetensors.torch.save(*mask.to_tensors()))


def _unpacked(message: bytes) -> BlockMask:
    header = json.loads(message[8 : 8 + int.from_bytes(message[:8], "little")])
    return BlockMask.from_tensors(safetensors.torch.load(message), header["__metadata__"])
