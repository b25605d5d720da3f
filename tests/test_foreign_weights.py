"""Weights that others wrote: names of wrappers, values that are no numbers, quantized files, read-only caches."""

import json
import math
import os
import pickle
import shutil
import stat
from pathlib import Path

import pipelines
import published_model
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pecker_fast import BlockMask, Delta, ParameterMask, models
from pecker_fast.blocks import BlockGrid
from pecker_fast.checkpoint import atomic_folder
from pecker_fast.cli import main
from pecker_fast.concept_draws import check_pipeline, load_pipeline
from pecker_fast.concepts import PipelineFolder, PromptPlan, embed_prompts, write_pipeline
from pecker_fast.concepts.record import EarlierErasure, apply_earlier
from pecker_fast.delta import Ledger
from pecker_fast.errors import FileFormatError
from pecker_fast.foreign_weights import check_files, check_finite, unwrapped
from pecker_fast.models.module_pickle import read_module
from pecker_fast.models.pipeline_files import INDEX, copy_components
from pecker_fast.models.published import load_published
from pecker_fast.salun_mask import load_salun_mask
from pecker_fast.schedule import NoiseSchedule

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
WRAPPINGS = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "module.module.",
    "_fsdp_wrapped_module._orig_mod.",
    "_orig_mod.module._fsdp_wrapped_module._checkpoint_wrapped_module.",
]
UNLEARN = ("unlearn", "--pretrained_model_name_or_path", "base", "--output_dir", "out", "--device", "cpu")
ESD = ("--method", "esd", "--erase_concept", "cat", "--max_train_steps", "1", "--quiet", "--num_validation_images", "0")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return pipelines.write_pipeline(tmp_path_factory.mktemp("pipelines") / "base")


