"""Which deltas a model carries, remembered on the module and in ``pecker_deltas.json`` beside saved weights.

A record is a claim that is checked against the weights each time: where the blocks no longer hold what the delta left
there, because other weights were loaded or training went on, it does not count.
"""

from __future__ import annotations

import base64
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
        values = model.__dict__.get(DELTAS_ATTRIBUTE) if isinstance(model, nn.Module) else None
        return cls() if values is None else cls.from_dict(values)

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
            FileFormatError: The file is damaged.
        """
        path = Path(folder) / DELTAS_NAME
        if not path.exists():
            return cls()
        try:
            return cls.from_dict(read_json(path))
        except (KeyError, ValueError, TypeError, zlib.error) as error:
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
    def from_dict(cls, values: Mapping[str, Any]) -> Ledger:
        """From ``to_dict``.

        Raises:
            KeyError, ValueError, TypeError, zlib.error: It is something else.
        """
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            found = f"{values.get('format')!r} version {values.get('version')!r}"
            raise ValueError(f"expected {FORMAT} version {VERSION}, got {found}")
        return cls([_from_json(entry) for entry in values["deltas"]])


def _to_json(record: Record) -> dict[str, Any]:
    bits, header = pack_mask(record.mask)
    return {
        "name": record.name,
        "before": f"{record.before:016x}",
        "after": f"{record.after:016x}",
        "mask": header,
        "bits": base64.b64encode(zlib.compress(bits.numpy().tobytes(), 1)).decode("ascii"),
    }


def _from_json(entry: Mapping[str, Any]) -> Record:
    data = zlib.decompress(base64.b64decode(entry["bits"], validate=True))
    bits = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    return Record(entry["name"], int(entry["before"], 16), int(entry["after"], 16), unpack_mask(bits, entry["mask"]))
