"""The weights of a model folder, whatever library it is of, read and written without building the model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pecker_fast.checkpoint import atomic_folder, read_safetensors, write_safetensors
from pecker_fast.delta import Ledger
from pecker_fast.errors import FileFormatError
from pecker_fast.models.storage import DELTAS_NAME, WEIGHTS_NAME

_COPIED = (".json", ".md", ".txt")
"""What goes along with the weights. Other copies of the weights must not: they would be the old ones."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder with one safetensors file.

    Attributes:
        path: The folder.
        file: Name of the file with the weights.
        weights: Its tensors.
        header: Its strings.
        ledger: The deltas that the model is said to carry.
    """

    path: Path
    file: str
    weights: dict[str, Tensor]
    header: dict[str, str]
    ledger: Ledger

    @classmethod
    def read(cls, folder: Path) -> ModelFolder:
        """Read the weights of a folder as this package or diffusers writes it.

        Raises:
            FileFormatError: The folder or a file is missing or damaged, or the weights are in several files.
        """
        if not folder.is_dir():
            raise FileFormatError(f"{folder}: no such folder; expected a model folder with {WEIGHTS_NAME}")
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if WEIGHTS_NAME not in files and len(files) != 1:
            raise FileFormatError(
                f"{folder}: expected {WEIGHTS_NAME} or one other safetensors file, got {len(files)} of them; "
                f"save the model unsharded"
            )
        file = WEIGHTS_NAME if WEIGHTS_NAME in files else files[0]
        weights, header = read_safetensors(folder / file)
        return cls(folder, file, weights, header, Ledger.load(folder))

    def write(self, folder: Path) -> None:
        """Write the weights as they are now, with the folder's settings and texts, complete or not at all.

        Raises:
            FileFormatError: The folder cannot be written.
        """
        with atomic_folder(folder) as unfinished:
            for source in self.path.iterdir():
                if source.is_file() and source.suffix in _COPIED and source.name != DELTAS_NAME:
                    shutil.copyfile(source, unfinished / source.name)
            write_safetensors(unfinished / self.file, self.weights, self.header)
            self.ledger.save(unfinished)
