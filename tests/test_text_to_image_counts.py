"""An iteration on Stable Diffusion's UNet: the shipped counts are what they claim, and a hand count of a small one."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pecker_fast import DistillConfig, GuidanceConfig, MaskConfig, MaskedDistiller, NoiseSchedule
from pecker_fast.score_model import TextConditional

COUNTED = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu" / "text_to_image.json"
SIDE, TOKENS, WIDTH, BATCH = 6, 5, 8, 3


class Output(NamedTuple):
    sample: torch.Tensor


class Network(nn.Module):
    """Convolutions around one cross-attention, in the shape of diffusers' network."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x_t, t, encoder_hidden_states):
        hidden = self.conv_in(x_t)
        q = self.to_q(hidden.flatten(2).mT)
        k, v = self.to_kv(encoder_hidden_states).chunk(2, -1)
        mixed = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return Output(self.conv_out(hidden + mixed.mT.reshape(hidden.shape)))


def test_the_published_iteration_is_36_of_the_layers_and_44_of_attention():
    positions = SIDE**2
    layers = {
        "conv_in": 2 * BATCH * positions * 9 * 4 * WIDTH,
        "conv_out": 2 * BATCH * positions * 9 * 4 * WIDTH,
        "to_q": 2 * BATCH * positions * WIDTH * WIDTH,
        "to_kv": 2 * BATCH * TOKENS * WIDTH * 2 * WIDTH,
    }
    attention = 2 * 2 * BATCH * positions * TOKENS * WIDTH
    guidance = GuidanceConfig(fake_score_update=4.5, fake_score=4.5, true_score=4.5)
    settings = {"forget": (1,), "override": (0,), "num_classes": 2, "sample_shape": (4, SIDE, SIDE)}
    settings |= {"guidance": guidance, "mask": MaskConfig(kind="dense"), "batch_size": BATCH, "t_init": 625}
    config = DistillConfig(preset="published", **settings)
    predict = TextConditional(torch.randn(3, TOKENS, WIDTH))
    distiller = MaskedDistiller(Network(), NoiseSchedule.scaled_linear(), config, predict=predict)
    distiller.build_mask()
    with sdpa_kernel(SDPBackend.MATH):
        counted = distiller.flops()
    # Embeddings want no gradient, nor do keys and values where they are made of them by frozen layers.
    never = 14 * layers["to_kv"] + 8 * attention
    assert counted["total"] == 36 * sum(layers.values()) + 44 * attention - never
    forwards = [counted[network]["forward"] for network in ("generator", "true_score", "fake_score")]
    assert forwards == [n * (sum(layers.values()) + attention) for n in (4, 4, 8)]
    assert [counted[network]["weight_gradient"] for network in ("generator", "fake_score")] == [
        n * sum(layers.values()) for n in (2, 4)
    ]


def test_the_shipped_counts_are_what_they_claim():
    counted = json.loads(COUNTED.read_text(encoding="utf-8"))
    flops, memory, xl = ({row["what"]: row for row in counted[topic]} for topic in ("flops", "memory", "memory_xl"))
    published = flops["published, dense"]
    assert published["forwards"] == pytest.approx(37.2, rel=0.01)
    for row in flops.values():
        networks = ("generator", "true_score", "fake_score")
        assert row["total"] == sum(sum(row[name].values()) for name in networks) <= published["total"]
        assert row["share"] == pytest.approx(row["total"] / published["total"])
    for row in (*memory.values(), *xl.values()):
        assert row["peak"] == sum(row["parts"].values()) + row["activations"]
    lean = "exact, {}, checkpointing, micro-batches of 2"
    ours, dense = (memory[lean.format(what)]["peak"] for what in ("rows 0.1 of both networks", "dense"))
    assert counted["batch_size"] == 4 and ours < 16e9 and ours < dense / 2
    assert xl[lean.format("rows 0.1 of both networks")]["peak"] < xl[lean.format("dense")]["peak"] / 2
