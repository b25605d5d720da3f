"""A snapshot of SiD-LSG becomes an ordinary pipeline that draws what the formula draws."""

import json
import pickle

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pipelines import write_pipeline

from pecker_fast.cli import main
from pecker_fast.errors import FileFormatError
from pecker_fast.models.sid_lsg import SidGenerator
from pecker_fast.sampling import one_step_sample
from pecker_fast.schedule import NoiseSchedule
from pecker_fast.score_model import TextConditional
from pecker_fast.written import NAME

T_INIT = 625
SMALL = {
    "sample_size": 8,
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def base(request, tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp(request.param) / "base", request.param)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = write_pipeline(tmp_path_factory.mktemp("stock") / "base")
    UNet2DConditionModel(**SMALL).save_pretrained(folder / "unet")
    return folder


def _generator(base):
    """As SiD saves it: another network than the base's, in half precision."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return unet.eval().requires_grad_(False).half().cpu()


def _dump(unet, file, **more):
    file.write_bytes(pickle.dumps({"ema": unet, **more}))
    return file


def _files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_step_of_stock_diffusers_is_the_formula(base, tmp_path):
    unet = _generator(base)
    SidGenerator.read(_dump(unet, tmp_path / "x.pkl"), base).save(tmp_path / "out")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    kind, prompts = pipeline.scheduler.config.prediction_type, ["photo of the cat", "three red"]
    noise = torch.randn(2, 4, 8, 8)
    drawn = pipeline(
        prompts, num_inference_steps=1, guidance_scale=0, latents=noise.clone(), output_type="latent"
    ).images
    schedule = NoiseSchedule.scaled_linear()
    ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        ask = TextConditional(pipeline.text_encoder(ids)[0], kind, schedule)
    expected, other = (
        one_step_sample(lambda *x: ask(unet.float(), *x), schedule, noise, torch.arange(2), t_init=t)
        for t in (T_INIT, T_INIT - 1)
    )
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(drawn, other, rtol=0, atol=1e-3)  # a control: the next timestep is told apart
    assert kind in base.parent.name


def test_what_is_written(stock, tmp_path, capsys):
    unet = _generator(stock)
    file = _dump(unet, tmp_path / "x.pkl", step=7)
    (stock / "old-weights.ckpt").write_bytes(b"of the base")
    flags = ["--from", str(file), "--pretrained_model_name_or_path", str(stock), "--to", str(tmp_path / "out")]
    assert main(["convert", "--kind", "sid_lsg", *flags, "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert captured.err == "" and (values["t_init"], values["dtype"], len(values["sha256"])) == (625, "float16", 64)
    before, after = _files(stock), _files(tmp_path / "out")
    new = {name for name, data in after.items() if before.get(name) != data} - {NAME}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert new == {weights, "scheduler/scheduler_config.json", "model_index.json", "config.yaml"}
    assert set(before) - set(after) == {"old-weights.ckpt"}
    (stock / "old-weights.ckpt").unlink()
    read = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet", torch_dtype=torch.float16).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in unet.state_dict().items())
    SidGenerator.read(file, tmp_path / "out")  # a pipeline of one step will do as the base of another
    assert main(["convert", "--kind", "sid_lsg", *flags[:-1], str(tmp_path / "no"), "--dry_run", "--quiet"]) == 0
    assert not (tmp_path / "no").exists()


def _without(unet, name):
    del unet.get_submodule(name).bias


def _nan(unet, name):
    unet.get_submodule(name).weight[0] = torch.nan


def _heads(unet, _):
    unet.register_to_config(attention_head_dim=8)


def _mixed(unet, name):
    unet.get_submodule(name).float()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_without, "1 weights differ: conv_in.bias missing, expected (16,)"),
        (_nan, "conv_in.weight has 36 of 576 values NaN"),
        (_heads, "attention_head_dim 8, not 4"),
        (_mixed, "expected weights of one floating-point dtype, got ['torch.float16', 'torch.float32']"),
    ],
)
def test_another_network_is_refused(change, text, stock, tmp_path):
    unet = _generator(stock)
    unet.register_parameter("unused", None)
    change(unet, "conv_in")
    with pytest.raises(FileFormatError) as caught:
        SidGenerator.read(_dump(unet, tmp_path / "x.pkl"), stock)
    assert text in str(caught.value) and str(caught.value).startswith(str(tmp_path / "x.pkl"))


@pytest.mark.parametrize(
    ("code", "arguments", "text"),
    [
        (2, "", "--pretrained_model_name_or_path: --kind sid_lsg needs the pipeline folder"),
        (2, "--pretrained_model_name_or_path BASE --which ema", "--which: is of --kind checkpoint"),
        (2, "--pretrained_model_name_or_path BASE --t_init 1000", "t_init: expected 0 to 999, got 1000"),
        (3, "--pretrained_model_name_or_path BASE/unet", "unet: has no model_index.json"),
        (3, "--pretrained_model_name_or_path BASE", "linear.pkl: ema: expected a UNet2DConditionModel, got Linear"),
    ],
)
def test_what_makes_no_sense_is_refused(code, arguments, text, stock, tmp_path, capsys):
    file = _dump(torch.nn.Linear(1, 1), tmp_path / "linear.pkl")
    flags = arguments.replace("BASE", str(stock)).split()
    assert main(["convert", "--kind", "sid_lsg", "--from", str(file), "--to", str(tmp_path / "out"), *flags]) == code
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
