"""Score Forgetting Distillation on UNets of Stable Diffusion: its settings by name, and how distillers are made.

The network has diffusers' code and random (on a CPU unwritten) weights: FLOPs, bytes and seconds do not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from machines import REHEARSAL, sized
from torch import nn

from pecker_fast import DistillConfig, GuidanceConfig, MaskConfig, MaskedDistiller, NoiseSchedule
from pecker_fast.score_model import TextConditional

UNET: Mapping[str, Any] = {
    "sample_size": sized(64, 8),
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": sized(2, 1),
    "block_out_channels": sized((320, 640, 1280, 1280), (16,)),
    "down_block_types": sized(("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("CrossAttnDownBlock2D",)),
    "up_block_types": sized(("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, ("CrossAttnUpBlock2D",)),
    "cross_attention_dim": sized(768, 16),
    "attention_head_dim": sized(8, 4),
    "norm_num_groups": sized(32, 8),
}
"""Stable Diffusion 1.5's ``unet/config.json``, as far as it is not diffusers' default; a rehearsal has a small one."""
XL: Mapping[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""Stable Diffusion XL's."""
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
TOKENS = 77
RETAIN, FORGET, OVERRIDE, PROMPTS = (0, 1, 2, 3), 4, 5, 6
DENSITY = 0.1


@dataclass(frozen=True, eq=False)
class Setting:
    """One way to distil.

    Attributes:
        name: For people.
        where: What trains: rows of density 0.1 anywhere ("all") or in the "decoder", all of cross-attention ("xattn"),
            or every weight ("dense").
        both: Whether the fake score has the mask too, or trains whole.
        switches: Of ``DistillConfig``, beside preset "exact".
        guidance: Scale of the fake score in both of its uses; the true score's is 4.5.
        checkpointing: Whether the networks compute activations again in the backward pass.
        unet: Of which network: ``UNET`` or ``XL``.
    """

    name: str
    where: str = "dense"
    both: bool = True
    switches: Mapping[str, Any] = field(default_factory=dict)
    guidance: float = 4.5
    checkpointing: bool = False
    unet: Mapping[str, Any] = field(default_factory=lambda: UNET)

    def config(self, batch_size: int, mask: MaskConfig) -> DistillConfig:
        """The published recipe, but for the switches; ``batch_size`` retained prompts and as many forgotten ones."""
        scales = {"fake_score_update": self.guidance, "fake_score": self.guidance, "true_score": 4.5}
        size = self.unet["sample_size"]
        usual: dict[str, Any] = {
            "t_init": 625,
            "t_min": 20,
            "t_max": 980,
            "sid_alpha": 1.0,
            "generator_lr": 1e-6,
            "fake_score_lr": 3e-6,
            "eps": 1e-6,
            "forget_weight": 1.0,
            "clip_value": None,
            "ema_decay": None,
        }
        return DistillConfig(
            **usual | dict(self.switches),
            retain=RETAIN,
            forget=(FORGET,),
            override=(OVERRIDE,),
            num_classes=PROMPTS,
            sample_shape=(4, size, size),
            batch_size=batch_size,
            mask=mask,
            fake_score_mask="same" if self.both else None,
            guidance=GuidanceConfig(**scales, dropout=0.0 if "reuse_generator_forward" in self.switches else 0.1),
            share_frozen_weights=self.where != "dense",
        )


DENSE = Setting("exact, dense")
MASKED = Setting("exact, rows 0.1 of both networks", "all")
LEAN = {"micro_batch_size": 2}
DENSE_LEAN = Setting("exact, dense, checkpointing, micro-batches of 2", switches=LEAN, checkpointing=True)
MASKED_LEAN = Setting(
    "exact, rows 0.1 of both networks, checkpointing, micro-batches of 2", "all", True, LEAN, 4.5, True
)


def make_unet(device: torch.device, dtype: torch.dtype = BFLOAT16, settings: Mapping[str, Any] = UNET) -> nn.Module:
    """The UNet: on a GPU with random weights, on a CPU in memory that nobody has written to."""
    from diffusers import UNet2DConditionModel

    unwritten = device.type == "cpu" and not REHEARSAL
    torch.manual_seed(0)
    with torch.device("meta") if unwritten else device:
        unet = UNet2DConditionModel(**settings)
    for module in unet.modules():  # diffusers warns of its own ``to(dtype)``
        nn.Module._apply(module, lambda tensor: tensor.to(dtype), recurse=False)
    unet = unet.to_empty(device=device) if unwritten else unet.to(memory_format=torch.channels_last)
    return unet.eval()


def mask_config(unet: nn.Module, where: str) -> MaskConfig:
    """Rows by chance, or all of a part."""
    if where == "dense":
        return MaskConfig(kind="dense", lr_scale="none")
    if where == "xattn":
        region = tuple(f"{name}." for name, _ in unet.named_modules() if name.endswith(".attn2"))
        return MaskConfig(kind="dense", lr_scale="none", region=region)
    part: Any = where
    return MaskConfig(kind="random", density=DENSITY, block="row", lr_scale="none", region=part)


def make(setting: Setting, unet: nn.Module, batch_size: int) -> MaskedDistiller:
    """A distiller, ready to step."""
    weight = next(unet.parameters())
    like = {"device": weight.device, "dtype": weight.dtype}
    texts = torch.randn(PROMPTS + 1, TOKENS, setting.unet["cross_attention_dim"], **like)
    added = {}
    if setting.unet.get("addition_embed_type") is not None:
        pooled = setting.unet["projection_class_embeddings_input_dim"] - 6 * setting.unet["addition_time_embed_dim"]
        added = {"text_embeds": torch.randn(len(texts), pooled, **like), "time_ids": torch.zeros(len(texts), 6, **like)}
    config = setting.config(batch_size, mask_config(unet, setting.where))
    made = MaskedDistiller(unet, NoiseSchedule.scaled_linear(), config, predict=TextConditional(texts, added=added))
    made.build_mask()
    set_checkpointing(made, setting.checkpointing)
    return made


def set_checkpointing(distiller: MaskedDistiller, on: bool) -> None:
    """In all three networks."""
    for network in (distiller.true_score, distiller.generator, distiller.fake_score):
        unet: Any = network
        (unet.enable_gradient_checkpointing if on else unet.disable_gradient_checkpointing)()
