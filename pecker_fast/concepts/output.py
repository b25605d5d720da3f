"""The pipeline folder that is left behind: the user's own, with another UNet and, for one step, another scheduler."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pecker_fast.checkpoint import write_json, write_safetensors
from pecker_fast.concepts.pipeline import INDEX, PipelineFolder
from pecker_fast.delta import Delta, Ledger
from pecker_fast.errors import FileFormatError
from pecker_fast.mask import BlockMask
from pecker_fast.models.pipeline_files import copy_folder
from pecker_fast.models.storage import DELTAS_NAME, WEIGHTS_NAME

_TEXTS = (".json", ".md", ".txt")
_INDEX_OF_WEIGHTS = ".index.json"
_ALONG = ("LICENSE", "LICENSE.md", "LICENSE.txt")
"""Files beside the components that go along; others there may be whole older models in one file."""


def write_pipeline(
    base: PipelineFolder, folder: Path, tensors: Mapping[str, Tensor], ledger: Ledger, scheduler: Any | None = None
) -> None:
    """Write a pipeline that diffusers' ``from_pretrained`` loads; ``atomic_folder`` is the caller's.

    All components but the UNet are copied file by file; of the UNet's folder only settings are: other copies of its
    weights, in another format or variant, would be the old ones. They become one file.

    Args:
        base: The pipeline that it comes from.
        folder: An empty folder, or one to be made.
        tensors: Weights of the UNet.
        ledger: The deltas that they carry.
        scheduler: Of a one-step generator; None copies the pipeline's own.

    Raises:
        FileFormatError: A file cannot be read or written.
    """
    index = dict(base.index)
    if scheduler is not None:
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
    copied = {"scheduler"} if scheduler is not None else set()
    try:
        folder.mkdir(exist_ok=True)
        for component in sorted(base.components - copied - {"unet"}):
            copy_folder(base.path / component, folder / component)
        for name in _ALONG:
            if (base.path / name).is_file():
                shutil.copyfile(base.path / name, folder / name)
        _write_unet(base, folder / "unet", tensors, ledger)
    except OSError as error:
        raise FileFormatError(f"{folder}: cannot be written ({error}); is the disk full?") from error
    if scheduler is None:
        shutil.copyfile(base.path / INDEX, folder / INDEX)
    else:
        scheduler.save_pretrained(folder / "scheduler")
        write_json(folder / INDEX, index)


def _write_unet(base: PipelineFolder, folder: Path, tensors: Mapping[str, Tensor], ledger: Ledger) -> None:
    folder.mkdir()
    for source in sorted((base.path / "unet").iterdir()):
        wanted = source.suffix in _TEXTS and not source.name.endswith(_INDEX_OF_WEIGHTS)
        if source.is_file() and wanted and source.name != DELTAS_NAME:
            shutil.copyfile(source, folder / source.name)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    if len(ledger):
        ledger.save(folder)


def extract_delta(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    mask: BlockMask,
    ledger: Ledger,
    *,
    name: str,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[Delta, Ledger]:
    """What changed, and the deltas that the result carries: those of ``ledger``, which stays as it is, and this one.

    Raises:
        ValueError: A weight differs outside the mask.
    """
    delta = Delta.extract(dict(before), dict(after), mask, name=name, metadata=metadata, ledger=ledger, progress=False)
    return delta, Ledger([*ledger, delta.record])
