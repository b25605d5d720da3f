"""FLOPs and memory of an iteration on Stable Diffusion's UNets, 1.x and XL, counted on tensors without data.

    python benchmarks/count_text_to_image.py  # writes benchmarks/results/cpu/text_to_image.json; minutes, 16 GB
    python benchmarks/count_text_to_image.py --topics memory_xl  # the others stay as they are there

A dense run does not fit an ordinary machine's memory: its step is counted on a copy of a masked one, where every weight
trains; what it holds is arithmetic, which a small network confirms first.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import text_to_image
import torch
from text_to_image import DENSE, DENSE_LEAN, MASKED, MASKED_LEAN, UNET, XL, Setting
from torch.nn.attention import SDPBackend, sdpa_kernel

from pecker_fast import MaskedDistiller
from pecker_fast.flop_table import count_by_network
from pecker_fast.iteration_flops import NETWORKS, unmasked_weights, without_data
from pecker_fast.memory_estimate import with_few_micro_batches
from pecker_fast.memory_meter import TensorMeter, tensors_of
from pecker_fast.memory_parts import held_parts, keep_gradients_bound

RESULTS = Path(__file__).resolve().parent / "results" / "cpu" / "text_to_image.json"
CPU = torch.device("cpu")
BATCH = 4
PUBLISHED_F = 37.2
"""36 forward passes of one network on one batch of prompts for convolutions and linear layers, 44 for attention."""
MOST_GB = 16
ONE_BY_ONE = "exact, rows 0.1 of both networks, checkpointing, micro-batches of 1"
REUSE, EIGHTH = {"reuse_generator_forward": True}, {"forget_batch_size": 1}
PUBLISHED = Setting("published, dense", switches={"preset": "published"})
FLOPS = [
    PUBLISHED,
    Setting("published + merge_batches", switches={"preset": "published", "merge_batches": True}),
    Setting("published + closed_form_loss", switches={"preset": "published", "closed_form_loss": True}),
    Setting("published + skip_frozen", switches={"preset": "published", "skip_frozen": True}),
    DENSE,
    Setting("exact, rows 0.1 of the generator", "all", both=False),
    MASKED,
    Setting("exact, rows 0.1 of both in the decoder", "decoder"),
    Setting("exact, cross-attention of both networks (5 % of the weights)", "xattn"),
    Setting("exact, rows 0.1 of both + reuse_generator_forward", "all", switches=REUSE),
    Setting("exact, rows 0.1 of both + 1 forgotten prompt for 4", "all", switches=EIGHTH),
    Setting("exact, rows 0.1 of both + stop_gradient", "all", switches={"stop_gradient": True}),
    Setting("exact, rows 0.1 of both + guidance 1 of the fake score", "all", guidance=1.0),
    Setting("exact, rows 0.1 of both in the decoder + reuse + 1 for 4", "decoder", switches=REUSE | EIGHTH),
]
MEMORY = [
    DENSE,
    DENSE_LEAN,
    MASKED,
    dataclasses.replace(MASKED, name="exact, rows 0.1 of both networks, checkpointing", checkpointing=True),
    MASKED_LEAN,
    dataclasses.replace(
        MASKED_LEAN, name="exact, cross-attention of both networks, checkpointing, micro-batches of 2", where="xattn"
    ),
]
MEMORY_XL = [
    dataclasses.replace(setting, unet=XL)
    for setting in (
        *MEMORY[:-1],
        dataclasses.replace(MASKED_LEAN, name=ONE_BY_ONE, switches={"micro_batch_size": 1}),
        MEMORY[-1],
    )
    if setting.checkpointing
]


class Counting:
    """Masked distillers of one UNet by where their masks lie, one at a time; their settings change on copies."""

    def __init__(self, unet: Mapping[str, Any] = UNET) -> None:
        self._unet = unet
        self._made: tuple[str, MaskedDistiller] | None = None

    def distiller(self, where: str) -> MaskedDistiller:
        if self._made is None or self._made[0] != where:
            self._made = None  # before the next one takes its memory
            gc.collect()  # distillers are in cycles
            unet = text_to_image.make_unet(CPU, settings=self._unet)
            self._made = where, text_to_image.make(Setting("", where, unet=self._unet), unet, BATCH)
        return self._made[1]

    def rehearsal(self, setting: Setting) -> Any:
        """A copy without data that steps as ``setting`` says."""
        distiller = self.distiller("all" if setting.where == "dense" else setting.where)
        text_to_image.set_checkpointing(distiller, setting.checkpointing)
        copied: Any = without_data(distiller)
        config = setting.config(BATCH, distiller.config.mask)
        copied.config = copied.draws.config = config
        copied.losses = dataclasses.replace(copied.losses, config=config)
        keep_gradients_bound(copied)
        for name in _dense(setting):
            train_all(copied, name)
        return copied


def _dense(setting: Setting) -> tuple[str, ...]:
    if setting.where == "dense":
        return ("generator", "fake_score")
    return () if setting.both else ("fake_score",)


def train_all(copied: Any, name: str) -> None:
    """Make a network of a copy train every weight, with float32 gradients until its optimizer's step takes them."""
    network = getattr(copied, name)
    unmasked_weights(network, copied.mask)
    gradients: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(weight: torch.nn.Parameter) -> None:
        gradient = weight.grad.float()
        gradients[weight] = gradients[weight].add_(gradient) if weight in gradients else gradient
        weight.grad = None

    for parameter in network.parameters():
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(widen)
    nothing = {"zero_grad": lambda: None, "step": gradients.clear, "param_groups": [{}], "active": network}
    setattr(copied, f"{name}_optimizer", SimpleNamespace(**nothing))


