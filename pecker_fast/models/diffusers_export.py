"""A `DDPMUNet` as a stock ``UNet2DModel`` of diffusers that predicts the same noise.

diffusers adds the embeddings of time and class, where this network concatenates them. Both agree with embeddings of
twice the size: the time MLP is padded with zeros, so that it gives ``[time, 0]``, and the table of classes holds
``[0, MLP(class)]``, the class MLP folded in, "no class" as its last row. SiLU keeps zeros, so the sum is the
concatenation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pecker_fast.checkpoint import StrPath, write_json
from pecker_fast.errors import FileFormatError
from pecker_fast.models.ddpm import DDPMUNet
from pecker_fast.models.one_step_scheduler import betas_of, diffusers_library, one_step_scheduler
from pecker_fast.models.storage import classes_in, load, load_config
from pecker_fast.output_folder import claim
from pecker_fast.schedule import NoiseSchedule

FILES = ("config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json", "generation.json")
"""What `export_diffusers` writes."""

_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {
    "temb_cemb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def to_diffusers(model: DDPMUNet) -> Any:
    """The same network as ``diffusers.UNet2DModel``, for inference.

    ``to_diffusers(model)(x_t, t, class_labels=condition).sample`` equals ``model.eval()(x_t, t, condition)`` up to
    rounding; label ``num_classes`` stays "no class".

    Args:
        model: In any floating dtype and on any device; nothing in it is changed.

    Returns:
        ``UNet2DModel`` in eval mode on the CPU, in the dtype of ``model``, with weights of its own.

    Raises:
        ImportError: diffusers is not installed.
        TypeError: Not a `DDPMUNet`.
        ValueError: Group norms with different numbers of groups, for which diffusers has no setting.
    """
    if not isinstance(model, DDPMUNet):
        raise TypeError(f"expected a DDPMUNet, got {type(model).__name__}; others export themselves")
    settings = _settings(model)
    unet2d = diffusers_library().UNet2DModel
    with torch.device("meta"):
        unet = unet2d(**settings)
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    renamed = _renamed(weights, len(model.config["channel_mult"])) | _embeddings(model)
    unet.load_state_dict({name: tensor.contiguous() for name, tensor in renamed.items()}, assign=True)
    return unet.eval()


@dataclass(frozen=True)
class Exported:
    """What diffusers needs to draw the images of a model folder.

    Attributes:
        unet: ``UNet2DModel`` that predicts what the folder's network does.
        scheduler: Its scheduler, see `to_scheduler`.
        generation: How this package samples, and what the classes are called, where that is known.
    """

    unet: Any
    scheduler: Any
    generation: Mapping[str, Any]

    @classmethod
    def read(cls, folder: StrPath) -> Exported:
        """Load the folder of a `DDPMUNet`, as ``models.save`` writes it.

        Raises:
            FileFormatError: It is damaged, or holds another network or one that cannot be sampled from.
            ImportError: diffusers is not installed.
            ValueError: As `to_diffusers`.
        """
        config = load_config(folder)
        if config["_class_name"] != "DDPMUNet" or config["generation"] is None:
            raise FileFormatError(
                f"{folder}: expected the folder of a DDPMUNet that can be sampled from, got {config['_class_name']} "
                f"with generation {config['generation']!r}"
            )
        model = cast(DDPMUNet, load(folder))
        generation = config["generation"]
        return cls(to_diffusers(model), to_scheduler(generation), generation | classes_in(config).to_dict())

    def save(self, folder: StrPath, *, overwrite: bool = False) -> None:
        """Write the files of ``FILES``, complete or not at all; ``overwrite`` lets an older export go.

        Raises:
            FileFormatError: The folder cannot be written, or has an older result or files of yours in the way.
        """
        with claim(folder, "export_diffusers", FILES, replace=overwrite) as unfinished:
            self.unet.save_pretrained(unfinished)
            self.scheduler.save_pretrained(unfinished)
            write_json(unfinished / "generation.json", self.generation)


def export_diffusers(folder_in: StrPath, folder_out: StrPath, *, overwrite: bool = False) -> Any:
    """Write a model folder as one that stock diffusers reads, complete or not at all.

    ``UNet2DModel.from_pretrained(folder_out)`` gives the network, and ``from_pretrained(folder_out)`` of
    ``EulerDiscreteScheduler`` the scheduler of a one-step generator, to be used with one step, of ``DDIMScheduler``
    that of a model that samples by DDIM; ``generation.json`` says how this package samples.

    Args:
        folder_in: A folder of a `DDPMUNet`, as ``models.save`` writes it.
        folder_out: Where to; what else is in it stays.
        overwrite: Whether an older result there, of this function, may go.

    Returns:
        The ``UNet2DModel`` that was written.

    Raises:
        FileFormatError: ``folder_in`` is damaged, holds another network or one that cannot sample, or ``folder_out``
            cannot be written.
        ImportError: diffusers is not installed.
        ValueError: As ``to_diffusers``.
    """
    exported = Exported.read(folder_in)
    exported.save(folder_out, overwrite=overwrite)
    return exported.unet


def to_scheduler(generation: Mapping[str, Any]) -> Any:
    """The scheduler of diffusers for a model folder's ``generation``.

    A one-step generator gets that of `one_step_scheduler`. DDIM agrees with ``ddim_sample`` where the number of steps
    divides that of timesteps and ``use_clipped_model_output=True`` is given to ``step``.

    Raises:
        ImportError: diffusers is not installed.
    """
    schedule = NoiseSchedule.from_dict(generation["schedule"])
    if generation["kind"] == "one_step":
        return one_step_scheduler(schedule, generation["t_init"])
    betas = betas_of(schedule)
    ddim = diffusers_library().DDIMScheduler
    return ddim(num_train_timesteps=len(betas), trained_betas=betas, timestep_spacing="trailing")


def _settings(model: DDPMUNet) -> dict[str, Any]:
    config = model.config
    groups = {module.num_groups for module in model.modules() if isinstance(module, nn.GroupNorm)}
    if len(groups) != 1:
        raise ValueError(
            f"norm_groups: diffusers has one number of groups for all norms, this network has {sorted(groups)}; export "
            "is possible where norm_groups divides the channels of every level"
        )
    size, levels = config["image_size"], range(len(config["channel_mult"]))
    attends = [size >> level in config["attention_resolutions"] for level in levels]
    return {
        "sample_size": size,
        "in_channels": config["channels"],
        "out_channels": config["channels"],
        "time_embedding_dim": 8 * config["width"],
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "down_block_types": tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        "up_block_types": tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        "block_out_channels": tuple(config["width"] * multiple for multiple in config["channel_mult"]),
        "layers_per_block": config["num_res_blocks"],
        "downsample_padding": 0,
        "dropout": config["dropout"],
        "attention_head_dim": None,
        "norm_num_groups": groups.pop(),
        "norm_eps": 1e-6,
        "num_class_embeds": config["num_classes"] + 1,
    }


def _renamed(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """All weights but those of the embeddings, under their names in diffusers."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith(("temb.", "cemb.", "classes_emb.")):
            continue
        own = _own_name(name, levels)
        square = ".attentions." in own and tensor.dim() == 4  # a 1x1 convolution here, a linear layer there
        renamed[own] = tensor.flatten(1) if square else tensor
    return renamed


