"""Model folders load as they were saved or are refused by name; images come out as the folder says."""

import json
import random
import shutil

import pytest
import torch
from torch import nn

from pecker_fast.checkpoint import read_json, read_safetensors, write_json, write_safetensors
from pecker_fast.errors import FileFormatError
from pecker_fast.models import DDPMUNet, DigitsClassifier, generate, load, load_config, save
from pecker_fast.models.storage import write_model
from pecker_fast.sampling import ddim_sample, one_step_sample
from pecker_fast.schedule import NoiseSchedule
from pecker_fast.written import NAME

ONE_STEP = {
    "kind": "one_step",
    "t_init": 500,
    "schedule": NoiseSchedule.linear().to_dict(),
    "sample_shape": [1, 8, 8],
}
DDIM = {
    "kind": "ddim",
    "steps": 3,
    "schedule": NoiseSchedule.linear().to_dict(),
    "sample_shape": [1, 8, 8],
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # for networks as small as these a second one only waits


def _tiny():
    return DDPMUNet(
        width=4,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        image_size=8,
        channels=1,
        norm_groups=2,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_loads_bit_for_bit(tmp_path, dtype):
    model = _tiny().to(dtype, memory_format=torch.channels_last)
    save(model, tmp_path / "m", ONE_STEP)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        NAME,
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = load(tmp_path / "m")
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert {value.dtype for value in state.values()} == {dtype}
    config = load_config(tmp_path / "m")
    assert config["_class_name"] == "DDPMUNet"
    assert config["generation"] == ONE_STEP


def test_classifier_keeps_its_running_statistics(tmp_path):
    model = DigitsClassifier(width=4)
    model(torch.randn(8, 1, 8, 8))
    save(model, tmp_path / "judge")
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(load(tmp_path / "judge")(images), model.eval()(images), rtol=0, atol=0)
    assert load_config(tmp_path / "judge")["generation"] is None


def test_save_refuses_foreign_models_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="got Linear"):
        save(nn.Linear(1, 1), tmp_path / "m")
    with pytest.raises(ValueError, match="t_init"):
        save(_tiny(), tmp_path / "m", {**ONE_STEP, "t_init": 1000})
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError, match="file"):
        save(_tiny(), tmp_path / "file" / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("generation", [ONE_STEP, DDIM])
def test_generate(generation):
    model = _tiny().eval()
    labels = torch.arange(10)
    draw = torch.Generator().manual_seed(3)
    images = generate(model, generation, labels, generator=draw)
    assert images.shape == (10, 1, 8, 8)
    assert float(images.abs().max()) == 1.0  # an untrained network overshoots: clamped
    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(generate(model, generation, labels, noise=noise), images)
    assert not images.requires_grad


@pytest.mark.parametrize("generation", [ONE_STEP, DDIM])
def test_generate_does_not_clip_latents(generation):
    model, labels = _tiny().eval(), torch.arange(10)
    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    latents = generate(model, {**generation, "clip": None}, labels, noise=noise)
    schedule = NoiseSchedule.from_dict(generation["schedule"])
    if generation is ONE_STEP:
        expected = one_step_sample(model, schedule, noise, labels, t_init=generation["t_init"])
    else:
        expected = ddim_sample(model, schedule, noise, labels, steps=generation["steps"], clip=None)
    assert torch.equal(latents, expected) and float(latents.abs().max()) > 1.0
    assert float(generate(model, {**generation, "clip": 0.5}, labels, noise=noise).abs().max()) == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "magic"}, "kind"),
        ({"kind": []}, "kind"),
        ({"t_init": None}, "t_init"),
        ({"t_init": 500.0}, "t_init"),
        ({"kind": "ddim"}, "steps"),
        ({"schedule": None}, "schedule"),
        ({"schedule": {"kind": "cosine"}}, "cosine"),
        ({"clip": 0}, "clip"),
        ({"sample_shape": [1, 8]}, "sample_shape"),
        ({"sample_shape": [1, 8, 0]}, "sample_shape"),
        ({"sample_shape": "abc"}, "sample_shape"),
    ],
)
def test_bad_generation_is_named(tmp_path, changes, message):
    generation = {**ONE_STEP, **changes}
    with pytest.raises(ValueError, match=message):
        generate(_tiny(), generation, torch.tensor([0]))
    save(_tiny(), tmp_path / "m", ONE_STEP)
    write_json(tmp_path / "m" / "config.json", {**load_config(tmp_path / "m"), "generation": generation})
    with pytest.raises(FileFormatError, match=message):
        load(tmp_path / "m")


