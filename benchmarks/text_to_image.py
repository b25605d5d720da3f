"""An iteration on the UNet of Stable Diffusion 1.x: its settings, and copies that count it without computing it.

The network has diffusers' code and random (on a CPU unwritten) weights: FLOPs, bytes and seconds do not depend on them.
Needs diffusers; ``check_diffusers`` says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from machines import sized
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pecker_fast import DistillConfig, GuidanceConfig, MaskConfig, MaskedDistiller, NoiseSchedule
from pecker_fast.flop_table import KINDS, count_by_network
from pecker_fast.iteration_flops import NETWORKS, unmasked_weights, without_data
from pecker_fast.memory_estimate import with_few_micro_batches
from pecker_fast.memory_meter import TensorMeter, tensors_of
from pecker_fast.memory_parts import bind_gradients, optimizers_of
from pecker_fast.score_model import TextConditional

UNET: Mapping[str, Any] = {
    "sample_size": sized(64, 8),
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": sized(2, 1),
    "block_out_channels": sized((320, 640, 1280, 1280), (16, 32)),
    "down_block_types": sized(
        ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("CrossAttnDownBlock2D", "DownBlock2D")
    ),
    "up_block_types": sized(("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, ("UpBlock2D", "CrossAttnUpBlock2D")),
    "cross_attention_dim": sized(768, 16),
    "attention_head_dim": sized(8, 4),
    "norm_num_groups": sized(32, 8),
}
"""Stable Diffusion 1.5's ``unet/config.json``, as far as it is not diffusers' default; a rehearsal has a small one."""
TOKENS = 77
RETAIN, FORGET, OVERRIDE, PROMPTS = (0, 1, 2, 3), 4, 5, 6
DENSITY = 0.1
PUBLISHED_F = 37.2
"""Forward passes of one network on one batch of prompts that the published iteration is worth, 64 x 64, math attention:
36 for convolutions and linear layers, 44 for the products of attention."""


@dataclass(frozen=True)
class Setting:
    """One way to distil.

    Attributes:
        name: For people.
        switches: Of ``DistillConfig``.
        where: Region of the masks; "dense" trains every weight.
        both: Whether the fake score has a mask too, or trains whole.
        guidance: Of the fake score, in both of its uses; the true score's is 4.5.
        dtype: Of the networks.
        checkpointing: Whether the networks compute activations again in the backward pass.
    """

    name: str
    switches: Mapping[str, Any] = field(default_factory=dict)
    where: str = "dense"
    both: bool = True
    guidance: float = 4.5
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = False

    @property
    def dense(self) -> tuple[str, ...]:
        """Networks of which every weight trains."""
        if self.where == "dense":
            return ("generator", "fake_score")
        return () if self.both else ("fake_score",)


PUBLISHED = Setting("published", {"preset": "published"})
EXACT = {"preset": "exact"}
BOTH = Setting("exact, rows 0.1 of both networks", EXACT, "all")
DECODER = Setting("exact, rows 0.1 in the decoders", EXACT, "decoder")
FLOPS = [
    PUBLISHED,
    Setting("published + merge_batches", {"preset": "published", "merge_batches": True}),
    Setting("published + closed_form_loss", {"preset": "published", "closed_form_loss": True}),
    Setting("published + skip_frozen", {"preset": "published", "skip_frozen": True}),
    Setting("exact: these three", EXACT),
    Setting("exact, rows 0.1 of the generator", EXACT, "all", both=False),
    BOTH,
    DECODER,
    Setting("exact, rows 0.1 in the cross-attention of both", EXACT, "xattn"),
    Setting("exact, 0.1 of both + reuse_generator_forward", EXACT | {"reuse_generator_forward": True}, "all"),
    Setting("exact, 0.1 of both + forget_batch_size an eighth", EXACT | {"forget_batch_size": 1}, "all"),
    Setting("exact, 0.1 of both + stop_gradient", EXACT | {"stop_gradient": True}, "all"),
    Setting("exact, 0.1 of both + guidance 1 of the fake score", EXACT, "all", guidance=1.0),
    Setting(
        "exact, 0.1 in the decoders + reuse_generator_forward + an eighth",
        EXACT | {"reuse_generator_forward": True, "forget_batch_size": 1},
        "decoder",
    ),
]
"""One switch after the other; each counted on its own line."""


def check_diffusers() -> None:
    """Say what is missing, before anything else fails.

    Raises:
        SystemExit: diffusers is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise SystemExit("part sd needs diffusers (pip install diffusers, no weights, no network); it is not installed")


