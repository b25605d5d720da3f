"""Which pipelines can be made to forget, by their settings alone: nothing is loaded to find out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pecker_fast.checkpoint import read_json
from pecker_fast.errors import FileFormatError
from pecker_fast.models.pipeline_families import PipelineFamily, class_of, family_of, image_size
from pecker_fast.models.shards import INDEX_NAME, pieces
from pecker_fast.models.storage import WEIGHTS_NAME
from pecker_fast.score_model import PREDICTION_TYPES

_STEM = WEIGHTS_NAME.partition(".")[0]
_WITH_WEIGHTS = ("text_encoder", "text_encoder_2", "vae", "safety_checker")
_VARIANT = re.compile(r"\.(\w+)(?:-[0-9]+-of-[0-9]+)?\.safetensors$")
_OTHERS = ("text_encoder_3", "image_encoder", "transformer", "prior")
_TIME_IDS = 6
"""Numbers that Stable Diffusion XL is told of an image: its size, where it was cropped, the size that is asked for."""
_CONDITIONS = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
"""Settings of a UNet that takes more than (x_t, t, prompt)."""


def check_index(folder: Path, index: Mapping[str, Any]) -> PipelineFamily:
    """Refuse pipelines with other components than Stable Diffusion 1.x, 2.x or XL has.

    Returns:
        What kind it is.

    Raises:
        FileFormatError: One is missing, or there is one that we would not ask.
    """
    name, family = index.get("_class_name", "a pipeline without a name"), family_of(index)
    if index.get("requires_aesthetics_score"):
        raise FileFormatError(f"{folder}: is a refiner, which takes an image; expected a text-to-image pipeline")
    for component in _OTHERS:
        if class_of(index, component) is not None:
            raise FileFormatError(
                f"{folder}: {name} has {component}; supported are pipelines with a UNet2DConditionModel and nothing "
                f"to ask it but prompts: Stable Diffusion 1.x, 2.x and XL"
            )
    for component in family.needed:
        if class_of(index, component) is None:
            raise FileFormatError(f"{folder}: {name} has no {component} in model_index.json; expected {family.needed}")
        if not (folder / component).is_dir():
            raise FileFormatError(f"{folder / component}: no such folder, but model_index.json names it")
    if (got := class_of(index, "unet")) != "UNet2DConditionModel":
        raise FileFormatError(f"{folder}: its unet is a {got}; expected a UNet2DConditionModel")
    if name != family.pipeline:  # it has the same parts, or all that we would ask
        raise FileFormatError(
            f"{folder}: is {name!r}; expected a {family.pipeline}: save it as one, "
            f"{family.pipeline}.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return family


def check_unet(file: Path, config: Mapping[str, Any], family: PipelineFamily) -> None:
    """Refuse a UNet that takes or gives something else than latents, a timestep and what its family asks by a prompt.

    Raises:
        FileFormatError: It does; the setting is named.
    """
    for name in _CONDITIONS:
        if config.get(name) is not None:
            raise FileFormatError(
                f"{file}: {name} is {config[name]!r}: this UNet needs more than a prompt, which is not supported; "
                f"expected None"
            )
    _check_addition(file, config, family)
    channels, out = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels != out:
        raise FileFormatError(
            f"{file}: takes {channels} channels and gives {out}: it is for inpainting, upscaling or editing; expected "
            f"a text-to-image UNet, with as many out as in"
        )
    _check_not_quantized(file, config)
    size = config.get("sample_size")
    pair = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    if not (pair or (isinstance(size, int) and size > 0)):
        raise FileFormatError(f"{file}: sample_size is {size!r}; expected the latents' size, such as 64")


def check_size_and_text(folder: Path, config: Mapping[str, Any], family: PipelineFamily) -> None:
    """Refuse what a UNet of Stable Diffusion XL could not be told: a size, or a prompt's vector of another width.

    Raises:
        FileFormatError: Its pipeline has no one size, or its second text encoder another width.
    """
    if family.addition_embed_type is None:
        return
    if not isinstance(config["sample_size"], int):
        raise FileFormatError(f"{folder}: sample_size is {config['sample_size']!r}; {family.name} takes one number")
    image_size(folder)
    width = read_json(folder / "text_encoder_2" / "config.json").get("projection_dim")
    if width is not None and width != pooled_width(config):
        raise FileFormatError(
            f"{folder}: text_encoder_2 gives vectors of {width}, and the UNet takes {pooled_width(config)}"
        )


def check_prediction(file: Path, config: Mapping[str, Any]) -> str:
    """What the UNet predicts.

    Raises:
        FileFormatError: Neither the noise nor v.
    """
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise FileFormatError(f"{file}: prediction_type is {prediction!r}; expected {' or '.join(PREDICTION_TYPES)}")
    return str(prediction)


def _check_not_quantized(file: Path, config: Mapping[str, Any]) -> None:
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise FileFormatError(
            f"{file}: quantization_config: its weights are stored quantized ({method or 'in some way'}); expected "
            f"float32, float16 or bfloat16: take the model's original weights, and quantize the result"
        )


def pooled_width(config: Mapping[str, Any]) -> int:
    """Of the one vector for a whole prompt that a UNet of Stable Diffusion XL takes, by its config."""
    return int(config["projection_class_embeddings_input_dim"]) - _TIME_IDS * int(config["addition_time_embed_dim"])


def _check_addition(file: Path, config: Mapping[str, Any], family: PipelineFamily) -> None:
    if (got := config.get("addition_embed_type")) != family.addition_embed_type:
        raise FileFormatError(
            f"{file}: addition_embed_type is {got!r}; a UNet of {family.name} has {family.addition_embed_type!r}"
        )
    total = config.get("projection_class_embeddings_input_dim")
    if family.addition_embed_type is None:
        if total is not None:
            raise FileFormatError(f"{file}: projection_class_embeddings_input_dim is {total!r}; expected None")
        return
    if not (isinstance(total, int) and isinstance(config.get("addition_time_embed_dim"), int)):
        raise FileFormatError(
            f"{file}: expected addition_time_embed_dim and projection_class_embeddings_input_dim, as {family.name} has"
        )
    if pooled_width(config) < 1:
        raise FileFormatError(f"{file}: projection_class_embeddings_input_dim leaves no room for the prompt: {total}")


def weights_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a UNet: one, or those of an index.

    Raises:
        FileFormatError: One is missing: it is a variant alone, or in an older format.
    """
    file = folder / WEIGHTS_NAME
    if file.is_file():
        return (file,)
    if not (folder / INDEX_NAME).is_file():
        check_safetensors(folder)
        raise FileFormatError(f"{file}: no such file")
    found = tuple(folder / name for name in sorted(pieces(folder)))
    for piece in found:
        if not piece.is_file():
            raise FileFormatError(f"{piece}: no such file, but {INDEX_NAME} lists it")
    return found


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a component as ``from_pretrained`` reads them: without variants."""
    for stem in ("model", _STEM):
        whole = folder / f"{stem}.safetensors"
        if found := [whole] if whole.is_file() else sorted(folder.glob(f"{stem}-*-of-*.safetensors")):
            return found
    return []


def check_shapes(file: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights of other names or shapes than a network has, naming the first.

    Raises:
        FileFormatError: They are not the network's.
    """
    for name in dict.fromkeys((*expected, *shapes)):
        if shapes.get(name) != expected.get(name):
            raise FileFormatError(
                f"{file}: does not fit config.json: {name} is {shapes.get(name, 'missing')}, expected "
                f"{expected.get(name, 'no such weight')}"
            )


