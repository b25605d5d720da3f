"""Masked training in a text-to-image script of the shape of diffusers' own: five changed lines, marked with # <--.

    python examples/embed_text_to_image.py --pretrained_model_name_or_path stable-diffusion-v1-5 --train_data_dir images

The folder of images has a metadata.jsonl with {"file_name": ..., "text": ...} in each line. docs/recipes.md says where
the same five lines go in diffusers' examples/text_to_image/train_text_to_image.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from pecker_fast import BlockMask, apply_mask  # <--


class CaptionedImages(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images of a folder with their captions: pixels in [-1, 1] and token numbers."""

    def __init__(self, folder: Path, tokenizer: CLIPTokenizer, resolution: int) -> None:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        self.entries = [json.loads(line) for line in lines if line.strip()]
        self.folder, self.resolution = folder, resolution
        captions = [entry["text"] for entry in self.entries]
        self.tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with Image.open(self.folder / self.entries[index]["file_name"]) as image:
            small = (
                ImageOps.exif_transpose(image)
                .convert("RGB")
                .resize((self.resolution, self.resolution), Image.Resampling.BILINEAR)
            )
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1
        return {"pixel_values": pixels, "input_ids": self.tokens[index]}


def denoising_loss(unet: nn.Module, scheduler: DDPMScheduler, latents: Tensor, states: Tensor) -> Tensor:
    noise = torch.randn_like(latents)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(latents),), device=latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    return nn.functional.mse_loss(unet(noisy, timesteps, states).sample.float(), target.float())


def train(
    pipeline: Path,
    data: Path,
    output_dir: Path,
    *,
    density: float = 0.1,
    resolution: int = 512,
    batch_size: int = 4,
    max_train_steps: int = 1000,
    learning_rate: float = 1e-5,
) -> BlockMask:
    accelerator = Accelerator()
    torch.manual_seed(0)
    scheduler = DDPMScheduler.from_pretrained(pipeline, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(pipeline, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae").requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet").train()

    mask = BlockMask.random(unet, density=density, block="row")  # <-- or BlockMask.load("mask.safetensors")
    active = apply_mask(unet, mask)  # <--
    optimizer = torch.optim.AdamW(active.parameters(), lr=learning_rate)  # <-- was unet.parameters()
    images = CaptionedImages(data, tokenizer, resolution)
    loader = torch.utils.data.DataLoader(images, batch_size=batch_size, shuffle=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    text_encoder.to(accelerator.device)
    vae.to(accelerator.device)

    step = 0
    while step < max_train_steps:
        for batch in loader:
            with torch.no_grad():
                latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
                states = text_encoder(batch["input_ids"])[0]
            loss = denoising_loss(unet, scheduler, latents, states)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                accelerator.print(f"step {step}: loss {loss.item():.3f}")
            if step == max_train_steps:
                break

    unet = accelerator.unwrap_model(unet)
    active.remove()  # <-- an ordinary UNet again
    StableDiffusionPipeline.from_pretrained(pipeline, unet=unet.eval()).save_pretrained(output_dir)
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", type=Path, required=True)
    add("--train_data_dir", type=Path, required=True)
    add("--output_dir", type=Path, default=Path("sd-model-finetuned"))
    add("--mask_density", type=float, default=0.1)
    add("--resolution", type=int, default=512)
    add("--train_batch_size", type=int, default=4)
    add("--max_train_steps", type=int, default=1000)
    add("--learning_rate", type=float, default=1e-5)
    given = parser.parse_args()
    train(
        given.pretrained_model_name_or_path,
        given.train_data_dir,
        given.output_dir,
        density=given.mask_density,
        resolution=given.resolution,
        batch_size=given.train_batch_size,
        max_train_steps=given.max_train_steps,
        learning_rate=given.learning_rate,
    )


if __name__ == "__main__":
    main()
