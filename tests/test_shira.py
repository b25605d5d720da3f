"""SHiRA adapters: the format to the letter, and, where peft is installed, the model that peft makes of it."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from models import Zoo
from safetensors.torch import load_file
from test_delta import moved, same
from torch import nn

from pecker_fast import BlockMask, Delta, export_shira
from pecker_fast.checkpoint import read_json
from pecker_fast.delta import Ledger
from pecker_fast.errors import FileFormatError
from pecker_fast.written import NAME

ROOT = Path(__file__).parents[1]
MASKED = ("a.weight", "mid.1.weight", "out.weight")


class Net(nn.Module):
    """Ragged linear layers; ``sub.out`` ends like ``out`` and stays as it is."""

    def __init__(self):
        super().__init__()
        self.a, self.mid = nn.Linear(24, 36), nn.Sequential(nn.ReLU(), nn.Linear(36, 40))
        self.out, self.sub = nn.Linear(40, 16, bias=False), nn.ModuleDict({"out": nn.Linear(16, 16)})

    def forward(self, x):
        return self.sub["out"](self.out(self.mid(self.a(x))))


def element_mask(model, names=MASKED, density=0.13):
    return BlockMask.from_saliency(
        {name: torch.rand(model.get_parameter(name).shape) for name in names}, density, "element"
    )


def trained(dtype=torch.float32):
    """Base, trained model with small steps, and the delta between them."""
    base = Net().to(dtype)
    mask = element_mask(base)
    after = copy.deepcopy(base)
    with torch.no_grad():
        for name in MASKED:
            after.get_parameter(name)[mask.to_dense(name)] += 0.01 * torch.randn(mask.parameters[name].numel).to(dtype)
    return base, after, Delta.extract(base, after, mask)


def test_the_format(tmp_path):
    base, after, delta = trained()
    before = copy.deepcopy(base)
    export_shira(delta, base, tmp_path / "adapter")
    assert same(base, before) and len(Ledger.of(base)) == 0
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        NAME,
    }
    config, tensors = (
        read_json(tmp_path / "adapter" / "adapter_config.json"),
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
    )
    assert config["peft_type"] == "SHIRA" and config["fan_in_fan_out"] is False
    matched = {name for name, _ in base.named_modules() if re.fullmatch(config["target_modules"], name)}
    assert matched == {"a", "mid.1", "out"}
    assert set(tensors) == {f"base_model.model.{m}.shira_{kind}" for m in matched for kind in ("weight", "indices")}
    for module in matched:
        values, indices = (tensors[f"base_model.model.{module}.shira_{kind}"] for kind in ("weight", "indices"))
        old, new = base.get_submodule(module).weight, after.get_submodule(module).weight
        count = config["r"] * sum(old.shape)
        assert values.dtype == torch.float32 and values.shape == (count,)
        assert indices.dtype == torch.int32 and indices.shape == (2, count)
        rows, columns = indices.long()
        assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == count
        difference = torch.zeros_like(old)
        difference[rows, columns] = values
        assert torch.equal(difference, new - old)


def test_a_base_that_carries_another_delta(tmp_path):
    base = Net()
    first_mask = element_mask(base, ("sub.out.weight",))
    second_mask = element_mask(base)
    first = Delta.extract(base, moved(base, first_mask), first_mask)
    second = Delta.extract(base, moved(base, second_mask), second_mask)
    first.apply(base)
    export_shira(second, base, tmp_path / "adapter")
    second.apply(base)
    with pytest.raises(ValueError, match="applied already"):
        export_shira(second, base, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    base = Zoo()
    cases = {
        "row": (BlockMask.random(base, 0.3, "row"), 'make one with block="element"'),
        "tile": (BlockMask.random(base, 0.3, (3, 5)), 'make one with block="element"'),
        "conv": (element_mask(base, ("conv_in.weight",)), "the weight of Conv2d"),
        "norm": (element_mask(base, ("norm.weight",)), "the weight of GroupNorm"),
        "bias": (element_mask(base, ("hidden.bias",)), "the bias of Linear"),
        "embedding": (element_mask(base, ("classes.weight",)), "the weight of Embedding"),
        "full": (
            element_mask(base, ("hidden.weight",), 0.99),
            r"hidden: peft needs r \* \(out \+ in\) = 15 \* 60 places",
        ),
    }
    for mask, message in cases.values():
        delta = Delta.extract(base, moved(base, mask), mask)
        with pytest.raises(ValueError, match=message):
            export_shira(delta, base, tmp_path / "adapter")
    linear, after, delta = trained()
    with pytest.raises(ValueError, match="has no layer"):
        export_shira(delta, nn.Linear(3, 3), tmp_path / "adapter")
    with pytest.raises(ValueError, match="applied already"):
        export_shira(delta, after, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError):
        export_shira(delta, linear, tmp_path / "file" / "adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_makes_the_trained_model_of_it(tmp_path, dtype, monkeypatch):
    # Our kernels/ would be taken for Hugging Face's package of that name by what peft imports.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    peft = pytest.importorskip("peft")
    base, after, delta = trained(dtype)
    export_shira(delta, base, tmp_path / "adapter")
    x = torch.randn(5, 24, dtype=dtype)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert not torch.equal(base(x), after(x))
        torch.testing.assert_close(adapted(x), after(x))
    merged = adapted.merge_and_unload()
    for name, weight in after.state_dict().items():
        torch.testing.assert_close(
            merged.state_dict()[name], weight, rtol=2**-7 if dtype == torch.bfloat16 else 2**-22, atol=1e-8
        )