def check_components(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a pipeline that ``from_pretrained`` could not load whole, such as one with a pickled safety checker.

    Raises:
        FileFormatError: A component's weights are pickled, quantized, a variant alone, or missing.
    """
    for component in index:
        if class_of(index, component) is None or component == "unet":  # see weights_files
            continue
        if component in _WITH_WEIGHTS or any((folder / component).glob("*.bin")):
            check_safetensors(folder / component)
        if component in _WITH_WEIGHTS and (file := folder / component / "config.json").is_file():
            _check_not_quantized(file, read_json(file))


def check_safetensors(folder: Path) -> None:
    """Refuse a component whose weights ``from_pretrained(..., use_safetensors=True)`` does not find.

    Raises:
        FileFormatError: They are pickled, a variant alone, or there are none.
    """
    names = [f"{stem}.safetensors{more}" for stem in ("model", _STEM) for more in ("", ".index.json")]
    if any((folder / name).is_file() for name in names):
        return
    if variants := sorted(path.name for path in folder.glob("*.safetensors")):
        raise FileFormatError(
            f"{folder}: has {variants[0]} alone, a variant or an unknown name; expected {names[0]} or {names[2]}"
            f"{_hint_of_variant(variants[0])}"
        )
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise FileFormatError(
            f"{folder}: has {pickled[0]} alone, a pickle, which is not opened; where you trust it, "
            f"{_again('use_safetensors=False')}"
        )
    raise FileFormatError(f"{folder}: has no safetensors file")


def _again(how: str) -> str:
    return (
        f"save the whole pipeline again: DiffusionPipeline.from_pretrained(folder, {how}).save_pretrained(new_folder)"
    )


def _hint_of_variant(name: str) -> str:
    """What to do with a file such as model.fp16.safetensors; nothing is known of other names."""
    found = _VARIANT.search(name)
    if found is None:
        return ""
    dtypes = {"fp16": ", torch_dtype=torch.float16", "bf16": ", torch_dtype=torch.bfloat16"}
    return "; " + _again(f'variant="{found[1]}"{dtypes.get(found[1], "")}')