def test_generate_refuses_ambiguous_noise():
    model, labels = _tiny(), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="not both"):
        generate(model, ONE_STEP, labels, noise=torch.zeros(2, 1, 8, 8), generator=torch.Generator())
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\)"):
        generate(model, ONE_STEP, labels, noise=torch.zeros(1, 1, 8, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "m"
    save(_tiny(), path, ONE_STEP)
    return path


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "m")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("_class_name", "UNet2DModel", "UNet2DModel"),
        ("_class_name", ["DDPMUNet"], "_class_name"),
        ("_class_name", "DigitsClassifier", "cannot be built"),
        ("_format_version", 2, "upgrade"),
        ("architecture", None, "architecture"),
        ("architecture", {"depth": 3}, "depth"),
        ("architecture", {"width": "4"}, "width"),
        ("architecture", {"width": 10**30}, "cannot be built"),
        ("architecture", {}, "missing"),
    ],
)
def test_load_refuses_foreign_configs(damaged, key, value, message):
    write_json(damaged / "config.json", {**read_json(damaged / "config.json"), key: value})
    with pytest.raises(FileFormatError, match=message):
        load(damaged)


def _without(weights):
    del weights["conv_in.bias"]


def _with_more(weights):
    weights["extra"] = torch.zeros(1)


def _reshaped(weights):
    weights["conv_in.bias"] = torch.zeros(5)


def _of_integers(weights):
    weights["conv_in.bias"] = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [(_without, "conv_in.bias"), (_with_more, "extra"), (_reshaped, r"\(5,\)"), (_of_integers, "int64")],
)
def test_load_refuses_weights_that_do_not_fit(damaged, change, message):
    path = damaged / "diffusion_pytorch_model.safetensors"
    weights, _ = read_safetensors(path)
    change(weights)
    write_safetensors(path, weights)
    with pytest.raises(FileFormatError, match=message):
        load(damaged)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_load_refuses_missing_and_truncated_files(damaged, name):
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(FileFormatError, match=name):
        load(damaged)
    (damaged / name).unlink()
    with pytest.raises(FileFormatError, match=name):
        load(damaged)
    with pytest.raises(FileFormatError, match="no such folder"):
        load(damaged / "absent")


def test_mutated_configs_load_or_are_refused(damaged):
    path = damaged / "config.json"
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        mutated = bytearray(whole)
        mutated[draw.randrange(len(whole))] = draw.choice(b'0123456789{}[]",:.- abcelnrstu')
        path.write_bytes(mutated)
        try:
            load(damaged)
        except FileFormatError:
            pass


def test_write_model_takes_modules_that_it_cannot_build_again(tmp_path):
    layer = nn.Linear(2, 3)
    write_model(layer, tmp_path)
    weights, _ = read_safetensors(tmp_path / "diffusion_pytorch_model.safetensors")
    assert torch.equal(weights["weight"], layer.weight)
    with pytest.raises(FileFormatError, match="Linear"):
        load(tmp_path)


def test_write_model_leaves_diffusers_models_to_diffusers(tmp_path):
    class Foreign(nn.Linear):
        def save_pretrained(self, folder):
            (folder / "config.json").write_text(json.dumps({"_class_name": "Foreign"}))

    write_model(Foreign(1, 1), tmp_path, ONE_STEP)
    assert read_json(tmp_path / "config.json") == {"_class_name": "Foreign"}
    assert read_json(tmp_path / "generation.json") == ONE_STEP
