"""A training that is interrupted and resumed is, bit for bit, one that never was."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from pecker_fast.data import ImageData
from pecker_fast.errors import FileFormatError, OutOfTimeError
from pecker_fast.models import DDPMUNet
from pecker_fast.pretrain import train_denoiser
from pecker_fast.pretrain_checkpoint import Checkpoints
from pecker_fast.schedule import NoiseSchedule

SCHEDULE, STEPS = NoiseSchedule.linear(100), 7


def data(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return ImageData(torch.rand(9, 1, 8, 8, generator=draw) * 2 - 1, torch.arange(9) % 2, ("a", "b"))


@pytest.fixture(scope="module")
def start():
    torch.manual_seed(0)
    network = {"channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), "image_size": 8}
    return DDPMUNet(width=4, channels=1, num_classes=2, dropout=0.3, norm_groups=2, **network)


def train(start, checkpoints=None, images=None, **changes):
    """Averaged weights, and those that trained."""
    model = copy.deepcopy(start)
    settings = {"steps": STEPS, "batch_size": 3, "class_dropout": 0.3, "warmup_steps": 2, "progress": False}
    average = train_denoiser(model, images or data(), SCHEDULE, **{**settings, **changes}, checkpoints=checkpoints)
    return average, model


def equal(a, b):
    return all(
        torch.equal(x, y)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module")
def whole(start):
    return train(start)


@pytest.fixture(scope="module")
def root(start, whole, tmp_path_factory):
    """Checkpoints of steps 4 and 6; writing them changes nothing."""
    folder = tmp_path_factory.mktemp("run")
    assert equal(train(start, Checkpoints(folder, every=2, total_limit=2, extra={"note": 1})), whole)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    return folder


@pytest.mark.parametrize("name", ["checkpoint-4", "latest"])
def test_resumed_is_uninterrupted(start, whole, root, name):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    checkpoints = Checkpoints(root, resume_from="latest" if name == "latest" else root / name)
    assert equal(train(start, checkpoints), whole)
    assert checkpoints.extra == {"note": 1} and checkpoints.seconds > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_is_resumed_to_the_bit_too_and_is_not_full(start, whole, tmp_path):
    half = {"autocast": torch.bfloat16}
    assert not equal(train(start, **half), whole)
    with pytest.raises(OutOfTimeError, match=r"1 of 7 steps done, 6 left; .*checkpoint-1 is complete"):
        train(start, Checkpoints(tmp_path, max_seconds=1e-9), **half)
    assert equal(train(start, Checkpoints(tmp_path, resume_from="latest"), **half), train(start, **half))


def test_what_ends_early_leaves_the_average_so_far(start, tmp_path):
    with pytest.raises(OutOfTimeError) as stopped:
        train(start, Checkpoints(tmp_path / "a", max_seconds=1e-9), warmup_steps=0)
    assert stopped.value.step == 1 and not stopped.value.model.training
    asked = iter([False, True])
    with pytest.raises(KeyboardInterrupt, match="2 of 7 steps done"):
        train(start, Checkpoints(tmp_path / "b", interrupted=lambda: next(asked)))
    assert (tmp_path / "b" / "checkpoint-2").is_dir()


def test_a_step_that_is_skipped_is_skipped_by_the_schedule(start):
    """Adam's first step moves weights by the learning rate: here of the last step, alone; half of it, warming up."""
    before = start.conv_in.weight.detach()
    for steps, warmup in ((4, 0), (4, 1), (100, 0)):
        last = train(start, steps=steps, first_step=steps - 1, learning_rate=0.1, warmup_steps=warmup)[1]
        expected = 0.1 * (1 + math.cos(math.pi * (steps - 1) / steps)) / 2 / (1 + warmup)
        assert float((last.conv_in.weight.detach() - before).abs().max()) == pytest.approx(expected, rel=1e-2)
    second = train(start, steps=4, first_step=2, learning_rate=0.1, warmup_steps=0)
    assert not equal(second, train(start, steps=4, learning_rate=0.1, warmup_steps=0))
    with pytest.raises(ValueError, match="first_step"):
        train(start, first_step=STEPS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 4}, "batch_size = 3, this training has 4"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"images": data(1)}, "data = "),
        ({"autocast": torch.bfloat16}, "autocast"),
    ],
)
def test_other_settings_are_refused(start, root, changes, message):
    with pytest.raises(ValueError, match=message):
        train(start, Checkpoints(root, resume_from="latest"), **changes)


def test_another_network_and_another_run_are_refused(start, root):
    other = DDPMUNet(**{**start.config, "width": 8})
    with pytest.raises(ValueError, match=r"this training has .*resume with the network"):
        train(other, Checkpoints(root, resume_from="latest"))
    with pytest.raises(FileFormatError, match="the last of step 6"):
        train(start, Checkpoints(root))
    with pytest.raises(FileFormatError, match="no finished checkpoint"):
        train(start, Checkpoints(root / "checkpoint-4", resume_from="latest"))
    with pytest.raises(ValueError, match="every"):
        Checkpoints(root, every=0)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_damage_is_found_before_anything_changes(start, root, tmp_path, name):
    import shutil

    folder = shutil.copytree(root / "checkpoint-4", tmp_path / "checkpoint-4")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=str(folder)):
        train(start, Checkpoints(tmp_path, resume_from="latest"))


def test_a_record_that_lacks_something_is_refused(start, root, tmp_path):
    import shutil

    from pecker_fast.manifest import write_manifest
    from pecker_fast.pretrain_checkpoint import KIND, VERSION

    folder = shutil.copytree(root / "checkpoint-4", tmp_path / "checkpoint-4")
    record = json.loads((folder / "state.json").read_text())
    del record["rates"]
    (folder / "state.json").write_text(json.dumps(record))
    (folder / "manifest.json").unlink()
    write_manifest(folder, KIND, VERSION)
    with pytest.raises(FileFormatError, match="incomplete: KeyError"):
        train(start, Checkpoints(tmp_path, resume_from="latest"))
