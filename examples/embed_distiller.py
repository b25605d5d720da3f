"""The distiller inside a training loop that owns data, devices and logging.

The loop below is somebody else's: it picks the device, brings the images that the mask is computed from, writes its own
log, keeps its own checkpoints, and stops when it likes. The distiller only gives it ``build_mask`` and ``step``.

Run it: python examples/embed_distiller.py [--max_train_steps 20] [--output_dir runs/embedded]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pecker_fast import DistillConfig, MaskConfig, MaskedDistiller, NoiseSchedule
from pecker_fast.models import DDPMUNet

FORGET, OVERRIDE = 3, 1


def their_images(device: torch.device, batches: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    """A data loader of the class to forget; here it makes up its images."""
    for seed in range(batches):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(16, 1, 8, 8, generator=generator) * 2 - 1
        yield images.to(device), torch.full((16,), FORGET, device=device)


def main(max_train_steps: int = 20, output_dir: Path = Path("runs/embedded")) -> list[dict[str, float]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = DDPMUNet.digits().to(device)  # theirs would be trained
    config = DistillConfig(
        forget=[FORGET],
        override=[OVERRIDE],
        num_classes=10,
        sample_shape=(1, 8, 8),
        batch_size=16,
        forget_batch_size=8,
        mask=MaskConfig(kind="saliency", density=0.1, block="row", accumulate="square"),
        generator_lr=5e-4,
        fake_score_lr=5e-4,
        warmup_steps=10,
        ema_decay=0.9,
    )
    distiller = MaskedDistiller(model, NoiseSchedule.linear(), config)
    mask = distiller.build_mask(their_images(device))
    print(mask)

    output_dir.mkdir(parents=True, exist_ok=True)
    log = []
    with (output_dir / "their_log.jsonl").open("w") as file:
        for step in range(1, max_train_steps + 1):
            started = time.perf_counter()
            losses = distiller.step()  # tensors: reading them is what waits for the device
            if step % 5 == 0:
                line = {"step": step, "ms": 1e3 * (time.perf_counter() - started)}
                line |= {name: value.item() for name, value in losses.items()}
                file.write(json.dumps(line) + "\n")
                log.append(line)
            if step == max_train_steps // 2:
                torch.save(distiller.state_dict(), output_dir / "their_checkpoint.pt")

    distiller.load_state_dict(torch.load(output_dir / "their_checkpoint.pt", weights_only=True))  # and they resume
    distiller.save(output_dir / "result", overwrite=True)
    print(f"{len(log)} lines in {output_dir / 'their_log.jsonl'}, the model in {output_dir / 'result' / 'model'}")
    return log


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/embedded"))
    arguments = parser.parse_args()
    main(arguments.max_train_steps, arguments.output_dir)
