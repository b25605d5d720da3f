"""The weights of a model folder, whatever library it is of, read and written without building the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pecker_fast.checkpoint import read_json, read_safetensors, rewrite_safetensors
from pecker_fast.classes import Classes
from pecker_fast.delta import Ledger
from pecker_fast.errors import FileFormatError
from pecker_fast.models.pipeline_files import (
    check_pipeline,
    components,
    copy_components,
    copy_texts,
    is_pipeline,
    texts,
)
from pecker_fast.models.pipeline_scheduler import PipelineScheduler
from pecker_fast.models.shards import INDEX_NAME, pieces, read_shards
from pecker_fast.models.storage import CONFIG_NAME, DELTAS_NAME, WEIGHTS_NAME


@dataclass(frozen=True)
class ModelFolder:
    """A folder of safetensors, or a pipeline folder with such a ``unet/``.

    Attributes:
        path: The folder with the weights.
        files: Names of the files with the weights, each with the names of its tensors.
        weights: Its tensors.
        ledger: The deltas that the model is said to carry.
        pipeline: The pipeline's folder, if it is one.
        scheduler: The pipeline's scheduler.
    """

    path: Path
    files: dict[str, set[str]]
    weights: dict[str, Tensor]
    ledger: Ledger
    pipeline: Path | None
    scheduler: PipelineScheduler | None

    @classmethod
    def read(cls, folder: Path) -> ModelFolder:
        """Read the weights of a folder as this package or diffusers writes it; of a pipeline, those of its UNet.

        Raises:
            FileFormatError: The folder or a file is missing or damaged, the weights are in several files without an
                index, or a pipeline has no UNet2DConditionModel.
        """
        if not folder.is_dir():
            raise FileFormatError(f"{folder}: no such folder; expected a model folder with {WEIGHTS_NAME}")
        pipeline = folder if is_pipeline(folder) else None
        scheduler = None
        if pipeline is not None:
            check_pipeline(pipeline)
            folder, scheduler = pipeline / "unet", PipelineScheduler.read(pipeline)
        files, weights = _read_weights(folder)
        return cls(folder, files, weights, Ledger.load(folder), pipeline, scheduler)

    @property
    def classes(self) -> Classes | None:
        """What ``config.json`` says of the classes, if it does.

        Raises:
            FileFormatError: It is damaged.
        """
        file = self.path / CONFIG_NAME
        try:
            return Classes.listed_in(read_json(file)) if file.is_file() else None
        except ValueError as error:
            raise FileFormatError(f"{file}: {error}") from error

    @property
    def writes(self) -> list[str]:
        """Names, directly in the folder, of what `write` writes."""
        if self.pipeline is None:
            return sorted({*self.files, DELTAS_NAME, *texts(self.path)})
        return [*components(self.pipeline), *texts(self.pipeline)]

    def write(self, folder: Path, scheduler: PipelineScheduler | None) -> None:
        """Write the weights as they are now, with the folder's settings and texts.

        The other components of a pipeline are copied byte for byte.

        Args:
            folder: Where to; it is empty.
            scheduler: Of the pipeline; not None for one.

        Raises:
            FileFormatError: The folder cannot be written.
        """
        if self.pipeline is None or scheduler is None:
            self._write_weights(folder)
            return
        copy_components(self.pipeline, folder, without=("unet",))
        copy_texts(self.pipeline, folder)
        (folder / "unet").mkdir()
        self._write_weights(folder / "unet")
        if scheduler != self.scheduler:
            scheduler.put_in(folder)

    def _write_weights(self, folder: Path) -> None:
        copy_texts(self.path, folder, without=(DELTAS_NAME,))
        for file, names in self.files.items():
            rewrite_safetensors(self.path / file, folder / file, {name: self.weights[name] for name in names})
        self.ledger.save(folder)


def _read_weights(folder: Path) -> tuple[dict[str, set[str]], dict[str, Tensor]]:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if WEIGHTS_NAME not in files and (folder / INDEX_NAME).is_file():
        return pieces(folder), read_shards(folder)
    if WEIGHTS_NAME not in files and len(files) != 1:
        raise FileFormatError(
            f"{folder}: expected {WEIGHTS_NAME}, {INDEX_NAME} or one other safetensors file, got {len(files)} files; "
            f"save the model again" + ("" if files else " with safe_serialization=True")
        )
    file = WEIGHTS_NAME if WEIGHTS_NAME in files else files[0]
    weights, _ = read_safetensors(folder / file)
    return {file: set(weights)}, weights
