"""PipelineFolder: a diffusers folder with a UNet2DConditionModel, looked at before anything of it is loaded."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pecker_fast.checkpoint import StrPath, read_json, read_safetensors
from pecker_fast.concepts.support import (
    check_components,
    check_index,
    check_prediction,
    check_shapes,
    check_size_and_text,
    check_unet,
    files_of,
    weights_files,
)
from pecker_fast.concepts.tokens import MISSING, check_lengths, read_tokenizer, token_ids
from pecker_fast.delta import Ledger
from pecker_fast.errors import FileFormatError
from pecker_fast.foreign_weights import check_dtypes, check_files, check_names
from pecker_fast.git_lfs import refuse_pointer
from pecker_fast.models.one_step_scheduler import diffusers_library, one_step_t_init
from pecker_fast.models.pipeline_families import PipelineFamily, image_size
from pecker_fast.models.shards import read_shards
from pecker_fast.regions import Region, in_region
from pecker_fast.schedule import NoiseSchedule
from pecker_fast.score_model import PREDICTION_TYPES

INDEX = "model_index.json"
SETTINGS = Path("scheduler") / "scheduler_config.json"


@dataclass(frozen=True)
class PipelineFolder:
    """A text-to-image pipeline on the disk: text encoders and one UNet2DConditionModel.

    Attributes:
        path: The folder.
        family: Which kind it is.
        index: ``model_index.json``.
        unet_config: ``unet/config.json``.
        scheduler_config: ``scheduler/scheduler_config.json``.
        prediction_type: "epsilon" or "v_prediction": what the UNet predicts.
    """

    path: Path
    family: PipelineFamily
    index: dict[str, Any]
    unet_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    prediction_type: str

    @staticmethod
    def is_one(folder: StrPath) -> bool:
        """Whether it says that it is a pipeline."""
        return (Path(folder) / INDEX).is_file()

    @classmethod
    def read(cls, folder: StrPath) -> PipelineFolder:
        """Look at a folder; no weights are read.

        Raises:
            FileFormatError: It is no pipeline, or one that is not supported; what is wrong is named.
        """
        path = Path(folder)
        if not path.is_dir():
            raise FileFormatError(f"{path}: no such folder; expected a pipeline that diffusers saved")
        if not cls.is_one(path):
            raise FileFormatError(
                f"{path}: has no {INDEX}; expected a pipeline that diffusers saved (a "
                f"class-conditional model forgets classes: --forget_class)"
            )
        index = read_json(path / INDEX)
        family = check_index(path, index)
        unet_config = read_json(path / "unet" / "config.json")
        check_unet(path / "unet" / "config.json", unet_config, family)
        check_size_and_text(path, unet_config, family)
        weights_files(path / "unet")
        check_components(path, index)
        settings = path / SETTINGS
        scheduler_config = read_json(settings)
        prediction_type = check_prediction(settings, scheduler_config)
        return cls(path, family, index, unet_config, scheduler_config, prediction_type)

    @property
    def t_init(self) -> int | None:
        """Timestep at which it starts where it is a one-step generator, as its scheduler says; else None."""
        return one_step_t_init(self.scheduler_config)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents."""
        size = self.unet_config["sample_size"]
        height, width = size if isinstance(size, list) else (size, size)
        return int(self.unet_config.get("in_channels", 4)), height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of images in pixels.

        Raises:
            FileFormatError: The VAE's settings do not say it.
        """
        return image_size(self.path)

    @property
    def components(self) -> set[str]:
        """Names of the folders that make up the pipeline."""
        return {
            name
            for name, value in self.index.items()
            if name.isidentifier() and isinstance(value, list) and (self.path / name).is_dir()
        }

    @property
    def weights_files(self) -> tuple[Path, ...]:
        """The UNet's weights."""
        return weights_files(self.path / "unet")

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the UNet's weights, from the headers of its files alone.

        Raises:
            FileFormatError: A file is damaged, or holds quantized weights or those of a wrapped network.
        """
        return {name: shape for file in self.weights_files for name, shape in _shapes(file).items()}

    @property
    def parameters(self) -> int:
        """Weights of the UNet."""
        return sum(map(math.prod, self.shapes.values()))

    def share_of(self, region: Region) -> float:
        """Share of the UNet's weights that lies in a region.

        Raises:
            ValueError: It has no such region.
        """
        return sum(math.prod(self.shapes[name]) for name in in_region(self.shapes, region)) / self.parameters

    @property
    def ledger(self) -> Ledger:
        """The deltas that the UNet is said to carry."""
        return Ledger.load(self.path / "unet")

    def tensors(self) -> dict[str, Tensor]:
        """The UNet's weights as they are stored, on the CPU.

        Raises:
            FileFormatError: A file is damaged, is not what its index lists, or has values that are NaN or infinite.
        """
        files = self.weights_files
        check_files(files)
        return read_safetensors(files[0])[0] if len(files) == 1 else read_shards(self.path / "unet")

    def check_parts(self, *components: str) -> None:
        """Read the weights of components, such as "vae", and refuse what would show up as NaN long after.

        Raises:
            FileFormatError: A file is damaged, or has values that are NaN or infinite.
        """
        for component in components:
            check_files(files_of(self.path / component))

    def unet(self, tensors: dict[str, Tensor] | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """The UNet2DConditionModel in eval mode, on the CPU.

        Args:
            tensors: Its weights, of which it gets copies; None reads them from the folder.
            dtype: To convert to; None leaves each weight as it is stored.

        Raises:
            FileFormatError: The weights do not fit ``unet/config.json``.
            ImportError: diffusers is not installed.
        """
        stored = self.tensors() if tensors is None else tensors
        unet = self._fitting({name: tuple(tensor.shape) for name, tensor in stored.items()})
        own = tensors is None
        # One copy, and in the dtype that is asked for: a clone as stored would be another UNet's worth of memory.
        unet.load_state_dict({name: tensor.to(dtype, copy=not own) for name, tensor in stored.items()}, assign=True)
        return unet.eval()

    def empty_unet(self) -> nn.Module:
        """The UNet2DConditionModel with weights that nobody has set, on torch's default device.

        Raises:
            ImportError: diffusers is not installed.
        """
        unet: nn.Module = diffusers_library().UNet2DConditionModel.from_config(self.unet_config)
        return unet

    def check_weights(self) -> None:
        """Compare the UNet's weights with its settings, by headers alone.

        Raises:
            FileFormatError: A file is damaged, or they do not fit.
            ImportError: diffusers is not installed.
        """
        self._fitting(self.shapes)

    def _fitting(self, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """The UNet on the meta device, if weights of these shapes fit it."""
        with torch.device("meta"):
            unet = self.empty_unet()
        expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
        check_shapes(self.path / "unet", shapes, expected)
        return unet

    def scheduler(self) -> Any:
        """The pipeline's own scheduler.

        Raises:
            FileFormatError: diffusers has no such scheduler.
            ImportError: diffusers is not installed.
        """
        name = self.index["scheduler"][1]
        kind = getattr(diffusers_library(), name, None)
        if kind is None or not name.endswith("Scheduler"):
            raise FileFormatError(f"{self.path / INDEX}: this diffusers has no scheduler {name!r}")
        return kind.from_config(self.scheduler_config)

    def schedule(self) -> NoiseSchedule:
        """Its table of alphas.

        Raises:
            FileFormatError: The scheduler has none, or one that does not decrease within (0, 1).
            ImportError: diffusers is not installed.
        """
        try:
            return NoiseSchedule.from_diffusers(self.scheduler(), PREDICTION_TYPES)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise FileFormatError(f"{self.path / SETTINGS}: cannot be trained with ({error})") from error

    def tokenizer(self, component: str = "tokenizer") -> Any:
        """The pipeline's own tokenizer, or one of several.

        Raises:
            FileFormatError: It cannot be read.
            ImportError: transformers is not installed.
        """
        return read_tokenizer(self.path / component, self.index[component][1])

    def token_ids(self, prompts: Sequence[str]) -> list[tuple[tuple[int, ...], ...]]:
        """What the tokenizers make of each prompt: prompts of the same tokens are one to the UNet.

        Raises:
            FileFormatError: A tokenizer cannot be read.
            ImportError: transformers is not installed.
        """
        found = (token_ids(self.tokenizer(component), prompts) for component in self.family.tokenizers)
        return list(zip(*found, strict=True))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that a tokenizer would cut.

        Raises:
            FileFormatError: A tokenizer cannot be read.
            ValueError: A prompt is too long; it is named, with its tokens and the limit.
        """
        for component in self.family.tokenizers:
            check_lengths(self.path / component, self.tokenizer(component), prompts)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """By the file's header, if what it tells of can be trained."""
    refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as stored:
            found = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            check_dtypes(str(file), {name: part.get_dtype() for name, part in found.items()})
            check_names(str(file), found)
            return {name: tuple(part.get_shape()) for name, part in found.items()}
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"{file}: truncated or not a safetensors file ({error})") from error


def quiet_libraries() -> None:
    """No progress bars and no advice from diffusers and transformers for the rest of the process.

    Raises:
        ImportError: One of them is not installed.
    """
    diffusers_library().utils.logging.disable_progress_bar()
    diffusers_library().utils.logging.set_verbosity_error()
    try:
        import transformers
    except ImportError as error:
        raise ImportError(MISSING) from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
