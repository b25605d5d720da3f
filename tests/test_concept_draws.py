"""Images of prompts for an evaluation: those of the pipeline, whatever the batch, or a clear refusal."""

import sys

import numpy as np
import pipelines
import pytest
import torch

from pecker_fast.concept_draws import check_pipeline, draw, load_pipeline, sampling_of
from pecker_fast.errors import FileFormatError, NonFiniteError
from pecker_fast.prompt_files import EvaluationPrompt


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return pipelines.write_three(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def original(folders):
    return load_pipeline(check_pipeline(folders / "original"), "cpu", torch.float32)


def drawn(pipeline, prompts, sampling, batch_size):
    images = [None] * len(prompts)
    for positions, pixels in draw(pipeline, prompts, sampling, batch_size):
        assert len(positions) <= batch_size
        for position, image in zip(positions, pixels, strict=True):
            images[position] = image
    return np.stack(images)


def test_images_are_those_of_the_pipeline_and_depend_on_no_batch(original, folders):
    prompts = [EvaluationPrompt("cat", 3, 2.0), EvaluationPrompt("dog", 4), EvaluationPrompt("red bird", 3, 2.0)]
    sampling = sampling_of(check_pipeline(folders / "original"), steps=2)
    images = drawn(original, prompts, sampling, 1)
    for prompt, image, guidance in zip(prompts, images, (2.0, 7.5, 2.0), strict=True):
        noise = torch.Generator().manual_seed(prompt.seed)
        picture = original(prompt.text, num_inference_steps=2, guidance_scale=guidance, generator=noise).images[0]
        assert np.array_equal(np.asarray(picture), image)
    for batch_size in (2, 3):
        other = drawn(original, prompts, sampling, batch_size)
        assert np.abs(images.astype(int) - other).max() <= 1  # products of other shapes are rounded otherwise
    changed = drawn(original, [EvaluationPrompt("cat", 5, 2.0)], sampling, 1)
    assert np.abs(changed.astype(int) - images[:1]).max() > 1  # control: another seed


def test_a_one_step_generator_is_drawn_in_one_step_whatever_the_files_say(folders):
    one, many = check_pipeline(folders / "one_step"), check_pipeline(folders / "original")
    asked = EvaluationPrompt("cat", 0, 9.0)
    sampling = sampling_of(one, usual_steps=20)
    assert (one.one_step, sampling.num_inference_steps, sampling.guidance_of(asked)) == (True, 1, 0.0)
    sampling = sampling_of(many, usual_steps=20)
    assert (many.one_step, sampling.num_inference_steps, sampling.guidance_of(asked)) == (False, 20, 9.0)
    sampling = sampling_of(many)
    assert (sampling.num_inference_steps, sampling.guidance_of(EvaluationPrompt("cat"))) == (50, 7.5)
    for folder in (one, many):
        sampling = sampling_of(folder, steps=3, guidance=2.0, usual_steps=20)
        assert (sampling.num_inference_steps, sampling.guidance_of(asked)) == (3, 2.0)


def test_loading_casts_every_part_and_names_the_extra(folders, monkeypatch):
    folder = check_pipeline(folders / "original")
    loaded = load_pipeline(folder, "cpu", torch.bfloat16)
    assert {part.dtype for part in (loaded.unet, loaded.vae, loaded.text_encoder)} == {torch.bfloat16}
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install pecker_fast\[diffusers\]"):
        load_pipeline(folder, "cpu", torch.float32)


def test_nan_is_not_taken_for_an_image(folders):
    broken = load_pipeline(check_pipeline(folders / "original"), "cpu", torch.float32)
    broken.unet.conv_out.bias.data[0] = torch.nan
    sampling = sampling_of(check_pipeline(folders / "original"), steps=1)
    with pytest.raises(NonFiniteError, match="drew NaN for the prompt 'cat'"):
        next(draw(broken, [EvaluationPrompt("cat", 0)], sampling, 1))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "model_index.json",
            '{"_class_name": "FluxPipeline"}',
            "expected a StableDiffusionPipeline or StableDiffusionXLPipeline, got .FluxPipeline",
        ),
        ("model_index.json", None, "cannot be read"),
        ("scheduler/scheduler_config.json", None, "cannot be read"),
        ("unet/diffusion_pytorch_model.safetensors", None, "variants such as fp16, are not read"),
        ("vae/diffusion_pytorch_model.safetensors", "{}", "damaged"),
        ("unet/config.json", "{}", "expected sample_size of the UNet"),
    ],
)
def test_folders_that_cannot_be_drawn_from(folders, tmp_path, name, content, said):
    for file in (folders / "original").rglob("*"):
        if file.is_file():
            target = tmp_path / "p" / file.relative_to(folders / "original")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    assert check_pipeline(tmp_path / "p").image_size == (16, 16)
    (tmp_path / "p" / name).unlink()
    if content is not None:
        (tmp_path / "p" / name).write_text(content)
    with pytest.raises(FileFormatError, match=said) as refused:
        check_pipeline(tmp_path / "p")
    assert str(tmp_path) in str(refused.value)
