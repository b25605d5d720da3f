"""Small stock pipelines in the shape of Stable Diffusion and its XL, with random weights, written without a network."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

MAX_TOKENS = 16
WORDS = ("of", "cat", "dog", "photo", "bird", "the", "three", "red")
"""Each of these, and each single letter, is one token; other words are one token a letter."""


def write_pipeline(folder: str | Path, prediction_type: str = "epsilon", safety_checker: bool = False) -> Path:
    """A StableDiffusionPipeline folder of safetensors: latents of 4 x 8 x 8, images of 16 x 16, 16 tokens of width 32.

    The same bytes at each call with the same arguments.
    """
    folder = Path(folder)
    checker = _safety_checker if safety_checker else type(None)
    parts = _made(vae=_vae, text_encoder=_text_encoder, unet=_unet, safety_checker=checker)
    tokenizer = _tokenizer(folder / "words")
    scheduler = DDIMScheduler(
        **_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
    )
    size = {"shortest_edge": 16}, {"height": 16, "width": 16}
    extractor = CLIPImageProcessor(size=size[0], crop_size=size[1]) if safety_checker else None
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        feature_extractor=extractor,
        requires_safety_checker=safety_checker,
    )
    return _saved(pipeline, folder)


def write_three(root: Path) -> Path:
    """A pipeline ("original"), it with another UNet ("changed"), and that as a generator's folder ("one_step")."""
    loaded = StableDiffusionPipeline.from_pretrained(write_pipeline(root / "original"), local_files_only=True)
    betas = loaded.scheduler.betas[:626].tolist()
    loaded.unet.conv_out.weight.data.mul_(0.5)
    loaded.save_pretrained(root / "changed")
    loaded.scheduler = EulerDiscreteScheduler(num_train_timesteps=626, trained_betas=betas, timestep_spacing="trailing")
    loaded.save_pretrained(root / "one_step")
    return root


def write_xl_pipeline(folder: str | Path, force_zeros_for_empty_prompt: bool = True) -> Path:
    """A StableDiffusionXLPipeline folder: sizes as above, but prompts of width 32 + 24, and 20 for a whole one.

    Its second tokenizer pads with another token than the first, as the published one does.
    """
    folder = Path(folder)
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    more |= {"cross_attention_dim": 32 + 24, "projection_class_embeddings_input_dim": 20 + 6 * 8}
    parts = _made(
        vae=_vae, text_encoder=_text_encoder, text_encoder_2=_text_encoder_2, unet=functools.partial(_unet, **more)
    )
    pipeline = StableDiffusionXLPipeline(
        **parts,
        tokenizer=_tokenizer(folder / "words"),
        tokenizer_2=_tokenizer(folder / "words", pad_token="!"),
        scheduler=EulerDiscreteScheduler(**_BETAS, steps_offset=1),
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
    )
    return _saved(pipeline, folder)


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _made(**parts: Callable[[], Any]) -> dict[str, Any]:
    """One after the other from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: make() for name, make in parts.items()}


def _saved(pipeline: DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    shutil.rmtree(folder / "words")
    return folder


def _merges() -> list[tuple[str, str]]:
    """Each word from left to right: c + a, ca + t</w>."""
    found: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for end in range(1, len(word)):
            found[word[:end], word[end] + ("</w>" if end == len(word) - 1 else "")] = None
    return list(found)


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(code) for code in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    return {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def _tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    merges = _merges()
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "pad_token": pad_token}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(_vocabulary(merges)), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _text_encoder() -> CLIPTextModel:
    return CLIPTextModel(_text_config()).eval()


def _text_encoder_2() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_text_config(hidden_size=24, projection_dim=20)).eval()


def _text_config(**changes: int) -> CLIPTextConfig:
    vocabulary = len(_vocabulary(_merges()))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPTextConfig(
        **sizes | changes,
        vocab_size=vocabulary,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def _unet(cross_attention_dim: int = 32, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=8,
        **more,
    ).eval()


def _safety_checker() -> StableDiffusionSafetyChecker:
    text = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    heads = {"num_attention_heads": 2}
    config = CLIPConfig(text_config=text | heads, vision_config=vision | heads, projection_dim=8)
    return StableDiffusionSafetyChecker(config).eval()
