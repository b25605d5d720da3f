"""Checkpoints of a distiller: resumed equals uninterrupted to the bit, and what does not fit changes nothing."""

import json
import signal

import pytest
import torch
from safetensors import safe_open
from test_distiller import SCHEDULE, BatchNormed, config, unet
from torch import nn

from pecker_fast import BlockMask, MaskedDistiller, NoiseSchedule
from pecker_fast.checkpoint import read_safetensors, write_json
from pecker_fast.commands.resuming import stop_after_step
from pecker_fast.errors import FileFormatError
from pecker_fast.manifest import check_manifest, write_manifest


class Mixed(BatchNormed):
    """Statistics that change in training, a layer that cannot be masked, and dropout."""

    def __init__(self):
        super().__init__()
        self.upsample, self.dropout = nn.ConvTranspose2d(1, 1, 3, padding=1), nn.Dropout(0.3)

    def forward(self, x_t, t, condition):
        return self.upsample(self.dropout(super().forward(x_t, t, condition)))


def mixed():
    torch.manual_seed(0)
    return Mixed()


def trained(make=unet, steps=0, use=None, **settings):
    distiller = MaskedDistiller(make(), SCHEDULE, config(**settings))
    if use is not None:
        distiller.use_mask(use)
    torch.manual_seed(7)  # where dropout draws from
    for _ in range(steps):
        distiller.step()
    return distiller


def everything(distiller):
    """All that training changes."""
    found = {"steps": torch.tensor(distiller.steps_done), "rng": distiller.draws.rng.get_state()}
    for name in ("generator", "fake_score"):
        network, optimizer = getattr(distiller, name), getattr(distiller, f"{name}_optimizer", None)
        found |= {f"{name}.{key}": tensor.clone() for key, tensor in network.state_dict().items()}
        if optimizer is not None and optimizer.state:
            state = optimizer.state[optimizer.param_groups[0]["params"][0]]
            found |= {f"{name} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
            found[f"{name} values"] = optimizer.active.values.clone()
    if distiller.mask is not None and distiller.active.ema is not None:
        found["ema"] = distiller.active.ema.clone()
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (unet, {"mask": {"kind": "saliency"}}),
        (lambda: unet().to(memory_format=torch.channels_last), {"mask": {"block": (4, 4)}, "betas": (0.5, 0.9)}),
        (lambda: unet().bfloat16(), {"mask": {"block": "element"}, "ema_decay": 0.5}),
        (lambda: unet().double(), {"mask": {"kind": "dense"}, "warmup_steps": 5}),
        (mixed, {"mask": {"block": "element"}}),
    ],
    ids=["saliency", "tiles", "bfloat16", "float64", "batch norm"],
)
def test_resumed_equals_uninterrupted(make, settings, tmp_path):
    whole = trained(make, 4, **settings)
    half = trained(make, 2, **settings)
    folder = half.save_checkpoint(tmp_path)
    assert folder == tmp_path / "checkpoint-2"
    torch.manual_seed(99)  # a new process is somewhere else
    resumed = MaskedDistiller(make(), SCHEDULE, config(**settings))
    assert resumed.load_checkpoint("latest", tmp_path).step == resumed.steps_done == 2
    assert resumed.mask == half.mask
    for _ in range(2):
        resumed.step()
    assert_same(everything(resumed), everything(whole))
    saved = []
    for name, distiller in {"whole": whole, "resumed": resumed}.items():
        distiller.save(tmp_path / name)
        saved.append(read_safetensors(next((tmp_path / name / "model").glob("*.safetensors")))[0])
    assert_same(*saved)


def test_without_the_global_random_state_dropout_would_differ(tmp_path):
    """The control: what the test above rests on."""
    folder = trained(steps=2).save_checkpoint(tmp_path)
    runs = []
    for seed in (None, 1):
        resumed = trained()
        resumed.load_checkpoint(folder)
        if seed is not None:
            torch.manual_seed(seed)
        resumed.step()
        runs.append(resumed.active.values.clone())
    assert not torch.equal(*runs)