@pytest.fixture
def here(original, tmp_path, monkeypatch):
    shutil.copytree(original, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    return {n: w.half() for n, w in published_model.random_weights(multiples=(1,), blocks=1).items()}


def tiny():
    shape = {"channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "image_size": 8, "channels": 1}
    return models.DDPMUNet(width=4, norm_groups=2, **shape)


def spoil(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def first_of(file, value, count=1):
    """``count`` values of the first tensor of a file that has more than one."""
    name, tensor = next((name, t) for name, t in sorted(load_file(file).items()) if t.numel() > count)

    def change(weights):
        weights[name].view(-1)[:count] = value

    spoil(file, change)
    return name, tensor.numel()


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", WRAPPINGS)
def test_the_names_of_wrappers_are_dropped_in_any_order(prefix):
    assert unwrapped("f", {f"{prefix}a.weight": 1, f"{prefix}b": 2}) == {"a.weight": 1, "b": 2}


def test_wrappers_within_names_are_dropped_and_layers_of_that_name_kept():
    parts = {"a._checkpoint_wrapped_module.w": 1, "b._fsdp_wrapped_module._orig_mod.w": 2, "c.module.w": 3, "d": 4}
    assert unwrapped("f", parts) == {"a.w": 1, "b.w": 2, "c.module.w": 3, "d": 4}
    assert unwrapped("f", {"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
    with pytest.raises(FileFormatError, match="f: holds a twice"):
        unwrapped("f", {"a": 1, "_orig_mod.a": 2})


@pytest.mark.parametrize(
    "wrap", [AveragedModel, nn.DataParallel, torch.compile, lambda n: torch.compile(AveragedModel(n))]
)
def test_real_wrappers_name_things_like_that(wrap):
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    found = unwrapped("f", wrap(network).state_dict())
    assert found.keys() == network.state_dict().keys()


@pytest.mark.parametrize("prefix", WRAPPINGS)
def test_every_reader_takes_wrapped_names(prefix, published, tmp_path):
    wrapped = {prefix + name: tensor for name, tensor in published.items()}
    torch.save([wrapped, None, 5, wrapped], tmp_path / "ckpt.pth")
    torch.save([published, None, 5, published], tmp_path / "plain.pth")
    found, expected = (load_published(tmp_path / name).model.state_dict() for name in ("ckpt.pth", "plain.pth"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    torch.save({name: torch.ones_like(tensor) for name, tensor in wrapped.items()}, tmp_path / "mask.pt")
    assert load_salun_mask(tmp_path / "mask.pt").density == 1
    models.save(tiny(), tmp_path / "model")
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    models.load(tmp_path / "model")


def test_a_pickled_wrapper_is_looked_into(tmp_path):
    network = nn.Sequential(nn.Linear(2, 3))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": nn.DataParallel(nn.DataParallel(network))}))
    found = read_module(tmp_path / "x.pkl", "ema")
    assert found.class_name == "Sequential" and found.tensors.keys() == network.state_dict().keys()


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_pipelines_that_diffusers_would_fill_with_noise_are_refused(part, prefix, here):
    file = here / "base" / FILES[part]
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    pipeline = PipelineFolder.read("base")
    with pytest.raises(FileFormatError, match=rf"base/{part}/.*: {prefix}.* has the name of a wrapper"):
        pipeline.check_weights() if part == "unet" else pipeline.check_parts(part)
    with pytest.raises(FileFormatError, match="has the name of a wrapper"):
        load_pipeline(check_pipeline("base"), "cpu", torch.float32)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_counted_in_every_dtype(dtype, value):
    fine = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0], dtype=torch.float64).to(dtype)
    check_finite("f", [("fine", fine), ("none", torch.zeros(0, dtype=dtype)), ("count", torch.tensor(3))])
    bad = torch.tensor([1.0, value, 2.0, value]).to(dtype)
    with pytest.raises(FileFormatError, match="f: bad has 2 of 4 values NaN or infinite"):
        check_finite("f", [("fine", fine), ("bad", bad)])


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_pipeline_with_nan_is_refused_before_it_trains(part, value, here, capsys):
    file = here / "base" / FILES[part]
    name, total = first_of(file, value, 3)
    assert main([*UNLEARN, *ESD]) == 3
    error = capsys.readouterr().err
    assert f"{FILES[part]}: {name} has 3 of {total} values NaN or infinite" in error and "learning rate" not in error
    assert not list(here.glob("*out*"))
    with pytest.raises(FileFormatError, match=f"{name} has 3 of {total} values"):
        load_pipeline(check_pipeline("base"), "cpu", torch.float32)


def test_nan_in_one_of_several_files_names_that_file(here):
    unet = PipelineFolder.read("base").unet()
    (here / "base" / FILES["unet"]).unlink()
    unet.save_pretrained("base/unet", max_shard_size="300KB")
    file = sorted((here / "base" / "unet").glob("*-of-*.safetensors"))[1]
    name, total = first_of(file, math.nan)
    with pytest.raises(FileFormatError, match=f"{file.name}: {name} has 1 of {total} values NaN"):
        PipelineFolder.read("base").tensors()


def test_python_users_are_told_too(here):
    name, _ = first_of(here / "base" / FILES["text_encoder"], math.nan)
    with pytest.raises(FileFormatError, match=f"{name} has 1 of"):
        embed_prompts(PipelineFolder.read("base"), ["a cat"])


@pytest.mark.parametrize("make", [tiny, lambda: models.DigitsClassifier(), lambda: models.ImageClassifier(width=8)])
def test_teachers_and_judges_with_nan_are_refused(make, tmp_path):
    network = make()
    with torch.no_grad():
        list(network.parameters())[-1].view(-1)[:1] = math.nan
    models.save(network, tmp_path / "m")
    with pytest.raises(FileFormatError, match=r"diffusion_pytorch_model.safetensors: \S+ has 1 of \d+ values NaN"):
        models.load(tmp_path / "m")


def test_a_delta_that_leaves_nan_is_named():
    """As one of a training that diverged in its last step."""
    before, after = {"w": torch.zeros(2, 4)}, {"w": torch.full((2, 4), math.nan)}
    mask = BlockMask({"w": ParameterMask.full(BlockGrid.of((2, 4), (1, 4)))}, 8, 1.0)
    delta = Delta.extract(before, after, mask, name="erase", progress=False)
    earlier = EarlierErasure(Path("first"), delta, PromptPlan(("a",), (0,), None, ()), one_step=False)
    with pytest.raises(FileFormatError, match=r"base and first.delta: w has 8 of 8 values NaN"):
        apply_earlier([earlier], before, Ledger(), Path("base"))


# -- quantized -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_a_quantized_unet_is_refused_by_name(dtype, here, capsys):
    def change(weights):
        weights["conv_in.weight"] = weights["conv_in.weight"].to(dtype)

    spoil(here / "base" / FILES["unet"], change)
    assert main([*UNLEARN, *ESD, "--dry_run"]) == 3
    error = capsys.readouterr().err
    assert "conv_in.weight is stored as " in error and "1 of " in error and "quantized; expected float32" in error


@pytest.mark.parametrize("part", FILES)
def test_a_quantized_config_is_refused_by_name(part, here):
    """As bitsandbytes, torchao and the like write it: weights are packed then, and of other names."""
    config = here / "base" / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "bnb"}}))
    with pytest.raises(FileFormatError, match=rf"{part}/config.json: quantization_config: .* quantized \(bnb\)"):
        PipelineFolder.read("base")


def test_packed_integers_are_refused_where_images_are_drawn_and_8_bit_floats_read(here):
    file = here / "base" / FILES["vae"]
    spoil(file, lambda weights: weights.update({n: w.to(torch.float8_e5m2) for n, w in weights.items()}))
    check_files([file])
    spoil(file, lambda weights: weights.update({n: w.view(torch.uint8) for n, w in weights.items()}))
    with pytest.raises(FileFormatError, match="is stored as U8"):
        check_files([file])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_published_checkpoints_and_model_folders_are_refused_alike(dtype, published, tmp_path):
    packed = {name: tensor.to(dtype) for name, tensor in published.items()}
    torch.save([packed, None, 5, packed], tmp_path / "ckpt.pth")
    with pytest.raises(FileFormatError, match="quantized; expected float32"):
        load_published(tmp_path / "ckpt.pth")
    models.save(tiny(), tmp_path / "m")
    spoil(
        tmp_path / "m" / "diffusion_pytorch_model.safetensors",
        lambda weights: weights.update({name: tensor.to(dtype) for name, tensor in weights.items()}),
    )
    with pytest.raises(FileFormatError, match="quantized; expected float32"):
        models.load(tmp_path / "m")


# -- schedules of zero terminal SNR ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, LCMScheduler])
def test_zero_terminal_snr_is_named(kind):
    stable_diffusion = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = kind(**stable_diffusion, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=f"{kind.__name__} has rescale_betas_zero_snr, .* is 0 at timestep 999"):
        NoiseSchedule.from_diffusers(scheduler)
    mended = EulerDiscreteScheduler.from_config(scheduler.config)  # as the message says
    assert NoiseSchedule.from_diffusers(mended).num_train_timesteps == 1000


def test_zero_terminal_snr_is_named_where_it_is_not_quite_zero():
    """With these betas the value that Euler puts there is larger than the one before."""
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has rescale_betas_zero_snr, for zero terminal SNR"):
        NoiseSchedule.from_diffusers(EulerDiscreteScheduler(rescale_betas_zero_snr=True))


def test_betas_of_one_are_zero_terminal_snr_too():
    with pytest.raises(ValueError, match="is 0 at timestep 2: a schedule of zero terminal SNR"):
        NoiseSchedule.from_diffusers(DDIMScheduler(num_train_timesteps=3, trained_betas=[0.1, 0.2, 1.0]))


# -- copies ----------------------------------------------------------------------------------------


def cached(folder, cache):
    """As the Hub's cache has it: links to read-only blobs, in read-only folders."""
    blobs = cache / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = blobs / str(number)
        blob.write_bytes(file.read_bytes())
        blob.chmod(0o444)
        link = cache / "snapshot" / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for place in (cache / "snapshot").rglob("*"):
        if place.is_dir():
            place.chmod(0o555)
    return cache / "snapshot"


def copied_as_files(source, target):
    target.mkdir()
    copy_components(source, target, without=())


def written_as_result(source, target):
    pipeline = PipelineFolder.read(source)
    write_pipeline(pipeline, target, pipeline.tensors(), Ledger())


@pytest.mark.parametrize("copy", [copied_as_files, written_as_result])
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_what_comes_out_of_a_read_only_cache_is_the_users_own(copy, umask, original, tmp_path):
    source = cached(original, tmp_path / "cache")
    before = os.umask(umask)
    try:
        copy(source, tmp_path / "out")
    finally:
        os.umask(before)
    made = list((tmp_path / "out").rglob("*"))
    assert {path.relative_to(tmp_path / "out") for path in made} >= {Path(file) for file in FILES.values()}
    for path in made:
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert not path.is_symlink() and mode == (0o777 if path.is_dir() else 0o666) & ~umask, path
    for name in ("vae/config.json", FILES["text_encoder"]):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()
    with atomic_folder(tmp_path / "out") as again:  # replaced
        (again / INDEX).write_text("{}")
    shutil.rmtree(tmp_path / "out")


def test_a_link_to_nothing_is_named(original, tmp_path):
    source = cached(original, tmp_path / "cache")
    for blob in (tmp_path / "cache" / "blobs").iterdir():
        if blob.read_bytes() == (original / "vae" / "config.json").read_bytes():
            blob.unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(FileFormatError, match=r"out/vae: cannot be copied .*vae/config.json"):
        copy_components(source, tmp_path / "out", without=())
