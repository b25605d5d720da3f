"""Flags of ``pecker-fast unlearn --method``: the baselines, and which flag has a say in which method."""

from __future__ import annotations

import argparse
from pathlib import Path

from pecker_fast.baselines.config import METHODS, ONLY
from pecker_fast.flags import on_off, positive_float, positive_int

DISTILL = "distill"
SALUN = "salun"
CHOICES = (DISTILL, "pecker", "sfd", *METHODS[:3], SALUN, *METHODS[3:])

BASELINE_FIELDS = {
    "learning_rate": "learning_rate",
    "class_dropout": "class_dropout",
    "negative_guidance": "negative_guidance",
    "ewc_weight": "ewc_weight",
    "fisher_samples": "fisher_samples",
    "fisher_timesteps": "fisher_timesteps",
    "replay_samples": "replay_samples",
    "num_inference_steps": "sampling_steps",
    "null_class": "null_class",
}
"""Flag -> field of ``BaselineConfig``, of the flags that distilling does not have."""
SHARED_FIELDS = {
    "train_batch_size": "batch_size",
    "forget_batch_size": "forget_batch_size",
    "lr_warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "ema_decay": "ema_decay",
    "retain_weight": "retain_weight",
    "forget_weight": "forget_weight",
    "seed": "seed",
}
"""Flag -> field of ``BaselineConfig``, of the flags that distilling has too."""
_BASELINE_FLAGS = ("train_data_dir", "max_grad_norm", *BASELINE_FIELDS)
_DISTILL_FLAGS = (
    *("init", "earlier", "generator_lr", "fake_score_lr", "clip_value", "sid_alpha", "t_init", "t_min", "t_max"),
    *("fake_score_mask", "saliency", "saliency_warmup", "stop_on", "stop_every", "stop_samples", "judge", "cache_dir"),
    *("preset", "merge_batches", "closed_form_loss", "skip_frozen", "reuse_generator_forward", "stop_gradient"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
)
_MASK_FLAGS = (
    *("mask_density", "block", "mask_scope", "mask_region", "mask_norms", "mask_budget", "mask_rank"),
    *("mask_accumulate", "mask_batches", "mask_batch_size"),
)


def method_flag(parser: argparse.ArgumentParser) -> None:
    """What makes the model forget."""
    parser.add_argument(
        "--method",
        choices=CHOICES,
        default=DISTILL,
        metavar="METHOD",
        help=f"{', '.join(CHOICES)} ({DISTILL}, also called pecker; sfd is the same with --mask dense); all others "
        f"leave a model of many steps, and train every weight of it unless --mask says otherwise or the method is "
        f"{SALUN}",
    )


def baseline_flags(parser: argparse.ArgumentParser) -> None:
    """What only other methods than distilling have."""
    group = parser.add_argument_group("of other methods than distill")
    add = group.add_argument
    add("--train_data_dir", type=Path, metavar="PATH", help="labelled images (the digits, for a model of them)")
    add("--learning_rate", type=positive_float, metavar="X", help="learning rate (1e-4)")
    add("--max_grad_norm", type=float, metavar="X", help="clip gradients to this norm; 0 does not clip (1)")
    add("--null_class", type=on_off, metavar="{on,off}", help="the model knows a class for no class (off)")
    add("--class_dropout", type=float, metavar="X", help="share of labels replaced by that class (0)")
    add("--negative_guidance", type=float, metavar="X", help="eta of esd (2)")
    add("--ewc_weight", type=float, metavar="X", help="lambda of selective_amnesia (10)")
    add("--fisher_samples", type=positive_int, metavar="N", help="images of a class for its Fisher information (500)")
    add("--fisher_timesteps", type=positive_int, metavar="N", help="timesteps that each is looked at (all)")
    add("--replay_samples", type=positive_int, metavar="N", help="images of a class that it rehearses (500)")
    add("--num_inference_steps", type=positive_int, metavar="N", help="of DDIM (as many as the model's own)")


def check_flags(options: argparse.Namespace) -> None:
    """Refuse flags that have no say in ``options.method``.

    Raises:
        ValueError: One of them; it names the flag.
    """
    method = options.method
    if method == DISTILL:
        _refuse(options, _BASELINE_FLAGS, f"has no say in --method {DISTILL}")
        return
    _refuse(options, _DISTILL_FLAGS, f"is of --method {DISTILL}; it has no say in --method {method}")
    fields = BASELINE_FIELDS | SHARED_FIELDS | {"override_class": "override"}
    rule = "random_label" if method == SALUN else method
    idle = [flag for flag, field in fields.items() if rule not in ONLY.get(field, (rule,))]
    _refuse(options, idle, f"has no say in --method {method}")
    if options.mask_path is not None:
        _refuse(options, ("mask", *_MASK_FLAGS), "has no say where --mask_path gives the mask")
    elif method != SALUN and options.mask in (None, "dense"):
        idle = [flag for flag in _MASK_FLAGS if not (options.mask == "dense" and flag == "mask_region")]
        _refuse(options, idle, "has no say where every weight trains; give --mask saliency or random too")
    if method in ("fine_tune", "retrain") and options.mask != "saliency":
        _refuse(options, ("forget_batch_size",), f"has no say in --method {method} without --mask saliency")


def _refuse(options: argparse.Namespace, flags: tuple[str, ...] | list[str], why: str) -> None:
    for flag in flags:
        if getattr(options, flag, None) is not None:
            raise ValueError(f"--{flag}: {why}")
