"""Which deltas a model carries, remembered on the module and in ``pecker_deltas.json`` beside saved weights.

A record is a claim that is checked against the weights each time: where the blocks no longer hold what the delta left
there, because other weights were loaded or training went on, it does not count.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pecker_fast.checkpoint import StrPath, read_json, write_json
from pecker_fast.delta.fingerprint import MODULUS, fingerprint_blocks
from pecker_fast.delta.pack import pack_mask, unpack_mask
from pecker_fast.errors import FileFormatError
from pecker_fast.mask import BlockMask
from pecker_fast.models.storage import DELTAS_ATTRIBUTE, DELTAS_NAME

FORMAT = "pecker_fast.deltas"
VERSION = 1
_FREE = 1 << 24
"""Blocks that a mask may have whatever lies beside it. A small file can claim any number of them."""
_TIMES = 16
"""Active blocks that all masks together may have, for each block that one may."""
_DAMAGED = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, zlib.error)


@dataclass(frozen=True, eq=False)
class Record:
    """One delta that was applied: where, and the fingerprints of its blocks."""

    name: str | None
    before: int
    after: int
    mask: BlockMask

    @property
    def label(self) -> str:
        """For messages: the name, or the fingerprint of what it leaves."""
        return repr(self.name) if self.name else f"{self.after:016x}"

    @property
    def change(self) -> int:
        """What it adds to the fingerprint of a whole model, modulo 2**64."""
        return (self.after - self.before) % MODULUS

    def holds(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the weights still are what the delta left."""
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        parameters = self.mask.parameters
        if any(shapes.get(name) != parameter.grid.shape for name, parameter in parameters.items()):
            return False
        return fingerprint_blocks(state, parameters) == self.after

    def same_as(self, other: Record) -> bool:
        """Whether both are of one delta."""
        return (self.before, self.after) == (other.before, other.after) and self.mask == other.mask


class Ledger:
    """The deltas that a model carries, in the order in which they were applied.

    Modules carry their own (``Ledger.of``), and model folders written by this package theirs. Models of other
    libraries get it back with ``Ledger.load(folder).attach(model)``.
    """

    def __init__(self, records: list[Record] | None = None) -> None:
        """Records, oldest first; none by default."""
        self.records = list(records or [])

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"Ledger({', '.join(record.label for record in self)})"

    @classmethod
    def of(cls, model: object) -> Ledger:
        """That of a module; an empty one for anything else, because a mapping remembers nothing."""
        if not isinstance(model, nn.Module) or DELTAS_ATTRIBUTE not in model.__dict__:
            return cls()
        weights = sum(tensor.numel() for tensor in model.state_dict().values())
        return cls.from_dict(model.__dict__[DELTAS_ATTRIBUTE], weights)

    def attach(self, model: nn.Module) -> None:
        """Make it the module's; copies of the module get their own."""
        if self.records:
            model.__dict__[DELTAS_ATTRIBUTE] = self.to_dict()
        else:
            model.__dict__.pop(DELTAS_ATTRIBUTE, None)

    @classmethod
    def load(cls, folder: StrPath) -> Ledger:
        """That of a model folder; empty where there is no ``pecker_deltas.json``.

        Raises:
            FileFormatError: The file is damaged, or claims masks of more blocks than there are weights beside it.
        """
        path = Path(folder) / DELTAS_NAME
        if not path.exists():
            return cls()
        weights = sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file() and file != path)
        try:
            return cls.from_dict(read_json(path), weights)
        except ValueError as error:
            raise FileFormatError(f"{path}: damaged record of applied deltas: {error}") from error

    def save(self, folder: StrPath) -> None:
        """Write ``pecker_deltas.json`` into an existing folder.

        Raises:
            FileFormatError: The file cannot be written.
        """
        write_json(Path(folder) / DELTAS_NAME, self.to_dict())

    def holding(self, state: Mapping[str, Tensor]) -> Ledger:
        """The records that the weights confirm."""
        return Ledger([record for record in self if record.holds(state)])

    def note(self, record: Record, applied: bool) -> None:
        """Remember a delta that was applied, or forget one that was reverted."""
        self.records = [other for other in self if not other.same_as(record)] + [record] * applied

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": FORMAT, "version": VERSION, "deltas": [_to_json(record) for record in self]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], weights: int = 0) -> Ledger:
        """From ``to_dict``.

        Args:
            values: What that gave.
            weights: At most so many weights can have blocks; masks of a few million blocks are always read.

        Raises:
            ValueError: It is something else, or its masks have more blocks.
        """
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            found = f"{values.get('format')!r} version {values.get('version')!r}"
            raise ValueError(f"expected {FORMAT} version {VERSION}, got {found}")
        room, active = max(weights, _FREE), 0
        ledger = cls()
        try:
            for entry in values["deltas"]:
                ledger.records.append(_from_json(entry, room))
                active += sum(len(parameter.active) for parameter in ledger.records[-1].mask.parameters.values())
                if active > _TIMES * room:
                    raise ValueError(f"{active} active blocks in all, of weights that can have {room}")
        except _DAMAGED as error:
            raise ValueError(f"not what pecker_fast writes ({error!r:.200})") from error
        return ledger


def _to_json(record: Record) -> dict[str, Any]:
    bits, header = pack_mask(record.mask)
    return {
        "name": record.name,
        "before": f"{record.before:016x}",
        "after": f"{record.after:016x}",
        "mask": header,
        "bits": base64.b64encode(zlib.compress(bits.numpy().tobytes(), 1)).decode("ascii"),
    }


def _from_json(entry: Mapping[str, Any], room: int) -> Record:
    """One record, if its mask has at most ``room`` blocks."""
    bits = _decompressed(base64.b64decode(entry["bits"], validate=True), json.loads(entry["mask"]["bytes"]), room)
    return Record(entry["name"], int(entry["before"], 16), int(entry["after"], 16), unpack_mask(bits, entry["mask"]))


def _decompressed(data: bytes, sizes: list[int], room: int) -> Tensor:
    """As many bytes as the weights have in all, if that is not beyond reason: the last one of each may be padded."""
    expected = sum(sizes)
    if 8 * (expected - len(sizes)) > room:
        raise ValueError(
            f"a mask of {8 * expected} blocks, of weights that can have {room}; keep it beside its weights"
        )
    machine = zlib.decompressobj()
    found = machine.decompress(data, max(expected, 0) + 1)
    if len(found) != expected or not machine.eof or machine.unused_data:
        raise ValueError(f"expected {expected} bytes of blocks, got {len(found)} or more, or something behind them")
    return torch.from_numpy(np.frombuffer(found, dtype=np.uint8).copy())