@pytest.mark.gpu
def test_random_states_of_a_gpu_come_back(tmp_path):
    distiller = trained(lambda: unet().cuda(), 2)
    folder, before = distiller.save_checkpoint(tmp_path), everything(distiller)
    expected = torch.rand(4, device="cuda"), torch.rand(4), distiller.draws.noise(2)
    torch.manual_seed(99)
    resumed = trained(lambda: unet().cuda())
    resumed.load_checkpoint(folder)
    assert_same(everything(resumed), before)
    found = torch.rand(4, device="cuda"), torch.rand(4), resumed.draws.noise(2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    refused(trained(), ValueError, "another|same kind of device", folder)
    resumed.step()


def test_a_distiller_that_has_trained_on_goes_back(tmp_path):
    distiller = trained()
    distiller.build_mask()
    start, folder = everything(distiller), distiller.save_checkpoint(tmp_path)  # before there is any state
    distiller.step()
    first, later = everything(distiller), distiller.save_checkpoint(tmp_path, extra={"notes": [1, "two"]})
    distiller.step()
    assert distiller.load_checkpoint(later).extra == {"notes": [1, "two"]}
    assert_same(everything(distiller), first)
    distiller.load_checkpoint(folder)
    assert_same(everything(distiller), start)
    assert distiller.active.ema is None
    torch.manual_seed(7)
    distiller.step()
    assert distiller.steps_done == 1 and distiller.active.ema is not None


def test_only_what_is_needed_is_saved(tmp_path):
    distiller = trained(mixed, 1)
    folder = distiller.save_checkpoint(tmp_path)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    with safe_open(folder / "state.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.get_slice("generator.values").get_shape() == [distiller.mask.numel]
        whole = sum(p.numel() for p in distiller.true_score.parameters())
        assert file.get_slice("fake_score.values").get_shape() == [whole]
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    networks = {f"{n}.buffers.{s}" for n in ("generator", "fake_score") for s in statistics}
    flat = {"generator.values", "fake_score.values", "generator.optimizer.exp_avg_sq", "generator.optimizer.ema"}
    assert names == networks | flat | {"fake_score.optimizer.exp_avg_sq", "random.draws", "random.cpu"}


def refused(distiller, error, match, *where):
    """The call is refused with this message, and nothing is changed."""
    before, mask, state = everything(distiller), distiller.mask, torch.get_rng_state()
    with pytest.raises(error, match=match):
        distiller.load_checkpoint(*where)
    assert_same(everything(distiller), before)
    assert distiller.mask is mask and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"generator_lr": 2e-3}, r"config.generator_lr = 0.001, this distiller has 0.002"),
        ({"mask": {"density": 0.2}}, r"config.mask.density = 0.3, this distiller has 0.2"),
        ({"forget": (3,)}, r"config.forget = \[2\], this distiller has \[3\]"),
        ({"clip_value": None}, r"config.clip_value = 1.0, this distiller has None"),
    ],
)
def test_other_settings_are_refused_by_name(settings, match, tmp_path):
    folder = trained(steps=1).save_checkpoint(tmp_path)
    refused(trained(**settings), ValueError, match, folder)
    refused(trained(steps=1, **settings), ValueError, match, folder)


def test_another_schedule_is_refused(tmp_path):
    folder = trained(steps=1).save_checkpoint(tmp_path)
    other = MaskedDistiller(unet(), NoiseSchedule.linear(beta_end=0.03), config())
    refused(other, ValueError, r"schedule\.beta_end = 0.02, this distiller has 0.03", folder)


def other_weight():
    network = unet()
    with torch.no_grad():
        network.conv_in.weight[0, 0, 0, 0] += 1e-6
    return network


def test_another_base_model_is_refused(tmp_path):
    folder = trained(steps=1).save_checkpoint(tmp_path)
    refused(trained(other_weight), ValueError, "another true score: its weights have fingerprint [0-9a-f]{16}", folder)
    inactive = next(iter((~trained(steps=1).mask.to_dense("conv_in.weight")).nonzero()))
    start = unet()
    with torch.no_grad():
        start.conv_in.weight[tuple(inactive)] += 1
    given = MaskedDistiller(unet(), SCHEDULE, config(), generator=start)
    refused(given, ValueError, "another generator: its weights have fingerprint", folder)


def test_another_mask_dtype_or_memory_order_is_refused(tmp_path):
    folder = trained(steps=1).save_checkpoint(tmp_path)
    other = trained(steps=1, use=BlockMask.random(unet(), 0.3, "row", seed=5))
    refused(other, ValueError, "another mask than the one in use", folder)
    channels_last = trained(lambda: unet().to(memory_format=torch.channels_last))
    refused(channels_last, ValueError, r"conv.*weight was float32 .*, here it is float32 .* channels-last", folder)
    refused(trained(lambda: unet().bfloat16()), ValueError, "another true score", folder)