def _own_name(name: str, levels: int) -> str:
    parts = name.split(".")
    match parts:
        case ["mid", layer, *rest]:
            kind, number = layer.split("_")
            return f"mid_block.{_layer(kind, int(number) - 1, rest)}"
        case ["down", level, ("block" | "attn") as kind, number, *rest]:
            return f"down_blocks.{level}.{_layer(kind, int(number), rest)}"
        case ["down", level, "downsample", *rest]:
            return f"down_blocks.{level}.downsamplers.0.{'.'.join(rest)}"
        case ["up", level, ("block" | "attn") as kind, number, *rest]:
            return f"up_blocks.{levels - 1 - int(level)}.{_layer(kind, int(number), rest)}"
        case ["up", level, "upsample", *rest]:
            return f"up_blocks.{levels - 1 - int(level)}.upsamplers.0.{'.'.join(rest)}"
        case ["norm_out", *rest]:
            return f"conv_norm_out.{rest[0]}"
    return name


def _layer(kind: str, number: int, rest: list[str]) -> str:
    if kind == "block":
        return f"resnets.{number}.{_RESNET[rest[0]]}.{rest[1]}"
    return f"attentions.{number}.{_ATTENTION[rest[0]]}.{rest[1]}"


@torch.no_grad()
def _embeddings(model: DDPMUNet) -> dict[str, Tensor]:
    """The padded time MLP, and the table of embedded classes."""
    first, second = (cast(nn.Linear, layer) for layer in model.temb.dense)
    classes = model.cemb(model.classes_emb.weight).cpu()
    padded = {
        "time_embedding.linear_1.weight": nn.functional.pad(first.weight, (0, 0, 0, first.out_features)),
        "time_embedding.linear_1.bias": nn.functional.pad(first.bias, (0, first.out_features)),
        "time_embedding.linear_2.weight": nn.functional.pad(
            second.weight, (0, second.in_features, 0, second.out_features)
        ),
        "time_embedding.linear_2.bias": nn.functional.pad(second.bias, (0, second.out_features)),
    }
    table = torch.cat([torch.zeros_like(classes), classes], dim=1)
    return {name: tensor.cpu() for name, tensor in padded.items()} | {"class_embedding.weight": table}
