"""``pecker-fast convert``: what it writes is what the other commands take, and what it refuses it names."""

import json

import published_model
import pytest
import torch
from diffusers import UNet2DModel

from pecker_fast import BlockMask, models
from pecker_fast.cli import main
from pecker_fast.models.published import load_published


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    weights = published_model.random_weights(multiples=(1,), blocks=1, classes=3)
    return {name: tensor.float() for name, tensor in weights.items()}


@pytest.fixture
def here(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    torch.save([weights, {}, 5, weights], "trained.pth")
    torch.save([None, None, weights, None, 5, weights], "early.pth")
    torch.save({f"module.{name}": (tensor > 0).long() for name, tensor in weights.items()}, "with_0.5.pt")
    return tmp_path


def _convert(capsys, *more):
    assert main(["convert", "--json", "--quiet", *more]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def _refused(capsys, code, *more):
    assert main(["convert", *more, "--to", "out"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error:") == 1
    return captured.err


def test_a_trained_checkpoint_becomes_a_teacher(here, capsys):
    values = _convert(capsys, "--from", "trained.pth", "--to", "teacher", "--num_inference_steps", "2")
    assert (values["which"], values["step"], values["kind"], values["steps"]) == ("ema", 5, "ddim", 2)
    expected, state = load_published("trained.pth").model.state_dict(), models.load("teacher").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert main(["sample", "--model", "teacher", "--class", "2", "--num", "1", "--output", "x.npz", "--quiet"]) == 0


def test_a_generator_becomes_one(here, capsys):
    values = _convert(capsys, "--from", "early.pth", "--to", "generator")
    assert (values["kind"], values["t_init"], values["sample_shape"]) == ("one_step", 440, [3, 16, 16])
    assert (
        _convert(capsys, "--from", "early.pth", "--to", "generator", "--t-init", "500", "--overwrite")["t_init"] == 500
    )
    assert main(["sample", "--model", "generator", "--class", "0", "--num", "1", "--output", "x.npz"]) == 0


def test_a_mask_trains_what_it_says(here, capsys, weights):
    values = _convert(capsys, "--kind", "mask", "--from", "with_0.5.pt", "--to", "salun")
    mask = BlockMask.load(values["mask"])
    assert values["active"] == mask.numel == sum(int((tensor > 0).sum()) for tensor in weights.values())


def test_a_model_goes_to_diffusers_and_draws_there(here, capsys):
    _convert(capsys, "--from", "early.pth", "--to", "generator")
    values = _convert(capsys, "--kind", "diffusers", "--from", "generator", "--to", "exported")
    assert values["class"] == "UNet2DModel"
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([440, 3]), torch.tensor([0, 3])
    with torch.no_grad():
        got = UNet2DModel.from_pretrained("exported")(x, t, labels).sample
        torch.testing.assert_close(got, models.load("generator")(x, t, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["checkpoint", "mask", "diffusers"])
def test_a_dry_run_writes_nothing(here, capsys, kind):
    _convert(capsys, "--from", "trained.pth", "--to", "teacher")
    source = {"checkpoint": "early.pth", "mask": "with_0.5.pt", "diffusers": "teacher"}[kind]
    before = sorted(here.rglob("*"))
    values = _convert(capsys, "--kind", kind, "--from", source, "--to", "out", "--dry_run")
    assert values["dry_run"] is True
    assert all(file.startswith("out/") for file in values["would_write"])
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("code", "arguments", "text"),
    [
        (3, "--from nowhere.pth", "nowhere.pth: no such file"),
        (3, "--from with_0.5.pt", "with_0.5.pt: expected a list of 3 or 4 entries"),
        (3, "--from trained.pth --kind mask", "trained.pth: expected a dict from names to tensors"),
        (3, "--from early.pth --which fake_score", "early.pth: holds no fake_score; it has generator and ema"),
        (3, "--from trained.pth --kind diffusers", "trained.pth: no such folder"),
        (2, "--from trained.pth --t_init 440", "--t_init: ema of trained.pth is no one-step generator"),
        (2, "--from early.pth --num_inference_steps 4", "--num_inference_steps: ema of early.pth is a one-step"),
        (2, "--from early.pth --t_init 1000", "--t_init: expected 0 to 999, got 1000"),
        (2, "--from early.pth --t_init 1000 --dry_run", "--t_init: expected 0 to 999, got 1000"),
        (2, "--from trained.pth --num_inference_steps 1001", "--num_inference_steps: expected 1 to 1000"),
        (2, "--from with_0.5.pt --kind mask --which ema", "--which: is of --kind checkpoint"),
        (2, "--from trained.pth --kind best", "invalid choice"),
        (3, "--from trained.pth --resolution 24", "trained.pth"),
    ],
)
def test_what_makes_no_sense_is_refused(here, capsys, code, arguments, text):
    before = sorted(here.iterdir())
    if "--resolution" in arguments:  # three halvings of 24 do not come out even
        torch.save([published_model.random_weights(multiples=(1, 1, 1, 1, 1), blocks=1), {}, 1], "trained.pth")
        arguments += " --which model"
    assert text in _refused(capsys, code, *arguments.split())
    assert sorted(here.iterdir()) == before


def test_nan_weights_are_refused(here, capsys, weights):
    torch.save([{**weights, "norm_out.bias": torch.full((32,), torch.nan)}, {}, 1], "trained.pth")
    message = _refused(capsys, 3, "--from", "trained.pth", "--which", "model")
    assert "trained.pth: model: norm_out.bias has 32 of 32 values NaN or infinite" in message
