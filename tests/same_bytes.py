"""One run that writes of everything a little into the folder it is given: for `test_same_bytes`."""

import os
import sys
from pathlib import Path

import torch

from pecker_fast import BlockMask, models
from pecker_fast.cli import main
from pecker_fast.commands.files import write_images
from pecker_fast.data import load_digits, write_npz
from pecker_fast.delta import Delta
from pecker_fast.models import DDPMUNet
from pecker_fast.schedule import NoiseSchedule

GENERATION = {"kind": "ddim", "steps": 2, "schedule": NoiseSchedule.linear(1000).to_dict(), "sample_shape": [1, 8, 8]}


def _model() -> DDPMUNet:
    torch.manual_seed(0)
    return DDPMUNet(
        width=8, channel_mult=(1,), attention_resolutions=(), norm_groups=4, image_size=8, channels=1, dropout=0.5
    )


def _write(folder: Path) -> None:
    model = _model()
    mask = BlockMask.random(model, density=0.3, block="row", seed=1)
    mask.save(folder / "mask.safetensors")
    models.save(model, folder / "teacher", GENERATION)
    models.save(model, folder / "shards", GENERATION, max_shard_size=60_000)
    active = {name: parameter.to_dense() for name, parameter in mask.parameters.items()}
    changed = {name: weight + active.get(name, 0) for name, weight in model.state_dict().items()}
    delta = Delta.extract(model.state_dict(), changed, mask, name="shift", metadata={"z": 1, "a": 2})
    delta.save(folder / "delta")
    delta.apply(model)
    models.save(model, folder / "edited", GENERATION)  # with its ledger
    images, labels = torch.zeros(3, 1, 8, 8), torch.arange(3)
    for name in ("x.npz", "x.png"):
        write_images(folder / name, images, labels, 2)
    write_npz(load_digits().subset(torch.arange(20)), folder / "digits.npz")
    unlearn = "unlearn --pretrained_model_name_or_path teacher --forget_class 3 --output_dir out"
    unlearn += " --max_train_steps 2 --checkpointing_steps 1 --train_batch_size 4 --device cpu --quiet"
    os.chdir(folder)
    assert main(unlearn.split()) == 0


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
