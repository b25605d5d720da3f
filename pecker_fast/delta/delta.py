"""Delta: what a masked training changed, as a small reversible file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import pecker_fast
from pecker_fast.blocks import ParameterMask
from pecker_fast.checkpoint import StrPath
from pecker_fast.delta import file as delta_file
from pecker_fast.delta.check import check_fit
from pecker_fast.delta.fingerprint import MODULUS, Fingerprints, fingerprint_all, fingerprint_blocks, layout
from pecker_fast.delta.ledger import Ledger, Record
from pecker_fast.delta.pack import active_part, overlaps, pack_mask, unpack_mask
from pecker_fast.delta.state import (
    DTYPES,
    Weights,
    changed_bits,
    check_layout,
    check_writable,
    tensors_of,
    xor_,
)
from pecker_fast.errors import FileFormatError
from pecker_fast.mask import BlockMask


@dataclass(frozen=True, eq=False, repr=False)
class Delta:
    """The XOR of a model's bits before and after a masked training, for the weights under the mask alone.

    XOR is its own inverse: the same numbers turn the base into the trained model and back, bit for bit, and no copy of
    the base is needed. Fingerprints tell a wrong base, a delta that is applied already, or one that is not.

    Attributes:
        mask: Where it changes the model: the weights with active blocks.
        payload: Name of the weight -> XOR of the bits of its active weights, as integers (n,), on the CPU, in the
            order of ``ParameterMask.index()``.
        layouts: Name -> dtype and shape of every tensor of the model's state dict, e.g. "float32 (64, 3, 3, 3)".
        fingerprints: Of the blocks it touches, before and after, and of the rest of the model.
        name: For people, and for error messages.
        metadata: Anything that JSON holds.
        versions: Of the packages that made it.
    """

    mask: BlockMask
    payload: Mapping[str, Tensor]
    layouts: Mapping[str, str]
    fingerprints: Fingerprints
    name: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def extract(
        cls,
        before: Weights,
        after: Weights,
        mask: BlockMask,
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        ledger: Ledger | None = None,
        progress: bool = True,
    ) -> Delta:
        """What changed from ``before`` to ``after``, which must be the same bits outside the mask.

        Deltas that ``before`` is known to carry, and whose blocks these are not, are left out of the fingerprint: the
        new delta then fits the base without them too. A module ``after`` is noted to carry them and the new one; a
        state dict remembers nothing. Neither's weights change.

        Args:
            before: The base: a module or a state dict, of weights in float32, bfloat16, float16 or float64.
            after: The trained one, masked still or not; of a masked one the dense weights count.
            mask: Where they may differ.
            name: For people, and for error messages.
            metadata: Anything that JSON holds, kept with the delta.
            ledger: Deltas that ``before`` carries where it is a state dict. Modules have their own.
            progress: Whether to show a bar on stderr where it takes seconds.

        Raises:
            ValueError: Names, shapes or dtypes differ, a weight differs outside the mask or a buffer differs, or
                the mask is for another model.
        """
        old, new = tensors_of(before), tensors_of(after)
        layouts = {key: layout(tensor) for key, tensor in old.items()}
        check_layout(new, layouts, "after")
        mask, metadata = active_part(mask), _plain(metadata)
        _check_mask(mask.parameters, layouts)
        found = {key: changed_bits(key, old[key], new[key], mask.parameters.get(key)) for key in old}
        payload = {key: bits for key in mask.parameters if (bits := found[key]) is not None}
        ledger = _ledger_of(before, ledger)
        others = [r for r in ledger.holding(old) if not overlaps(r.mask.parameters, mask.parameters)]
        touched = fingerprint_blocks(old, mask.parameters)
        rest = fingerprint_all(old, progress) - touched - sum(record.change for record in others)
        fingerprints = Fingerprints(touched, fingerprint_blocks(new, mask.parameters), rest % MODULUS)
        delta = cls(mask, payload, layouts, fingerprints, name, metadata, _versions())
        if isinstance(after, nn.Module):
            Ledger([*ledger, delta.record]).attach(after)
        return delta

    def apply(self, model: Weights, *, ledger: Ledger | None = None, progress: bool = True) -> None:
        """Turn the base into the trained model, in place; afterwards every bit is that of ``after``.

        Plain torch: ``weight.view(torch.int32)[active] ^= payload`` for every weight of the mask.

        Args:
            model: A module that is not masked, or a state dict, in the dtype that the delta was made in.
            ledger: Deltas that a state dict carries; it is kept up to date. Modules have their own.
            progress: Whether to show a bar on stderr where it takes seconds.

        Raises:
            ValueError: It is masked, of another layout, another base, carries the delta already, or carries one that
                changes the same blocks. Nothing is changed then.
        """
        self._switch(model, ledger, progress, applied=True)

    def revert(self, model: Weights, *, ledger: Ledger | None = None, progress: bool = True) -> None:
        """Turn the trained model into its base again, in place; the opposite of ``apply``, with its arguments.

        Raises:
            ValueError: As ``apply``, or the model does not carry the delta. Nothing is changed then.
        """
        self._switch(model, ledger, progress, applied=False)

    @torch.no_grad()
    def _switch(self, model: Weights, ledger: Ledger | None, progress: bool, applied: bool) -> None:
        state = tensors_of(model)
        check_layout(state, self.layouts, f"the model does not fit delta {self.record.label}")
        check_writable(model, state, self.payload)
        ledger = _ledger_of(model, ledger)
        check_fit(self.record, self.fingerprints.rest, state, ledger, applied, progress)
        xor_(state, self.mask.parameters, self.payload)
        expected = self.fingerprints.after if applied else self.fingerprints.before
        if fingerprint_blocks(state, self.mask.parameters) != expected:
            xor_(state, self.mask.parameters, self.payload)
            raise ValueError(f"the numbers of delta {self.record.label} are not those it was made with; load it again")
        ledger.note(self.record, applied)
        if isinstance(model, nn.Module):
            ledger.attach(model)

    @property
    def record(self) -> Record:
        """What a model that carries it remembers."""
        return Record(self.name, self.fingerprints.before, self.fingerprints.after, self.mask)

    def overlaps(self, other: Delta) -> list[str]:
        """Names of the weights of which both change an element; deltas of one base without any stack in any order."""
        return overlaps(self.mask.parameters, other.mask.parameters)

    def save(self, folder: StrPath, *, overwrite: bool = False) -> None:
        """Write ``pecker_delta.safetensors``, ``pecker_config.json`` and a README into ``folder``, or nothing.

        Args:
            folder: Where to; what else is in it stays.
            overwrite: Whether an older result there, of this function, may go.

        Raises:
            FileFormatError: The folder cannot be written, or has an older result or files of yours in the way.
        """
        bits, header = pack_mask(self.mask)
        xor = [self.payload[key].view(torch.uint8) for key in self.mask.parameters]
        tensors = {"mask": bits, "xor": torch.cat([torch.empty(0, dtype=torch.uint8, device="cpu"), *xor])}
        config = {
            "name": self.name,
            "density": self.mask.density,
            "weights": {"changed": self.mask.numel, "model": self.mask.total},
            "fingerprints": self._hashes(),
            "made_with": dict(self.versions),
            "metadata": dict(self.metadata),
            "tensors": dict(self.layouts),
        }
        delta_file.write(folder, config, tensors, header | {"format": delta_file.FORMAT}, overwrite)

    @classmethod
    def load(cls, folder: StrPath) -> Delta:
        """Read what ``save`` wrote; nothing is unpickled.

        Raises:
            FileFormatError: A file is missing, truncated, changed in a single bit, foreign, or of a newer version.
        """
        config, tensors, header = delta_file.read(folder)
        try:
            layouts = dict(config["tensors"])
            mask = unpack_mask(tensors["mask"], header)
            _check_mask(mask.parameters, layouts)
            hashes = Fingerprints(**{key: int(value, 16) for key, value in config["fingerprints"].items()})
            payload = _split(tensors["xor"], mask.parameters, layouts)
            name, metadata, versions = config["name"], dict(config["metadata"]), dict(config["made_with"])
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise FileFormatError(f"{folder}: its files do not fit together: {error!r}; get the delta again") from error
        return cls(mask, payload, layouts, hashes, name, metadata, versions)

    def info(self) -> dict[str, Any]:
        """Everything about it but the numbers themselves, as plain JSON values."""
        return {
            "name": self.name,
            "density": self.mask.density,
            "weights": self.mask.numel,
            "model_weights": self.mask.total,
            "bytes": sum(bits.nbytes for bits in self.payload.values()),
            "layers": {name: mask.numel for name, mask in self.mask.parameters.items()},
            "hashes": self._hashes(),
            "metadata": dict(self.metadata),
            "versions": {"format": delta_file.VERSION, **self.versions},
        }

    def __repr__(self) -> str:
        size = sum(bits.nbytes for bits in self.payload.values())
        return (
            f"Delta({self.record.label}: {self.mask.numel:,} of {self.mask.total:,} weights in {len(self.payload)} "
            f"tensors, density {self.mask.density:.4f}, {size / 1e6:.2f} MB)"
        )

    def _hashes(self) -> dict[str, str]:
        return {key: f"{value:016x}" for key, value in self.fingerprints._asdict().items()}


def _ledger_of(model: Weights, ledger: Ledger | None) -> Ledger:
    if isinstance(model, nn.Module) and ledger is not None:
        raise ValueError(f"ledger: {type(model).__name__} has its own; give one with state dicts only")
    return Ledger.of(model) if ledger is None else ledger


def _check_mask(parameters: Mapping[str, ParameterMask], layouts: Mapping[str, str]) -> None:
    for name, mask in parameters.items():
        kind, _, shape = layouts.get(name, "missing").partition(" ")
        if shape != str(mask.grid.shape):
            raise ValueError(f"the mask is for {name} of shape {mask.grid.shape}, the model has {layouts.get(name)}")
        if kind not in DTYPES:
            raise ValueError(f"{name} is {kind}; a delta holds weights in {', '.join(DTYPES)}")


def _split(xor: Tensor, parameters: Mapping[str, ParameterMask], layouts: Mapping[str, str]) -> dict[str, Tensor]:
    """The bytes of the payload by weight."""
    dtypes = {name: DTYPES[layouts[name].partition(" ")[0]] for name in parameters}
    sizes = [mask.numel * dtypes[name].itemsize for name, mask in parameters.items()]
    if xor.dtype != torch.uint8 or xor.shape != (sum(sizes),):
        raise ValueError(f"xor: expected {sum(sizes)} bytes, got {xor.dtype} {tuple(xor.shape)}")
    # A clone begins at an address of its own, which wider integers need.
    return {name: part.clone().view(dtypes[name]) for name, part in zip(parameters, xor.split(sizes), strict=True)}


def _plain(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """As it will be read back."""
    try:
        values: dict[str, Any] = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata: expected values that JSON holds, got {metadata!r} ({error})") from error
    return values


def _versions() -> dict[str, str]:
    return {"pecker_fast": pecker_fast.__version__, "torch": str(torch.__version__)}
