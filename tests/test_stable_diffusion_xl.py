"""Pipelines of Stable Diffusion XL: two text encoders, and a UNet that is asked for more than a prompt."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from pipelines import write_pipeline, write_xl_pipeline

from pecker_fast.checkpoint import read_safetensors
from pecker_fast.cli import main
from pecker_fast.concept_draws import check_pipeline, draw, load_pipeline, sampling_of
from pecker_fast.concepts import PipelineFolder, embed_prompts
from pecker_fast.concepts.embedding import unset_prompts
from pecker_fast.concepts.generators import check_generator
from pecker_fast.delta import Delta
from pecker_fast.errors import FileFormatError
from pecker_fast.prompt_files import EvaluationPrompt

UNET = "unet/diffusion_pytorch_model.safetensors"
FLAGS = (
    *("--erase_concept", "cat", "--retain_prompts", "keep.txt", "--max_train_steps", "1", "--train_batch_size", "1"),
    *("--device", "cpu", "--block", "row", "--num_validation_images", "1", "--quiet", "--mask", "random"),
    *("--mask_density", "0.2"),
)
SALUN = ("--method", "salun", "--override_concept", "dog", "--num_inference_steps", "2", "--learning_rate", "1e-3")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    write_xl_pipeline(folder / "base")
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


@pytest.mark.parametrize(
    "method",
    [
        ("--method", "pecker", "--override_concept", "dog", "--generator_lr", "1e-3"),
        ("--method", "esd", "--num_inference_steps", "2", "--learning_rate", "1e-3", "--negative_guidance", "1"),
        SALUN,
    ],
    ids=lambda method: method[1],
)
def test_prompts_are_unlearned(method, place, tmp_path):
    out = tmp_path / "out"
    source = ("--pretrained_model_name_or_path", "base", "--output_dir", str(out))
    assert main(["unlearn", *source, *FLAGS, *method]) == 0
    before, after = (read_safetensors(folder / UNET)[0] for folder in (place / "base", out / "model"))
    delta = Delta.load(out / "delta")
    changed = 0
    for name, tensor in before.items():
        mask = delta.mask.parameters
        flags = mask[name].to_dense() if name in mask else torch.zeros_like(tensor).bool()
        assert torch.equal(after[name][~flags], tensor[~flags])
        changed += int((after[name] != tensor).sum())
    assert 0.4 * delta.mask.numel < changed <= delta.mask.numel
    how = {"num_inference_steps": 1, "guidance_scale": 0.0} if method[1] == "pecker" else {"num_inference_steps": 2}
    drawn = [
        load(folder)("a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **how).images
        for folder in (out / "model", out / "model")
    ]
    assert torch.equal(*drawn) and bool(drawn[0].isfinite().all())
    card = (out / "model" / "README.md").read_text()
    assert "StableDiffusionXLPipeline.from_pretrained(" in card and "- stable-diffusion-xl\n" in card
    assert (out / "model" / "before_after.png").is_file()
    models = ("--model", str(out / "model"), "--delta", str(out / "delta"), "--output_dir", str(tmp_path / "back"))
    assert main(["delta", "revert", *models, "--quiet"]) == 0
    back = read_safetensors(tmp_path / "back" / UNET)[0]
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())
    assert (
        json.loads((tmp_path / "back" / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
    )


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
        ("model_index.json", {"text_encoder": [None, None]}, "has no text_encoder in model_index.json"),
        ("model_index.json", {"requires_aesthetics_score": True}, "is a refiner, which takes an image"),
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
    with pytest.raises(ValueError, match="'a red cat' has 3 tokens, the tokenizer of .* takes 2"):
        pipeline.check_prompts(["a red cat"])


def test_a_unet_that_asks_for_more_does_not_come_with_one_text_encoder(tmp_path):
    base = write_pipeline(tmp_path / "base")
    settings(base / "unet/config.json", addition_embed_type="text_time")
    with pytest.raises(FileFormatError, match="a UNet of Stable Diffusion has None"):
        PipelineFolder.read(base)