def make_unet(device: torch.device, dtype: torch.dtype, checkpointing: bool = False) -> nn.Module:
    """The UNet: on a GPU with random weights, on a CPU with memory that nobody has written to."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET).to(dtype)
    unet = unet.to_empty(device=device)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    if device.type == "cuda" or sized(False, True):
        torch.manual_seed(0)
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return unet.eval()


def region(unet: nn.Module, where: str) -> Any:
    """What ``MaskConfig.region`` calls it."""
    if where != "xattn":
        return "all" if where == "dense" else where
    return tuple(name + "." for name, _ in unet.named_modules() if name.endswith(".attn2"))


def make(setting: Setting, device: torch.device, batch_size: int, unet: nn.Module | None = None, **more: Any) -> Any:
    """A distiller by the recipe of Score Forgetting Distillation for Stable Diffusion, ready to step.

    On a CPU a dense one is masked, too: its weights would not fit; ``rehearsal`` trains them all without their memory.
    """
    unet = make_unet(device, setting.dtype, setting.checkpointing) if unet is None else unet
    counted_only = device.type == "cpu" and not sized(False, True)
    where = "all" if setting.where == "dense" and counted_only else setting.where
    mask = MaskConfig(kind="dense" if where == "dense" else "random", density=DENSITY, block="row", lr_scale="none")
    if mask.kind == "random":
        mask = replace(mask, region=region(unet, where))
    masked = setting.both or counted_only
    guidance = GuidanceConfig(
        fake_score_update=setting.guidance, fake_score=setting.guidance, true_score=4.5, dropout=0.1
    )
    usual: dict[str, Any] = {
        **dict.fromkeys(("t_min", "t_max"), 20) | {"t_max": 980, "t_init": 625, "sid_alpha": 1.0},
        **{"generator_lr": 1e-6, "fake_score_lr": 3e-6, "eps": 1e-6, "forget_weight": 1.0},
        **{"clip_value": None, "ema_decay": None, "guidance": guidance},
        **{"retain": RETAIN, "forget": (FORGET,), "override": (OVERRIDE,), "num_classes": PROMPTS},
    }
    size = UNET["sample_size"]
    config = DistillConfig(
        **usual | dict(setting.switches) | more,
        sample_shape=(4, size, size),
        batch_size=batch_size,
        mask=mask,
        fake_score_mask="same" if masked else None,
        share_frozen_weights=True,
    )
    texts = torch.randn(PROMPTS + 1, TOKENS, UNET["cross_attention_dim"], device=device).to(setting.dtype)
    schedule = NoiseSchedule.scaled_linear()
    distiller = MaskedDistiller(unet, schedule, config, predict=TextConditional(texts))
    distiller.build_mask()
    return distiller


# -- counting --------------------------------------------------------------------------------------


def rehearsal(distiller: MaskedDistiller, dense: tuple[str, ...], few: bool = False) -> Any:
    """A copy without data whose ``step`` can be counted, and where every weight of the ``dense`` networks trains."""
    copied: Any = with_few_micro_batches(without_data(distiller)) if few else without_data(distiller)
    for optimizer in optimizers_of(copied):
        bind_gradients(optimizer.active)
    for name in dense:
        network = getattr(copied, name)
        unmasked_weights(network, distiller.mask)
        for parameter in network.parameters():
            parameter.requires_grad_(True)
            parameter.grad = torch.empty_like(parameter)
        nothing = {"zero_grad": lambda: None, "step": lambda: None, "param_groups": [{}], "active": network}
        setattr(copied, f"{name}_optimizer", SimpleNamespace(**nothing))
    return copied


def flops(setting: Setting, batch_size: int, device: torch.device) -> dict[str, Any]:
    """FLOPs of an iteration, by network and kind, and in F; attention as products that autograd sees."""
    distiller = make(setting, device, batch_size)
    copied = rehearsal(distiller, setting.dense)
    table = count_by_network({name: getattr(copied, name) for name in NETWORKS})
    with sdpa_kernel(SDPBackend.MATH), table as counted:
        copied.step()
    return {name: dict(counted.counts[name]) for name in NETWORKS} | {"total": counted.total}


def forward_flops(device: torch.device, batch_size: int) -> int:
    """F: one forward of one network on one batch of prompts."""
    distiller = make(BOTH, device, batch_size)
    copied = without_data(distiller)
    x = torch.zeros((batch_size, *distiller.config.sample_shape), device=device)
    index = torch.zeros(batch_size, dtype=torch.int64, device=device)
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
        count_by_network({"true_score": copied.true_score}) as counted,
    ):
        copied.losses.predict(copied.true_score, x, index, index)
    return sum(counted.counts["true_score"][kind] for kind in KINDS)


def activations(distiller: MaskedDistiller, dense: tuple[str, ...] = ()) -> int:
    """Bytes that a step takes above what is held, attention as torch chooses it."""
    copied = rehearsal(distiller, dense, few=True)
    meter = TensorMeter(tensors_of(copied))
    with meter:
        copied.step()
    return meter.peak - meter.held_bytes


def dense_state(parameters: int, weight_bytes: int) -> dict[str, int]:
    """What our own store holds where every weight of both networks trains, by part; beta1 is 0, no running average."""
    masters = 4 * parameters
    own = 0 if weight_bytes == 4 else weight_bytes * parameters  # float32 weights train in place
    return {
        "weights_of_true_score": weight_bytes * parameters,
        "weights_of_fake_score": own,
        "weights_of_generator": own,
        "active_weights": 2 * masters,
        "gradients": 2 * masters,
        "optimizer_state": 2 * masters,
    }
