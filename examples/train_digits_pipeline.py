"""Train a Stable Diffusion pipeline from nothing: real handwritten digits with captions, on a CPU, in a few minutes.

What comes out is an ordinary pipeline folder, small but complete (tokenizer, text encoder, UNet, VAE, scheduler), that
``StableDiffusionPipeline.from_pretrained`` loads, and that concepts can be erased from::

    python examples/train_digits_pipeline.py --output_dir digits-pipeline

Nothing is downloaded: the digits come with scikit-learn, every network starts from random weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pecker_fast.data import load_digits
from pecker_fast.digits_task import load_judge

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("{}", "the digit {}", "a handwritten {}", "a photo of the digit {}", "an image of the number {}")
KL_WEIGHT = 1e-5
CAPTION_DROPOUT = 0.1  # without a caption now and then there is no guidance later


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of our own: single bytes, and each word of our captions as one token."""
    words = " ".join(template.format(" ".join(WORDS)) for template in TEMPLATES).split()
    spelled = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}  # </w> ends a word
    merges = dict.fromkeys(
        ("".join(parts[:end]), parts[end]) for parts in spelled.values() for end in range(1, len(parts))
    )
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges]
    return CLIPTokenizer({token: number for number, token in enumerate(tokens)}, list(merges), model_max_length=16)


def make_pipeline() -> StableDiffusionPipeline:
    """Stable Diffusion, scaled down to 16 x 16 images and about a million weights."""
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_images() -> tuple[Tensor, Tensor]:
    """The digits, (1797, 3, 16, 16) in [-1, 1], twice their size and in three channels, and their labels."""
    data = load_digits()
    images = F.interpolate(data.images, scale_factor=2, mode="bicubic").clamp(-1, 1)
    return images.expand(-1, 3, -1, -1).contiguous(), data.labels


def train_vae(vae: AutoencoderKL, images: Tensor, steps: int, batch_size: int) -> None:
    """Learn to compress, then choose the factor that gives latents the standard deviation 1."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = tqdm(range(steps), desc="VAE")
    for _ in bar:
        batch = images[torch.randint(len(images), (batch_size,))]
        posterior = vae.encode(batch).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, batch) + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        rate.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(images).latent_dist.mode().std().item())


def train_unet(pipe: StableDiffusionPipeline, images: Tensor, labels: Tensor, steps: int, batch_size: int) -> None:
    """Noise prediction by UNet and text encoder together; the pipeline keeps the running averages of their weights."""
    with torch.no_grad():
        latents = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
    captions = [template.format(word) for word in WORDS for template in TEMPLATES] + [""]
    tokens = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    networks = torch.nn.ModuleList([pipe.unet, pipe.text_encoder]).train()
    optimizer = torch.optim.AdamW(networks.parameters(), lr=2e-3, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = EMAModel(networks.parameters(), decay=0.995, use_ema_warmup=True, power=0.75)
    bar = tqdm(range(steps), desc="UNet and text encoder")
    for _ in bar:
        chosen = torch.randint(len(latents), (batch_size,))
        caption = labels[chosen] * len(TEMPLATES) + torch.randint(len(TEMPLATES), (batch_size,))
        caption[torch.rand(batch_size) < CAPTION_DROPOUT] = len(captions) - 1
        noise, t = torch.randn(batch_size, *latents.shape[1:]), torch.randint(1000, (batch_size,))
        noisy = pipe.scheduler.add_noise(latents[chosen], noise, t)
        embedded = pipe.text_encoder(tokens).last_hidden_state[caption]
        loss = F.mse_loss(pipe.unet(noisy, t, embedded).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.step(networks.parameters())
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    average.copy_to(networks.parameters())
    networks.eval()


@torch.no_grad()
def recognised(pipe: StableDiffusionPipeline, samples: int, steps: int, judge: torch.nn.Module) -> dict[str, float]:
    """Share of each digit's images in which a classifier of real digits sees that digit."""
    shares = {}
    pipe.set_progress_bar_config(disable=True)
    for digit, word in enumerate(tqdm(WORDS, desc="judging")):
        prompts = [TEMPLATES[index % len(TEMPLATES)].format(word) for index in range(samples)]
        drawn = pipe(prompts, num_inference_steps=steps, guidance_scale=3.0, output_type="pt").images
        seen = judge(F.avg_pool2d(drawn.mean(1, keepdim=True) * 2 - 1, 2)).argmax(1)
        shares[word] = (seen == digit).float().mean().item()
    return shares


def main(output_dir: Path, max_train_steps: int = 1500, seed: int = 0, short: bool = False) -> dict[str, float]:
    torch.manual_seed(seed)
    images, labels = load_images()
    pipe, batch_size = make_pipeline(), 64
    if short:
        images, labels, batch_size = images[:50], labels[:50], 8
    train_vae(pipe.vae, images, 2 if short else 400, batch_size)
    train_unet(pipe, images, labels, 2 if short else max_train_steps, batch_size)
    pipe.save_pretrained(output_dir)
    shares = recognised(pipe, 1 if short else 50, 2 if short else 20, load_judge(short=short))
    print("recognised: " + ", ".join(f"{word} {share:.2f}" for word, share in shares.items()))
    print(f"on average {sum(shares.values()) / len(shares):.3f}; the pipeline is in {output_dir}")
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few steps, to see that everything runs")
    main(**vars(parser.parse_args()))
