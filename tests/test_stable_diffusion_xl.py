"""Pipelines of Stable Diffusion XL: two text encoders, and a UNet that is asked for more than a prompt."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from pipelines import write_pipeline, write_xl_pipeline

from pecker_fast import BlockMask
from pecker_fast.checkpoint import read_safetensors
from pecker_fast.cli import main
from pecker_fast.concept_draws import check_pipeline, cut_prompts, draw, load_pipeline, sampling_of
from pecker_fast.concepts import PipelineFolder, embed_prompts
from pecker_fast.concepts.embedding import unset_prompts
from pecker_fast.concepts.generators import check_generator
from pecker_fast.delta import Delta
from pecker_fast.errors import FileFormatError
from pecker_fast.models.one_step_scheduler import one_step_scheduler
from pecker_fast.prompt_files import EvaluationPrompt
from pecker_fast.sampling import one_step_sample

UNET = "unet/diffusion_pytorch_model.safetensors"
FLAGS = (
    *("--erase_concept", "cat", "--retain_prompts", "keep.txt", "--max_train_steps", "1", "--train_batch_size", "1"),
    *("--device", "cpu", "--block", "row", "--num_validation_images", "0", "--quiet", "--mask", "random"),
    *("--mask_density", "0.2"),
)
PICTURE = ("--num_validation_images", "1")
REFINER = dict.fromkeys(("tokenizer", "text_encoder"), [None, None]) | {"requires_aesthetics_score": True}
SALUN = ("--method", "salun", "--override_concept", "dog", "--num_inference_steps", "2", "--learning_rate", "1e-3")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    write_xl_pipeline(folder / "base")
    shutil.copytree(folder / "base", folder / "pieces")  # as diffusers saves a UNet of this size in float32
    (folder / "pieces" / UNET).unlink()
    load(folder / "base").unet.save_pretrained(folder / "pieces" / "unet", max_shard_size="300KB")
    (folder / "keep.txt").write_text("a dog\nthe red bird\n")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def load(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def asked(unet):
    """All that the network is asked for from now on."""
    calls, forward = [], unet.forward

    @functools.wraps(forward)
    def note(sample, t, encoder_hidden_states, added_cond_kwargs, **rest):
        calls.append({"prompt": encoder_hidden_states, **added_cond_kwargs})
        kwargs = {"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": added_cond_kwargs}
        return forward(sample, t, **kwargs, **rest)

    unet.forward = note
    return calls


@pytest.mark.parametrize("zeros", [True, False])
def test_the_network_is_asked_what_the_pipeline_asks_it(zeros, place, tmp_path):
    """With guidance: for the null prompt too, which the published pipeline takes zeros for."""
    folder = place / "base" if zeros else write_xl_pipeline(tmp_path / "other", force_zeros_for_empty_prompt=False)
    pipeline = load(folder)
    theirs = asked(pipeline.unet)
    pipeline("a photo of a cat", num_inference_steps=1, guidance_scale=3.0, output_type="latent")
    predict = embed_prompts(PipelineFolder.read(folder), ["the red dog", "a photo of a cat", ""])
    noise, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    expected = pipeline.unet(
        noise,
        t,
        encoder_hidden_states=theirs[0]["prompt"],
        added_cond_kwargs={name: theirs[0][name] for name in ("text_embeds", "time_ids")},
    ).sample
    ours = asked(pipeline.unet)
    torch.testing.assert_close(predict(pipeline.unet, noise, t, torch.tensor([2, 1])), expected)
    assert ours[0].keys() == theirs[0].keys() == {"prompt", "text_embeds", "time_ids"}
    for name, asked_for in ours[0].items():
        torch.testing.assert_close(asked_for, theirs[0][name])  # prompts in other batches have other last bits
    assert torch.equal(ours[0]["time_ids"], theirs[0]["time_ids"])
    assert bool(ours[0]["prompt"][0].any()) != zeros and bool(ours[0]["text_embeds"][0].any()) != zeros


def test_estimates_have_tables_of_the_same_shapes(place):
    pipeline = PipelineFolder.read(place / "base")
    real, unset = embed_prompts(pipeline, ["a cat", ""]), unset_prompts(pipeline, 2)
    assert real.embeddings.shape == unset.embeddings.shape == (2, 16, 56)
    assert {name: table.shape for name, table in real.added.items()} == {"text_embeds": (2, 20), "time_ids": (2, 6)}
    assert torch.equal(real.added["time_ids"], torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2))
    assert {name: table.shape for name, table in unset.added.items()} == {"text_embeds": (2, 20), "time_ids": (2, 6)}


def drawn(folder, **how):
    return load(folder)("a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **how).images


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("base", ("--method", "pecker", "--override_concept", "dog", "--generator_lr", "1e-3")),
        ("pieces", ("--method", "esd", "--num_inference_steps", "2", "--learning_rate", "1e-2", *PICTURE)),
        ("base", SALUN),
    ],
    ids=["pecker", "esd", "salun"],
)
def test_prompts_are_unlearned(base, method, place, tmp_path):
    out = tmp_path / "out"
    source = ("--pretrained_model_name_or_path", base, "--output_dir", str(out))
    assert main(["unlearn", *source, *FLAGS, *method]) == 0
    assert [file.name for file in sorted((out / "model" / "unet").iterdir())] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "pecker_deltas.json",
    ]
    before, after = (PipelineFolder.read(folder).tensors() for folder in (place / base, out / "model"))
    delta = Delta.load(out / "delta")
    changed = 0
    for name, tensor in before.items():
        mask = delta.mask.parameters
        flags = mask[name].to_dense() if name in mask else torch.zeros_like(tensor).bool()
        assert torch.equal(after[name][~flags], tensor[~flags])
        changed += int((after[name] != tensor).sum())
    assert 0.4 * delta.mask.numel < changed <= delta.mask.numel
    if method[1] == "pecker":
        how = {"num_inference_steps": 1, "guidance_scale": 0.0}
        assert torch.equal(drawn(out / "model", **how), drawn(out / "model", **how))
    else:
        images = drawn(out / "model", num_inference_steps=2)
        assert bool(images.isfinite().all())
        assert not torch.equal(images, drawn(place / base, num_inference_steps=2))
    card = (out / "model" / "README.md").read_text()
    assert "StableDiffusionXLPipeline.from_pretrained(" in card and "- stable-diffusion-xl\n" in card
    assert (out / "model" / "before_after.png").is_file() == (PICTURE[0] in method[2:])
    models = ("--model", str(out / "model"), "--delta", str(out / "delta"), "--output_dir", str(tmp_path / "back"))
    assert main(["delta", "revert", *models, "--quiet"]) == 0
    back = read_safetensors(tmp_path / "back" / UNET)[0]
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())
    assert (
        json.loads((tmp_path / "back" / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
    )


def test_a_one_step_generator_of_stock_diffusers_draws_what_we_draw(place, tmp_path):
    folder = PipelineFolder.read(place / "base")
    one_step_scheduler(folder.schedule(), 625, folder.prediction_type).save_pretrained(tmp_path / "scheduler")
    stock = load(place / "base")
    stock.scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    theirs = stock("a cat", num_inference_steps=1, guidance_scale=0.0, generator=generator, output_type="latent").images
    ours, label = functools.partial(embed_prompts(folder, ["a cat"]), folder.unet()), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        latents = one_step_sample(ours, folder.schedule(), noise, label, t_init=625)
    torch.testing.assert_close(theirs, latents, rtol=1e-4, atol=1e-4)


def test_a_network_of_fewer_bits_takes_sizes_whole(place):
    """1016 has no neighbour in bfloat16 below 1020: the sizes stay float32 numbers."""
    folder = PipelineFolder.read(place / "base")
    predict = embed_prompts(folder, ["a cat"])
    predict.added["time_ids"][:] = 1018.0
    network = folder.unet(dtype=torch.bfloat16)
    calls, noise = asked(network), torch.randn(1, 4, 8, 8)
    found = predict(network, noise, torch.tensor([500]), torch.tensor([0]))
    assert found.dtype == torch.float32 and bool(found.isfinite().all())
    assert torch.equal(calls[0]["time_ids"], torch.full((1, 6), 1018.0)) and calls[0]["prompt"].dtype == torch.bfloat16


def test_a_unet_in_pieces_is_read_and_switched_in_its_pieces(place, tmp_path):
    pieces, whole = (PipelineFolder.read(place / name) for name in ("pieces", "base"))
    assert len(pieces.weights_files) == 4 and pieces.shapes == whole.shapes
    before = whole.tensors()
    assert before.keys() == pieces.tensors().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pieces.tensors().items())
    mask = BlockMask.random(whole.unet(), density=0.1, block="row", seed=0)
    flags = {name: found.to_dense() for name, found in mask.parameters.items()}
    after = {
        name: torch.where(flags[name], tensor + 1, tensor) if name in flags else tensor
        for name, tensor in before.items()
    }
    Delta.extract(before, after, mask, name="more", progress=False).save(tmp_path / "delta")
    for action, source, expected in (("apply", place / "pieces", after), ("revert", tmp_path / "apply", before)):
        arguments = ("--model", str(source), "--delta", str(tmp_path / "delta"), "--output_dir", str(tmp_path / action))
        assert main(["delta", action, *arguments, "--quiet"]) == 0
        found = PipelineFolder.read(tmp_path / action)
        assert [file.name for file in found.weights_files] == [file.name for file in pieces.weights_files]
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.tensors().items())
    assert [file.read_bytes() for file in found.weights_files] == [file.read_bytes() for file in pieces.weights_files]
    found.weights_files[1].unlink()
    with pytest.raises(FileFormatError, match="00002-of-00004.safetensors: no such file, but .* lists it"):
        PipelineFolder.read(tmp_path / "revert")


def test_images_for_an_evaluation_are_those_of_the_pipeline(place):
    folder = check_pipeline(place / "base")
    assert folder.image_size == (16, 16) and not folder.one_step
    prompts = [EvaluationPrompt("a cat", 3), EvaluationPrompt("a dog", 4)]
    pipeline = load_pipeline(folder, "cpu", torch.float32)
    found = dict.fromkeys(range(2))
    for positions, images in draw(pipeline, prompts, sampling_of(folder, steps=2), batch_size=2):
        found |= dict(zip(positions, images, strict=True))
    noise = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = load(place / "base")(
        ["a cat", "a dog"], num_inference_steps=2, guidance_scale=7.5, generator=noise, output_type="np"
    ).images
    for position in range(2):
        assert (found[position] == (expected[position] * 255).round().clip(0, 255).astype("uint8")).all()


def test_a_second_text_encoder_of_another_model_is_refused(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "other")
    base, other = PipelineFolder.read(place / "base"), PipelineFolder.read(tmp_path / "other")
    check_generator(other, base)
    pipeline = load(tmp_path / "other")
    pipeline.text_encoder_2.text_projection.weight.data[0, 0] += 1
    pipeline.text_encoder_2.save_pretrained(tmp_path / "other" / "text_encoder_2")
    with pytest.raises(FileFormatError, match="text_encoder_2: text_projection.weight is not that of"):
        check_generator(other, base)
    settings(tmp_path / "other/unet/config.json", sample_size=4)
    with pytest.raises(FileFormatError, match=r"draws latents of \(4, 4, 4\), .* of \(4, 8, 8\)"):
        check_generator(PipelineFolder.read(tmp_path / "other"), base)


def settings(file, **values):
    file = Path(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values", "text"),
    [
        ("unet/config.json", {"addition_embed_type": None}, "a UNet of Stable Diffusion XL has 'text_time'"),
        ("unet/config.json", {"addition_embed_type": "text_image"}, "addition_embed_type is 'text_image'; a UNet"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 40}, "leaves no room for the prompt: 40"),
        ("unet/config.json", {"addition_time_embed_dim": None}, "expected addition_time_embed_dim and"),
        ("unet/config.json", {"encoder_hid_dim": 64}, "encoder_hid_dim is 64: this UNet needs more than a prompt"),
        ("unet/config.json", {"sample_size": [8, 8]}, r"sample_size is \[8, 8\]; Stable Diffusion XL takes one"),
        ("text_encoder_2/config.json", {"projection_dim": 24}, "gives vectors of 24, and the UNet takes 20"),
        ("vae/config.json", {"block_out_channels": None}, "block_out_channels of the VAE"),
        ("model_index.json", {"text_encoder": [None, None]}, "has no text_encoder in model_index.json"),
        ("model_index.json", REFINER, "is a refiner, which takes an image"),
        ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "expected a StableDiffusionXLPipe"),
        ("model_index.json", {"_class_name": ["mine", "Pipeline"]}, "expected a StableDiffusionXLPipeline: save it as"),
    ],
)
def test_what_is_not_supported(file, values, text, place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    settings(tmp_path / "base" / file, **values)
    with pytest.raises(FileFormatError, match=text):
        PipelineFolder.read(tmp_path / "base")


def test_prompts_must_fit_both_tokenizers(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    settings(tmp_path / "base/tokenizer_2/tokenizer_config.json", model_max_length=4)
    pipeline = PipelineFolder.read(tmp_path / "base")
    pipeline.check_prompts(["a cat"])
    assert cut_prompts(load(tmp_path / "base"), [EvaluationPrompt(text, 0) for text in ("a cat", "a red cat")]) == 1
    with pytest.raises(ValueError, match="'a red cat' has 3 tokens, the tokenizer of .* takes 2"):
        pipeline.check_prompts(["a red cat"])


def test_a_unet_that_asks_for_more_does_not_come_with_one_text_encoder(tmp_path):
    base = write_pipeline(tmp_path / "base")
    settings(base / "unet/config.json", addition_embed_type="text_time")
    with pytest.raises(FileFormatError, match="a UNet of Stable Diffusion has None"):
        PipelineFolder.read(base)
