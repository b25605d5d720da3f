"""The weights of a model folder, whatever library it is of, read and written without building the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pecker_fast.checkpoint import atomic_folder, read_json, read_safetensors, rewrite_safetensors
from pecker_fast.classes import Classes
from pecker_fast.delta import Ledger
from pecker_fast.errors import FileFormatError
from pecker_fast.models.pipeline_files import TEXTS, check_pipeline, copy_components, copy_texts, is_pipeline
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

    def writes(self, scheduler: PipelineScheduler | None) -> list[str]:
        """Names of the files that `write` changes."""
        inside = "" if self.pipeline is None else "unet/"
        also = [] if scheduler == self.scheduler else ["scheduler/scheduler_config.json", "model_index.json"]
        return [*(f"{inside}{file}" for file in sorted(self.files)), f"{inside}{DELTAS_NAME}", *also]

    def write(self, folder: Path, scheduler: PipelineScheduler | None) -> None:
        """Write the weights as they are now, with the folder's settings and texts, complete or not at all.

        The other components of a pipeline are copied byte for byte.

        Args:
            folder: Where to; may be the folder itself.
            scheduler: Of the pipeline; not None for one.

        Raises:
            FileFormatError: The folder cannot be written, or is the pipeline itself and has other copies of the
                UNet's weights, which would be lost.
        """
        self._check_nothing_is_lost(folder)
        with atomic_folder(folder) as unfinished:
            if self.pipeline is None or scheduler is None:
                self._write_weights(unfinished)
                return
            copy_components(self.pipeline, unfinished, without=("unet",))
            copy_texts(self.pipeline, unfinished)
            (unfinished / "unet").mkdir()
            self._write_weights(unfinished / "unet")
            if scheduler != self.scheduler:
                scheduler.put_in(unfinished)

    def _write_weights(self, folder: Path) -> None:
        copy_texts(self.path, folder, without=(DELTAS_NAME,))
        for file, names in self.files.items():
            rewrite_safetensors(self.path / file, folder / file, {name: self.weights[name] for name in names})
        self.ledger.save(folder)

    def _check_nothing_is_lost(self, folder: Path) -> None:
        """A model folder keeps what it has beside the new files; within a pipeline, ``unet/`` is replaced."""
        if self.pipeline is None or not folder.exists() or not folder.samefile(self.pipeline):
            return
        names = [entry.name for entry in self.path.iterdir() if entry.suffix not in TEXTS]
        lost = [name for name in names if name not in self.files]
        if lost:
            raise FileFormatError(
                f"{self.path}: has other files, which are not changed along and would be lost: "
                f"{', '.join(sorted(lost)[:5])}; write into another folder"
            )


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
