"""The folder that a distiller leaves behind: the averaged generator, its delta, its mask, its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from pecker_fast.checkpoint import StrPath, write_json
from pecker_fast.classes import Classes
from pecker_fast.delta import Delta
from pecker_fast.delta.state import only_weights_changed
from pecker_fast.mask import BlockMask
from pecker_fast.models import storage
from pecker_fast.output_folder import claim


class Settings(Protocol):
    """What is asked of a ``DistillConfig``."""

    @property
    def forget(self) -> tuple[int, ...]:
        """Classes to forget."""
        ...

    def to_dict(self) -> Mapping[str, Any]:
        """As JSON would hold it."""
        ...


class Trained(Protocol):
    """What is asked of a ``MaskedDistiller``."""

    base: nn.Module

    @property
    def config(self) -> Settings:
        """What it was trained with."""
        ...

    @property
    def generation(self) -> dict[str, Any]:
        """How to sample from the generator."""
        ...


def write(
    trained: Trained,
    generator: nn.Module,
    mask: BlockMask,
    folder: StrPath,
    *,
    settings: str = "distill_config",
    name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write all of it, or nothing; see ``MaskedDistiller.save``. ``settings`` is what their file is called."""
    writes = ("model", "delta", "mask.safetensors", f"{settings}.json")
    with claim(folder, f"{type(trained).__name__}.save", writes, replace=overwrite) as unfinished:
        (unfinished / "model").mkdir()
        if only_weights_changed(trained.base, generator):
            delta = _delta(trained, generator, mask, settings, name)
            delta.save(unfinished / "delta")
        storage.write_model(generator, unfinished / "model", trained.generation)
        mask.save(unfinished / "mask.safetensors")
        write_json(unfinished / f"{settings}.json", dict(trained.config.to_dict()))


def _delta(trained: Trained, generator: nn.Module, mask: BlockMask, settings: str, name: str | None) -> Delta:
    forget = trained.config.forget
    classes = Classes.of_module(trained.base)
    if name is None:
        listed = ", ".join(map(str, forget)) if classes is None else classes.text(forget)
        name = f"forget {listed}" if forget else "distil"
    metadata = {settings: trained.config.to_dict(), "generation": trained.generation}
    metadata |= {} if classes is None else classes.to_dict()
    return Delta.extract(trained.base, generator, mask, name=name, metadata=metadata, progress=False)
