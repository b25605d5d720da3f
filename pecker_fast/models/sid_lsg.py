"""One-step generators of SiD-LSG and SFD as ordinary pipeline folders.

A snapshot is ``pickle.dump({"ema": unet})``: a pickled UNet2DConditionModel, which is read without running it
(`module_pickle`), held against the pipeline that it was distilled from, and written in that pipeline's place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast.checkpoint import StrPath, read_json, write_safetensors
from pecker_fast.errors import FileFormatError
from pecker_fast.foreign_weights import check_network
from pecker_fast.models.module_pickle import PickledModule, read_module
from pecker_fast.models.one_step_scheduler import diffusers_library, one_step_scheduler
from pecker_fast.models.pipeline_files import (
    INDEX,
    SCHEDULER,
    check_pipeline,
    copy_components,
    index_with_scheduler,
    scheduler_entry,
)
from pecker_fast.models.storage import WEIGHTS_NAME
from pecker_fast.output_folder import claim
from pecker_fast.schedule import NoiseSchedule

T_INIT = 625
"""Where published generators of Stable Diffusion start."""
KEY = "ema"
_SHOWN = 5
_LONGEST = 100


@dataclass(frozen=True)
class SidGenerator:
    """A one-step generator and the pipeline that it belongs to.

    Attributes:
        base: The pipeline that it was distilled from.
        weights: Of the UNet, by their names in ``unet/``, in the dtype of the snapshot.
        scheduler: ``EulerDiscreteScheduler`` that makes the generator's one step, see `one_step_scheduler`.
    """

    base: Path
    weights: Mapping[str, Tensor]
    scheduler: Any

    @classmethod
    def read(cls, file: StrPath, base: StrPath, *, t_init: int = T_INIT) -> SidGenerator:
        """Read a snapshot and hold it against its pipeline.

        Gives the weights of ``pickle.load(open(file, "rb"))["ema"].state_dict()``; nothing in the file is run.

        Args:
            file: The snapshot, such as ``batch512_cfg4.54.54.5_t625_8380_v2.pkl``.
            base: Folder of the pipeline that it was distilled from, as diffusers saves it.
            t_init: Timestep at which the generator starts.

        Raises:
            FileFormatError: ``base`` is no pipeline with a UNet2DConditionModel; or the snapshot is damaged, holds
                something else, or is of another architecture: settings, names, shapes and values are compared.
            ImportError: diffusers is not installed.
            ValueError: ``t_init`` is no timestep of the pipeline.
        """
        file, base = Path(file), Path(base)
        check_pipeline(base)
        config = read_json(base / "unet" / "config.json")
        scheduler = _scheduler(base, t_init)
        network = read_module(file, KEY)
        _check_settings(file, base, network, config)
        _check_shapes(file, base, network, config)
        weights = {name: tensor.read() for name, tensor in network.tensors.items()}
        check_network(f"{file}: {KEY}", weights)
        return cls(base, weights, scheduler)

    def save(self, folder: StrPath, *, overwrite: bool = False) -> None:
        """Write an ordinary pipeline folder, complete or not at all; ``overwrite`` lets an older one go.

        ``StableDiffusionPipeline.from_pretrained(folder)`` draws from it with ``num_inference_steps=1`` and
        ``guidance_scale=0``. UNet and scheduler are new, all other components those of ``base``, byte for byte.

        Raises:
            FileFormatError: A file cannot be read or written, or an older result or files of yours are in the way.
        """
        with claim(folder, "SidGenerator.save", ("unet", "scheduler", INDEX), replace=overwrite) as unfinished:
            copy_components(self.base, unfinished, without=("unet", "scheduler"))
            (unfinished / "unet").mkdir()
            (unfinished / "unet" / "config.json").write_bytes((self.base / "unet" / "config.json").read_bytes())
            write_safetensors(unfinished / "unet" / WEIGHTS_NAME, self.weights, {"format": "pt"})
            self.scheduler.save_pretrained(unfinished / "scheduler")
            index = index_with_scheduler(self.base, "diffusers", type(self.scheduler).__name__)
            (unfinished / INDEX).write_text(index, encoding="utf-8", newline="")


def _scheduler(base: Path, t_init: int) -> Any:
    """Of the one step, on the schedule of the pipeline's own scheduler."""
    name = scheduler_entry(base)[1]
    kind = getattr(diffusers_library(), name, None)
    if kind is None or not name.endswith("Scheduler"):
        raise FileFormatError(f"{base / INDEX}: this diffusers has no scheduler {name!r}")
    try:
        own = kind.from_config(read_json(base / SCHEDULER))
        schedule = NoiseSchedule.from_diffusers(own, predicts=("epsilon", "v_prediction"))
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{base / SCHEDULER}: {error}") from error
    return one_step_scheduler(schedule, t_init, own.config.prediction_type)


def _check_settings(file: Path, base: Path, network: PickledModule, config: Mapping[str, Any]) -> None:
    """What both say of the architecture; shapes do not tell the number of attention heads, for example."""
    if network.class_name != "UNet2DConditionModel":
        raise FileFormatError(f"{file}: {KEY}: expected a UNet2DConditionModel, got {network.class_name}")
    own = {name: value for name, value in network.config.items() if not name.startswith("_") and name in config}
    other = [
        f"{name} {_short(value)}, not {_short(config[name])}"
        for name, value in own.items()
        if (value or None) != (config[name] or None)  # versions of diffusers write None, False or nothing
    ]
    if other:
        raise FileFormatError(f"{file}: {KEY}: is no generator of {base}: it has {'; '.join(other[:_SHOWN])}")


def _check_shapes(file: Path, base: Path, network: PickledModule, config: Mapping[str, Any]) -> None:
    with torch.device("meta"):
        expected = diffusers_library().UNet2DConditionModel.from_config(dict(config)).state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    found = {name: tensor.size for name, tensor in network.tensors.items()}
    wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if wrong:
        shown = [
            f"{_short(name)} {found.get(name, 'missing')}, expected {wanted.get(name, 'none')}"
            for name in wrong[:_SHOWN]
        ]
        raise FileFormatError(
            f"{file}: {KEY}: is no generator of {base}: {len(wrong)} weights differ: {'; '.join(shown)}"
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
