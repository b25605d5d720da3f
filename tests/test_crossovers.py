"""Timing the ways to compute weight gradients on this machine."""

import json

import torch

from pecker_fast import BlockMask, apply_mask, crossovers
from pecker_fast.cli import main
from pecker_fast.crossovers import Layer, measure_crossovers

SMALL = (Layer("conv", (128, 128, 3, 3), 1, 4), Layer("linear", (128, 128), 4, 1))


def test_every_way_of_every_layer_is_timed():
    measured = measure_crossovers(torch.device("cpu"), SMALL, densities=(0.1, 0.5))
    assert [(m.layer, m.block, m.density) for m in measured] == [
        (layer, block, density) for layer in ("conv", "linear") for block in ("row", (64, 64)) for density in (0.1, 0.5)
    ]
    for m in measured:
        assert set(m.choice.ms) == {"slabs", "dense"} and m.choice.ms[m.choice.used] == min(m.choice.ms.values()) > 0


def test_doctor_says_what_it_measured(monkeypatch, capsys):
    monkeypatch.setattr(crossovers, "CPU_LAYERS", SMALL)
    assert main(["doctor", "--measure", "--device", "cpu", "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)["weight_gradients"]
    assert len(rows) == 2 * 2 * len(crossovers.DENSITIES) and {row["used"] for row in rows} <= {"slabs", "dense"}
    assert main(["doctor", "--measure", "--device", "cpu"]) == 0
    assert "64x64   0.25" in capsys.readouterr().out


def test_a_masked_model_says_how_its_gradients_are_computed():
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40))
    mask = BlockMask.random(model, 0.3, "row")
    active = apply_mask(model, mask)
    assert set(active.weight_gradients().values()) == {"masked"}
    assert "weight gradients: masked 2" in active.summary()
    model = active.remove()
    active = apply_mask(model, BlockMask.dense(model))
    assert active.weight_gradients() == {"0.weight": "dense", "1.weight": "dense"}
