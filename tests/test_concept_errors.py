"""What ``pecker-fast unlearn`` refuses of pipelines: in one clear line, before anything is loaded or written."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import conv_net
from pipelines import write_pipeline

from pecker_fast import BlockMask
from pecker_fast.checkpoint import read_safetensors, write_safetensors
from pecker_fast.cli import main
from pecker_fast.commands import concept_estimate
from pecker_fast.concepts import PipelineFolder
from pecker_fast.concepts.plan import PromptPlan
from pecker_fast.models.one_step_scheduler import one_step_scheduler

UNET = "unet/diffusion_pytorch_model.safetensors"
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
COMMAND = ("unlearn", "--pretrained_model_name_or_path", "base", "--output_dir", "out", "--device", "cpu")
KEEP = ("--retain_prompts", "keep.txt")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "base")


@pytest.fixture
def here(original, tmp_path, monkeypatch):
    shutil.copytree(original, tmp_path / "base")
    (tmp_path / "keep.txt").write_text("a dog\na red bird\n")
    monkeypatch.chdir(tmp_path)

    def loaded(*_):
        raise AssertionError("weights were loaded")

    for name in ("tensors", "unet"):
        monkeypatch.setattr(PipelineFolder, name, loaded)
    monkeypatch.setattr(concept_estimate, "estimate", lambda job: ({}, ""))  # which takes seconds
    return tmp_path


def refused(capsys, code, text, *flags, concept=("--erase_concept", "cat"), keep=KEEP):
    assert main([*COMMAND, *concept, *keep, *flags]) == code
    error = capsys.readouterr().err
    assert text in error, error
    assert error.count("\n") == 1


def checker(base, name):
    """A safety checker of this file alone."""
    change(base / INDEX, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (base / "safety_checker").mkdir()
    (base / "safety_checker" / name).write_bytes(b"{}")


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values", "text"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "its unet is a UNet2DModel; expected"),
        ("model_index.json", {"text_encoder_3": ["transformers", "T5EncoderModel"]}, "has text_encoder_3; supported"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "has no tokenizer_2 in model_in"),
        ("model_index.json", {"requires_aesthetics_score": True}, "is a refiner, which takes an image"),
        ("model_index.json", {"vae": [None, None]}, "has no vae in model_index.json"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "Stable Diffusion has None"),
        ("unet/config.json", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type is 'text_proj'"),
        ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds is 1000"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels and gives 4: it is for inpainting"),
        ("unet/config.json", {"sample_size": None}, "sample_size is None"),
        ("unet/config.json", {"layers_per_block": 2}, "does not fit config.json: down_blocks.0.attentions.1"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "has no model_max_length"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is 'sample'; expected eps"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1], "timestep_spacing": "trailing"}, "--init_gen"),
    ],
)
def test_pipelines_that_are_not_supported(file, values, text, here, capsys):
    change(here / "base" / file, **values)
    refused(capsys, 3, text)
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("method", "file", "values", "text"),
    [
        ("esd", SCHEDULER, {"rescale_betas_zero_snr": True}, "has rescale_betas_zero_snr, for zero terminal SNR"),
        ("pecker", SCHEDULER, {"beta_schedule": "none"}, "scheduler_config.json: cannot be trained with"),
        ("salun", INDEX, {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "got FlowMatchEuler"),
        ("esd", INDEX, {"scheduler": ["diffusers", "utils"]}, "this diffusers has no scheduler 'utils'"),
    ],
)
def test_schedulers_that_cannot_be_trained_with(method, file, values, text, here, capsys):
    change(here / "base" / file, **values)
    refused(capsys, 3, text, "--method", method, "--dry_run")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda base: shutil.rmtree(base), "base: no such folder"),
        (lambda base: (base / "model_index.json").unlink(), "has no model_index.json; expected a pipeline"),
        (lambda base: (base / "model_index.json").write_text("{"), "model_index.json: truncated or not JSON"),
        (lambda base: shutil.rmtree(base / "tokenizer"), "base/tokenizer: no such folder"),
        (
            lambda base: (base / "unet/diffusion_pytorch_model.safetensors").rename(
                base / "unet/diffusion_pytorch_model.bin"
            ),
            "diffusion_pytorch_model.bin alone, a pickle, which is not opened; where you trust it, save the whole",
        ),
        (
            lambda base: (base / "unet/diffusion_pytorch_model.safetensors").rename(
                base / "unet/diffusion_pytorch_model.fp16.safetensors"
            ),
            'from_pretrained(folder, variant="fp16", torch_dtype=torch.float16).save_pretrained(new_folder)',
        ),
        (lambda base: (base / UNET).write_bytes((base / UNET).read_bytes()[:1000]), "truncated or not a safetensors"),
        (lambda base: (base / "text_encoder/model.safetensors").unlink(), "text_encoder: has no safetensors file"),
        (lambda base: checker(base, "pytorch_model.bin"), "safety_checker: has pytorch_model.bin alone, a pickle"),
        (lambda base: checker(base, "model.fp16.safetensors"), "has model.fp16.safetensors alone, a variant"),
        (lambda base: checker(base, "model.bf16-00001-of-00002.safetensors"), 'variant="bf16", torch_dtype=torch.bf'),
        (lambda base: checker(base, "model.non_ema.safetensors"), '(folder, variant="non_ema").save_pretrained('),
        (
            lambda base: checker(base, "other.safetensors"),
            "expected model.safetensors or diffusion_pytorch_model.safetensors\n",
        ),
        (lambda base: checker(base, "config.json"), "safety_checker: has no safetensors file"),
        (
            lambda base: (base / "vae/diffusion_pytorch_model.safetensors").rename(base / "vae/other.bin"),
            "vae: has other",
        ),
    ],
)
def test_folders_that_lack_something(spoil, text, here, capsys):
    spoil(here / "base")
    refused(capsys, 3, text)
    assert not (here / "out").exists()


LONG = "a photo of a cat with an extraordinarily long name"


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--forget_prompts", "none.txt"], 3, "none.txt: cannot be read"),
        (["--forget_prompts", "empty.txt"], 3, "empty.txt: expected 1 to 1000000 prompts, got 0"),
        (["--forget_prompts", "keep.txt"], 2, "prompt 'a dog' is to be forgotten, but does not contain 'cat'"),
        (["--validation_prompts", LONG], 2, f"prompt '{LONG}' has"),
        (["--override_concept", "an extraordinarily long name"], 2, "the tokenizer of base takes 14; shorten it"),
        (["--override_prompts", "keep.txt"], 2, "one for each of the 8 forgotten ones"),
        (["--forget_class", "3"], 2, "--forget_class: is of class-conditional models"),
        (["--stop_on", "ua>=0.9"], 2, "--stop_on: is of class-conditional models"),
        (["--method", "gradient_ascent"], 2, "--method gradient_ascent: not for pipelines; take pecker, sfd, esd, sal"),
        (["--method", "esd", "--override_concept", "dog"], 2, "--override_concept: has no say in --method esd"),
        (["--method", "esd", "--t_init", "5"], 2, "--t_init: is of --method distill"),
        (["--method", "salun", "--negative_prompt", "x"], 2, "--negative_prompt: is of a one-step generator"),
        (["--method", "sfd", "--mask_density", "0.1"], 2, "--mask_density: has no say in --method sfd"),
        (["--learning_rate", "1"], 2, "--learning_rate: has no say"),
        (["--train_method", "xattn", "--mask_region", "decoder"], 2, "--mask_region: cannot be given with"),
        (["--train_method", "xattn", "--mask_density", "0.5"], 2, "--mask_region holds 0.0432 of the UNet's weights"),
        (["--mask_region", "nowhere."], 2, "no weight's name begins with 'nowhere.'"),
        (["--negative_in", "true_score"], 2, "--negative_in: says where --negative_prompt has a say"),
        (["--guidance_scale", "1", "2"], 2, "--guidance_scale: expected one number, or three, got 2"),
        (["--t_max", "2000"], 2, "2000"),
        (["--earlier", "none"], 3, "none/delta"),
        (["--method", "esd", "--num_inference_steps", "1001"], 2, "at most the schedule's 1000, got 1001"),
        (["--method", "salun", "--num_inference_steps", "1001"], 2, "at most the schedule's 1000, got 1001"),
        (["--mask_path", "none.safetensors"], 3, "none.safetensors"),
        (
            ["--mask_path", "other.safetensors"],
            3,
            "other.safetensors: is for 0.weight of shape (16, 3, 3, 3), the",
        ),
        (["--init_generator", "none"], 3, "none: no such folder"),
        (["--prompt_templates", "keep.txt"], 2, "has no {} for the concept"),
    ],
)
def test_flags_and_prompts(flags, code, text, here, capsys):
    (here / "empty.txt").write_text("# nothing\n")
    BlockMask.random(conv_net(), 0.5, "row").save("other.safetensors")
    refused(capsys, code, text, *flags)
    assert not (here / "out").exists()


def test_what_to_keep_is_needed(here, capsys):
    refused(capsys, 2, "--retain_prompts: --method distill needs prompts to keep", keep=())
    refused(capsys, 2, "nothing to erase: give a concept", concept=())
    refused(capsys, 2, "'a dog' is to be forgotten and to be retained", concept=("--erase_concept", "a dog; cat"))


def test_an_earlier_erasure_of_another_kind(here, capsys, monkeypatch):
    from pecker_fast.concepts import record

    plan = PromptPlan(("a",), (0,), None, ())
    earlier = record.EarlierErasure(here / "before", None, plan, one_step=False)
    monkeypatch.setattr(record.EarlierErasure, "read", classmethod(lambda cls, folder: earlier))
    refused(capsys, 2, "is of an ordinary UNet, --method distill makes a one-step generator", "--earlier", "before")
    refused(capsys, 2, "every weight would train", "--earlier", "before", "--method", "esd")


@pytest.mark.parametrize(
    ("starts", "flags", "code", "text"),
    [
        ((300, 300), (), 0, ""),
        ((300, 625), (), 2, "--earlier second starts at 625, and --earlier first at 300; their deltas do not add up"),
        ((300, 300), ("--init_generator", "generator"), 2, "starts at 300, and the generator of generator at 625"),
        ((300, 300), ("--t_init", "625"), 2, "--t_init 625: --earlier first starts at 300; leave it out"),
        ((None, 300), (), 3, "first/delta: does not say its t_init"),
    ],
)
def test_erasures_that_add_up_start_at_one_timestep(starts, flags, code, text, generator, capsys, monkeypatch):
    from pecker_fast.concepts import record

    before = {
        name: record.EarlierErasure(
            Path(name), SimpleNamespace(metadata={"t_init": t_init}), PromptPlan((name,), (0,), None, ()), one_step=True
        )
        for name, t_init in zip(("first", "second"), starts, strict=True)
    }
    monkeypatch.setattr(record.EarlierErasure, "read", classmethod(lambda cls, folder: before[folder.name]))
    if code == 0:
        main([*COMMAND, "--erase_concept", "cat", *KEEP, "--earlier", "first", "second", "--dry_run", "--json"])
        assert json.loads(capsys.readouterr().out)["settings"]["t_init"] == 300
    else:
        refused(capsys, code, text, "--earlier", "first", "second", *flags)


def test_a_class_conditional_folder_takes_no_prompts(here, capsys):
    (here / "base" / "model_index.json").unlink()
    flags = ("--forget_class", "3", "--negative_prompt", "x")
    refused(capsys, 2, "--negative_prompt: is of pipelines; this is a class", *flags, concept=(), keep=())
    refused(capsys, 2, "--forget_class: is needed; name the classes", concept=(), keep=())


@pytest.fixture
def generator(here):
    """A one-step generator's folder that was made of the base, as it says."""
    folder, out = PipelineFolder.read(here / "base"), here / "generator"
    shutil.copytree(here / "base", out)
    scheduler = one_step_scheduler(folder.schedule(), 625)
    scheduler.save_pretrained(out / "scheduler")
    change(out / INDEX, scheduler=["diffusers", type(scheduler).__name__])
    return out


def half(weights):
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def tuned(weights):
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    return {**weights, name: weights[name] + 1e-3}


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda weights: weights, None),
        (half, None),  # the same in fewer bits
        (tuned, "is not that of base; prompts are embedded by that one"),
        (lambda weights: {**weights, "more": weights[next(iter(weights))]}, "more is not that of base"),
    ],
    ids=["same", "half", "tuned", "more"],
)
def test_a_generator_with_another_text_encoder(spoil, text, generator, capsys):
    file = generator / "text_encoder/model.safetensors"
    write_safetensors(file, spoil(read_safetensors(file)[0]), {"format": "pt"})
    check = ("--init_generator", "generator", "--dry_run")
    if text is None:
        main([*COMMAND, "--erase_concept", "cat", *KEEP, *check, "--json"])
        assert json.loads(capsys.readouterr().out)["settings"]["t_init"] == 625
    else:
        refused(capsys, 3, text, *check)


def test_a_generator_of_another_schedule(generator, capsys):
    betas = json.loads((generator / SCHEDULER).read_text())["trained_betas"]
    change(generator / SCHEDULER, trained_betas=[*betas[:-1], betas[-1] + 1e-4])
    refused(capsys, 3, "beta 625 is", "--init_generator", "generator", "--dry_run")
