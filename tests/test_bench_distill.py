"""What the benchmarks of a distiller rest on: the masks they race, the bytes they count, the verdicts they print."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

NAMES = ("machines", "measure", "power", "distillers")


@pytest.fixture(scope="module")
def distillers():
    """At the sizes of a rehearsal: the digits' network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PECKER_FAST_REHEARSE", raising=False)
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module("distillers")
        patch.setattr(module, "sized", lambda _, rehearsal: rehearsal)
        yield module
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def masks(distillers):
    return distillers.Masks(distillers.make_network(torch.device("cpu")))


@pytest.mark.parametrize("kind", ["random", "saliency"])
def test_active_are_rows_of_the_decoder_and_no_norms(distillers, masks, kind):
    setting = distillers.Setting("exact", kind)
    mask = masks[setting]
    assert masks[setting] is mask is masks.of_fake_score(setting)
    assert 0.08 < mask.density <= 0.1  # a share of all weights of the model
    active = [name for name, parameter in mask.parameters.items() if parameter.numel]
    assert active and all(name.startswith(("up.", "norm_out.", "conv_out.")) and "norm" not in name for name in active)


def test_places_of_masks(distillers, masks):
    norms = masks[distillers.EXACT_NORMS]
    assert any("norm" in name for name, parameter in norms.parameters.items() if parameter.numel)
    anywhere = masks[distillers.EXACT_BOTH]
    assert any(name.startswith("down.") for name, parameter in anywhere.parameters.items() if parameter.numel)
    whole = masks.of_fake_score(distillers.EXACT_GENERATOR)
    assert masks[distillers.EXACT_GENERATOR] == anywhere and whole.density == 1.0


def test_masked_gradients_are_checked_against_dense_ones(distillers, masks, monkeypatch):
    distillers.check(distillers.EXACT, distillers.PUBLISHED, masks)
    original = distillers.make

    def other_loss(setting, *args, **config):
        return original(setting, *args, **config, sid_alpha=1.2 if setting.mask == "dense" else 1.0)

    monkeypatch.setattr(distillers, "make", other_loss)
    with pytest.raises(AssertionError, match="exact, random rows 0.1 of the decoder: relative error"):
        distillers.check(distillers.EXACT, distillers.PUBLISHED, masks)


def test_bytes_are_those_of_every_tensor_once(distillers, masks):
    """W is one network: three of them (of which a dense run trains two in place), and for each active weight of two
    networks gradient and second moment, one running average, and, where it is not the dense weight itself, a copy."""
    weights = 4 * sum(weight.numel() for weight in masks.network.parameters())
    for setting, expected in ((distillers.EXACT_DENSE, 3 + 2 * 2 + 1), (distillers.EXACT, 3 + 0.1 * (2 * 3 + 1))):
        made = distillers.make(setting, masks)
        made.step()
        assert distillers.bytes_of(made) == pytest.approx(expected * weights, rel=0.08), setting.name
    shared = torch.zeros(1000)
    assert distillers.bytes_of([shared, {"part": shared[10:], "again": shared.view(10, 100)}, None, 3]) == 4000


@pytest.mark.parametrize(
    "verdict, headline, said",
    [
        (True, True, "quality holds"),
        (False, False, "quality does not hold"),
        ("missing", True, "quality not measured"),
        ("no file", True, "quality not measured"),
    ],
)
def test_a_row_whose_quality_does_not_hold_is_printed_as_failed(distillers, tmp_path, verdict, headline, said):
    path, ours, theirs = tmp_path / "quality.json", distillers.FAST, distillers.PUBLISHED
    assert ours.name == "fast, random rows 0.1 of the decoder"
    if verdict != "no file":
        path.write_text(json.dumps({"verdicts": {} if verdict == "missing" else {ours.name: verdict}}))
    seconds = {ours: distillers.Seconds.of([1.0, 1.0]), theirs: distillers.Seconds.of([2.0, 2.0])}
    flops = {ours: 10**12, theirs: 2 * 10**12}
    row = distillers.speed_row(ours, theirs, 0.1, seconds, flops, 4e12, "target 2.0x", path)
    assert (row.headline, row.ratio) == (headline, 2.0)
    assert row.share == f"25% of matmul, target 2.0x, {said}"
    assert row.what.startswith("FAILED, ") == (verdict is False)
    assert row.what.endswith(f"distill: {ours.name}, batch 2 + 1, float32")
