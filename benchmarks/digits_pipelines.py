"""Pipelines of digits, looked at: their images, what a judge sees in them, how they relearn, a fingerprint.

python benchmarks/digits_pipelines.py FOLDER   # the fingerprint, from a process of its own
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers looks

import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from pecker_fast import NoiseSchedule
from pecker_fast.attacks import relearn
from pecker_fast.concepts.pipeline import quiet_libraries
from pecker_fast.data import load_digits
from pecker_fast.digits_task import evaluate_images, load_judge
from pecker_fast.models import DigitsClassifier
from pecker_fast.score_model import TextConditional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from train_digits_pipeline import TEMPLATES, WORDS, load_images  # noqa: E402

MANY_STEPS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 3.0}
ONE_STEP: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 0.0}
ATTACK: dict[str, Any] = {"max_steps": 100, "every": 2, "lr": 1e-4, "batch_size": 32, "samples": 40}
ATTACK_IMAGES = 10
_BATCH = 250
quiet_libraries()


def load(folder: Path) -> StableDiffusionPipeline:
    """As anyone would; nothing is looked for on a network."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def is_one_step(pipe: StableDiffusionPipeline) -> bool:
    """Whether its scheduler is that of a one-step generator."""
    return isinstance(pipe.scheduler, EulerDiscreteScheduler)


@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline, samples: int, digits: tuple[int, ...] = tuple(range(10)), seed: int = 0
) -> Tensor:
    """``samples`` images of each digit by all templates in turn, (digits x samples, 3, 16, 16) in [0, 1].

    The noise of a seed is the same for every pipeline.
    """
    how = ONE_STEP if is_one_step(pipe) else MANY_STEPS
    prompts = [TEMPLATES[n % len(TEMPLATES)].format(WORDS[digit]) for digit in digits for n in range(samples)]
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(1234 + seed))
    images = [
        pipe(prompts[at : at + _BATCH], latents=noise[at : at + _BATCH], output_type="pt", **how).images
        for at in range(0, len(prompts), _BATCH)
    ]
    return torch.cat(images)


def reduced(images: Tensor) -> Tensor:
    """(N, 3, 16, 16) as the judge knows digits, (N, 1, 8, 8): as they are in the data set."""
    return F.avg_pool2d(images.mean(1, keepdim=True), 2)


@torch.no_grad()
def judged(pipe: StableDiffusionPipeline, samples: int, forget: int, seed: int) -> dict[str, Any]:
    """What prompts give: ``samples`` images of each digit.

    Returns:
        "seen": how often (column) was seen where (row) was asked for; "frechet_distance" of the other digits' images to
        the real ones, in the judge's features (not FID).
    """
    judge, data = load_judge(progress=False), load_digits()
    images, labels = (
        reduced(draw(pipe, samples, seed=seed) * 2 - 1),
        torch.arange(len(WORDS)).repeat_interleave(samples),
    )
    counts = F.one_hot(judge(images).argmax(1), len(WORDS)).view(len(WORDS), samples, len(WORDS)).sum(1)
    quality = evaluate_images(images, labels, judge, data, (forget,))
    return {"seen": counts.tolist(), "frechet_distance": quality["frechet_distance"]}


def fingerprint(pipe: StableDiffusionPipeline) -> str:
    """SHA-256 of the bytes of a few images of every digit."""
    return hashlib.sha256(draw(pipe, 2).contiguous().numpy().tobytes()).hexdigest()


class PromptedUNet(nn.Module):
    """A pipeline's UNet as attacks on class-conditional models ask it: label d is one prompt for digit d.

    In eval mode it has the pipeline's guidance.
    """

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        super().__init__()
        prompts = [*(TEMPLATES[-1].format(word) for word in WORDS), ""]
        tokens = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            self.predict = TextConditional(pipe.text_encoder(tokens).last_hidden_state)
        self.unet = pipe.unet
        self.guidance = 1.0 if is_one_step(pipe) else MANY_STEPS["guidance_scale"]

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noise in latents (B, 4, 8, 8)."""
        epsilon = self.predict(self.unet, x_t, t, labels)
        if self.training or self.guidance == 1.0:
            return epsilon
        null = self.predict(self.unet, x_t, t, torch.full_like(labels, len(WORDS)))
        return null + self.guidance * (epsilon - null)


class LatentJudge(nn.Module):
    """The judge, for latents."""

    def __init__(self, pipe: StableDiffusionPipeline, judge: DigitsClassifier) -> None:
        super().__init__()
        self.vae, self.judge = pipe.vae, judge

    def forward(self, latents: Tensor) -> Tensor:
        """Logits (N, 10)."""
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        logits: Tensor = self.judge(reduced(images.clamp(-1, 1)))
        return logits


def relearned(pipe: StableDiffusionPipeline, digit: int, schedule: NoiseSchedule) -> dict[str, Any]:
    """Few-shot relearning from real images of the digit: steps until it is back in half of the samples.

    Args:
        pipe: The pipeline that is attacked, which stays as it is.
        digit: What it has forgotten.
        schedule: Of the pipeline that it was made from.
    """
    images, labels = load_images()
    chosen = (labels == digit).nonzero().squeeze(1)[:ATTACK_IMAGES]
    with torch.no_grad():
        latents = pipe.vae.encode(images[chosen]).latent_dist.mode() * pipe.vae.config.scaling_factor
    kind: dict[str, Any] = {"kind": "ddim", "steps": MANY_STEPS["num_inference_steps"]}
    if is_one_step(pipe):
        kind = {"kind": "one_step", "t_init": pipe.scheduler.config.num_train_timesteps - 1}
    generation = {**kind, "schedule": schedule.to_dict(), "sample_shape": [4, 8, 8], "clip": None}
    judge = LatentJudge(pipe, load_judge(progress=False)).eval()
    result = relearn(PromptedUNet(pipe).eval(), generation, latents, labels[chosen], judge=judge, **ATTACK)
    return {"steps_to_return": result.steps_to_return, "curve": [list(point) for point in result.curve]}


if __name__ == "__main__":
    print(fingerprint(load(Path(sys.argv[1]))))
