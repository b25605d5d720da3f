"""What ``pecker-fast doctor --flops`` counts: an iteration of the distiller, of the CIFAR-10 network or a given one."""

from __future__ import annotations

import argparse

from pecker_fast.commands.source import Source, distill_config, load_source, torch_device
from pecker_fast.config import SWITCHES
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.iteration_flops import IterationFlops, describe
from pecker_fast.mask import BlockMask
from pecker_fast.models import DDPMUNet
from pecker_fast.schedule import NoiseSchedule


def count(options: argparse.Namespace) -> tuple[IterationFlops, str]:
    """FLOPs of an iteration, for machines and for people.

    A random mask stands for the saliency mask of the same density, whose pass is what "mask" says.

    Raises:
        FileFormatError: ``--model`` is no folder of a pretrained diffusion model.
        ValueError: A density or block out of range, or no such device.
    """
    source = _published(options.device) if options.model is None else load_source(options.model, options.device)
    config = distill_config(options, source, forget=(0,), mask={"kind": "saliency"})
    mask = config.mask
    distiller = MaskedDistiller(source.model, source.schedule, config)
    drawn = BlockMask.random(distiller.generator, mask.density, mask.block)
    chosen = distiller.use_mask(drawn, drawn if config.fake_score_mask else None)  # a saliency pass takes minutes
    counted = distiller.flops(options.max_train_steps)
    name = "DDPM UNet of CIFAR-10" if options.model is None else str(options.model)
    title = (
        f"{name}: random mask of density {chosen.density:.3g} ({mask.block}), {config.batch_size} retained and "
        f"{config.forget_samples} forgotten samples, preset {config.preset}"
    )
    setting = {
        "model": name,
        "density": chosen.density,
        "block": mask.block,
        "batch_size": config.batch_size,
        "forget_batch_size": config.forget_samples,
        "fake_score_mask": "same" if config.fake_score_mask else "dense",
        "preset": config.preset,
        "switches": {switch: getattr(config, switch) for switch in SWITCHES},
    }
    return {**setting, **counted}, f"{title}\n{describe(counted)}"


def _published(device: str) -> Source:
    model = DDPMUNet.cifar10().to(torch_device(device))
    return Source(model, NoiseSchedule.linear(), model.config["num_classes"], (3, 32, 32))