def test_random_states_of_another_device_are_refused(tmp_path, monkeypatch):
    folder = trained(steps=1).save_checkpoint(tmp_path)
    distiller = trained()
    states = {"random.draws": torch.zeros(16, dtype=torch.uint8), "random.cpu": torch.get_rng_state()}
    monkeypatch.setattr("pecker_fast.distill_checkpoint.random_states", lambda _: states)
    refused(distiller, ValueError, "1 processes on device cpu take .* same kind of device", folder)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "generator_mask.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "truncated", "missing"])
def test_damage_is_found_in_every_file(name, damage, tmp_path):
    folder = trained(steps=1).save_checkpoint(tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data if damage == "bit" else data[:-9])
    if damage == "missing":
        (folder / name).unlink()
    refused(trained(), FileFormatError, str(folder), folder)


def test_what_is_unfinished_or_none_is_refused(tmp_path):
    distiller = trained(steps=1)
    refused(distiller, FileFormatError, "nowhere: no such folder", tmp_path / "nowhere")
    refused(distiller, FileFormatError, "has no finished checkpoint", "latest", tmp_path)
    refused(distiller, FileFormatError, "has no finished checkpoint", "latest", tmp_path / "nowhere")
    refused(distiller, ValueError, "expected root=", "latest")
    (tmp_path / "checkpoint-7").mkdir()
    refused(distiller, FileFormatError, "is unfinished or was copied in part", "checkpoint-7", tmp_path)
    write_json(tmp_path / "checkpoint-7" / "state.json", {})
    write_manifest(tmp_path / "checkpoint-7", "another program", 1)
    refused(distiller, FileFormatError, "got 'another program' version 1", tmp_path / "checkpoint-7")
    distiller.save_checkpoint(tmp_path)
    assert distiller.load_checkpoint("latest", tmp_path).step == 1  # the others are passed over


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    """Whoever writes a manifest of their own cannot get half of a state in."""
    folder = trained(steps=1).save_checkpoint(tmp_path)
    kind, version = (json.loads((folder / "manifest.json").read_text())[key] for key in ("format", "version"))
    record = json.loads((folder / "state.json").read_text())

    def rewrite(values):
        write_json(folder / "state.json", values)
        (folder / "manifest.json").unlink()
        write_manifest(folder, kind, version)
        check_manifest(folder, kind, version)

    rewrite({key: value for key, value in record.items() if key != "step"})
    refused(trained(), FileFormatError, "incomplete: KeyError", folder)
    rewrite(record)
    mask = BlockMask.random(unet(), 0.3, "row", seed=5)
    BlockMask(mask.parameters, mask.total, 0.3).save(folder / "generator_mask.safetensors")
    rewrite(record)
    refused(trained(), ValueError, "another generator|values is float32", folder)


def test_the_oldest_are_removed(tmp_path):
    distiller = trained()
    (tmp_path / "checkpoint-1").mkdir()  # somebody else's
    (tmp_path / "checkpoint-1" / "theirs").write_text("x")
    for _ in range(4):
        distiller.step()
        if distiller.steps_done > 1:
            distiller.save_checkpoint(tmp_path, total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    distiller.load_checkpoint("checkpoint-3", tmp_path)
    distiller.save_checkpoint(tmp_path, total_limit=1)  # never the one that was just written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    assert distiller.load_checkpoint("latest", tmp_path).step == 3


def test_saving_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(RuntimeError, match=r"call build_mask\(\) or step\(\) first"):
        trained().save_checkpoint(tmp_path)
    distiller = trained(steps=1)
    with pytest.raises(ValueError, match="total_limit: expected a positive number"):
        distiller.save_checkpoint(tmp_path, total_limit=0)
    with pytest.raises(ValueError, match="JSON"):
        distiller.save_checkpoint(tmp_path, extra={"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_second_signal_does_not_wait():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_after_step() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGTERM)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_mask_of_the_fake_score_comes_back(tmp_path):
    from test_distiller import SCHEDULE, config, unet

    settings = {"fake_score_mask": {"kind": "random", "density": 0.2, "block": "row"}, "reuse_generator_forward": True}
    whole, resumed = (MaskedDistiller(unet(dropout=0.0), SCHEDULE, config(**settings)) for _ in range(2))
    whole.step()
    whole.save_checkpoint(tmp_path)
    resumed.load_checkpoint("latest", tmp_path)
    assert resumed.fake_score_mask == whole.fake_score_mask and resumed.fake_score_mask.density < 0.3
    for distiller in (whole, resumed):
        distiller.step()
    for name, weight in whole.fake_score.state_dict().items():
        assert torch.equal(weight, resumed.fake_score.state_dict()[name]), name
