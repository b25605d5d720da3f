"""What digits_concepts.py compares: flags of ``pecker-fast unlearn`` by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROMPTS = Path(__file__).resolve().parents[1] / "examples" / "prompts"
SHARED: dict[str, Any] = {
    "forget_prompts": PROMPTS / "digits_forget.txt",
    "retain_prompts": PROMPTS / "digits_retain.txt",
    "train_batch_size": 64,
    "forget_batch_size": 16,
    "num_validation_images": 0,
}
INSTEAD = {"override_prompts": PROMPTS / "digits_override.txt"}
SPARSE: dict[str, Any] = {"mask_density": 0.1, "block": "row", "mask_scope": "layer", "mask_lr_scale": "mass"}
SFD: dict[str, Any] = {
    **INSTEAD,
    "method": "sfd",
    "max_train_steps": 100,
    "generator_lr": 5e-4,
    "fake_score_lr": 5e-4,
    "lr_warmup_steps": 10,
    "ema_decay": 0.98,
    "t_init": 700,
    "t_min": 20,
    "t_max": 950,
    "forget_weight": 0.05,
    "guidance_scale": (1.0, 1.0, 2.0),
    "prompt_dropout": 0.0,
}
PECKER = {**SFD, **SPARSE, "method": "pecker"}
ESD: dict[str, Any] = {
    **SPARSE,
    "method": "esd",
    "max_train_steps": 100,
    "train_batch_size": 32,
    "learning_rate": 5e-4,
    "negative_guidance": 3.0,
    "retain_weight": 2.0,
    "num_inference_steps": 10,
}
SALUN: dict[str, Any] = {
    **INSTEAD,
    **SPARSE,
    "method": "salun",
    "max_train_steps": 60,
    "learning_rate": 5e-4,
    "retain_weight": 1.0,
    "guidance_scale": 3.0,
    "num_inference_steps": 20,
}
RANDOM = {"mask": "random"}
DENSE_FAKE_SCORE = {"fake_score_mask": "dense"}
SHORT = {"max_train_steps": 1, "train_batch_size": 4, "forget_batch_size": 2}
RUNS: dict[str, dict[str, Any]] = {
    "pecker": PECKER,
    "esd": ESD,
    "salun": SALUN,
    "pecker, dense fake score": PECKER | DENSE_FAKE_SCORE,
    "pecker, random mask": PECKER | RANDOM,
    "esd, random mask": ESD | RANDOM,
    "salun, random mask": SALUN | RANDOM,
    "sfd": SFD,
}
"""What is compared -> its flags of ``pecker-fast unlearn``."""
RETRAINED = "retrained without"
"""No erasure: the same training, from random weights and without the digit."""
RETRAINED_ONE_STEP = "retrained without, one step"
"""That one made a one-step generator, as "sfd" makes one: what relearning is compared with where one step is drawn."""