def count_flops(copied: Any) -> dict[str, Any]:
    """Of a step, attention as the products that it is."""
    with sdpa_kernel(SDPBackend.MATH), count_by_network({name: getattr(copied, name) for name in NETWORKS}) as table:
        copied.step()
    return {**table.counts, "total": table.total}


def activations(copied: Any) -> int:
    """Bytes that a step takes above what is held."""
    copied = with_few_micro_batches(copied)
    meter = TensorMeter(tensors_of(copied))
    with meter:
        copied.step()
    return meter.peak - meter.held_bytes


def dense_parts(parameters: int, weight_bytes: int) -> dict[str, int]:
    """What is held where every weight of two networks trains: float32 masters, gradients, second moments."""
    weights = dict.fromkeys((f"weights_of_{name}" for name in NETWORKS), weight_bytes * parameters)
    return weights | dict.fromkeys(("active_weights", "gradients", "optimizer_state"), 2 * 4 * parameters)


def check_dense_parts() -> None:
    """The arithmetic, on a UNet that is small enough to be made."""
    small = UNET | {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    small |= {"down_block_types": UNET["down_block_types"][-2:], "up_block_types": UNET["up_block_types"][:2]}
    unet = text_to_image.make_unet(CPU, settings=small)
    found = held_parts(text_to_image.make(DENSE, unet, BATCH))
    expected = dense_parts(sum(parameter.numel() for parameter in unet.parameters()), 2)
    wrong = {name: (found[name], size) for name, size in expected.items() if found[name] != size}
    if wrong:
        raise SystemExit(f"parts of a dense run: found and expected bytes differ: {wrong}")


def flops_rows(counting: Counting) -> Iterator[dict[str, Any]]:
    for setting in FLOPS:
        counted = count_flops(counting.rehearsal(setting))
        if setting is PUBLISHED:
            published, forward = counted["total"], counted["true_score"]["forward"] / 4  # two batches, guided
        in_f = counted["total"] / forward
        if setting is PUBLISHED and abs(in_f / PUBLISHED_F - 1) > 0.01:
            raise SystemExit(f"the published iteration: expected {PUBLISHED_F} F, counted {in_f:.2f}")
        print(f"{setting.name:<70}{in_f:8.2f} F{counted['total'] / published:8.3f}", flush=True)
        yield {"what": setting.name, "forwards": in_f, "share": counted["total"] / published} | counted


def memory_rows(counting: Counting, settings: list[Setting]) -> Iterator[dict[str, Any]]:
    for setting in settings:
        copied = counting.rehearsal(setting)
        if setting.where == "dense":
            parameters = sum(weight.numel() for weight in copied.true_score.parameters())
            parts = dense_parts(parameters, 2)
        else:
            parts = held_parts(counting.distiller(setting.where))
        row = {"what": setting.name, "parts": parts, "activations": activations(copied)}
        row["peak"] = sum(parts.values()) + row["activations"]
        del copied  # so that its distiller can go before the next one is made
        if setting is MASKED_LEAN and row["peak"] >= MOST_GB * 1e9:
            raise SystemExit(f"{setting.name}: expected less than {MOST_GB} GB, counted {row['peak'] / 1e9:.1f}")
        print(
            f"{setting.name:<70}{row['peak'] / 1e9:8.2f} GB, {row['activations'] / 1e9:.2f} of it activations",
            flush=True,
        )
        yield row


TOPICS = {
    "memory": lambda: memory_rows(Counting(), MEMORY),
    "flops": lambda: flops_rows(Counting()),
    "memory_xl": lambda: memory_rows(Counting(XL), MEMORY_XL),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--topics", nargs="+", choices=TOPICS, default=list(TOPICS))
    options = parser.parse_args()
    check_dense_parts()
    results = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if results.get("versions", versions) != versions and set(options.topics) != set(TOPICS):
        raise SystemExit(f"{options.output} was counted with {results['versions']}, not {versions}: count all topics")
    results |= {"batch_size": BATCH, "versions": versions}
    for topic in options.topics:
        results[topic] = list(TOPICS[topic]())
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
