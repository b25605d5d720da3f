"""A whole comparison, on a tiny model of made-up images."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pecker_fast import Baseline, MaskConfig, MaskedDistiller, NoiseSchedule, models
from pecker_fast.cli import main
from pecker_fast.commands import comparing
from pecker_fast.compare import diagnostics, figures, judging, one_run, tables, timing
from pecker_fast.compare import harness as harness_module
from pecker_fast.compare.contestants import get_ready, make
from pecker_fast.compare.harness import Harness
from pecker_fast.compare.judging import Panel
from pecker_fast.compare.methods import methods
from pecker_fast.compare.plan import Job, Plan
from pecker_fast.compare.store import RUNS
from pecker_fast.compare.task import Task
from pecker_fast.data import ImageData
from pecker_fast.data.npz import write_npz
from pecker_fast.memory_meter import peak_mib
from pecker_fast.models import DDPMUNet, DigitsClassifier

SCHEDULE = NoiseSchedule.linear(20)
FLOPS = MaskedDistiller.flops
NAMES = ("ring", "bar", "dot")


def images(count, seed):
    pixels = torch.rand(3 * count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return ImageData(pixels, torch.arange(3).repeat(count), NAMES)


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    shape = {"image_size": 8, "channels": 1, "num_classes": 3}
    unet = DDPMUNet(width=4, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), norm_groups=2, **shape)
    return Task(
        name="shapes",
        true_score=unet.eval(),
        schedule=SCHEDULE,
        judge=DigitsClassifier(width=4, num_classes=3, features=6).eval(),
        train=images(8, 0),
        held_out=images(4, 1),
        distillation={"batch_size": 4, "forget_batch_size": 2, "t_init": 10, "t_min": 2, "t_max": 18},
        diffusion={
            "batch_size": 4,
            "sampling_steps": 2,
            "fisher_samples": 1,
            "replay_samples": 2,
            "fisher_timesteps": 2,
        },
        rules={},
        distillation_lr=1e-3,
        diffusion_lr=1e-3,
        retrain_steps=2,
        retraining={"batch_size": 4},
    )


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timing, "ROUNDS", 1)
        patched.setattr(timing, "SETUPS", 1)
        patched.setattr(timing, "peak_mib", lambda *_: 1.0)
        for kind in (MaskedDistiller, Baseline):
            patched.setattr(kind, "flops", lambda self: {"total": 7, "mask": {"total": 0}})
        patched.setattr(judging, "RELEARN_STEPS", 1)
        patched.setattr(judging, "START_SHARES", (1.5,))
        patched.setattr(one_run, "GLANCES", {"one_step": 2, "ddim": 1})
        yield


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(figures, "write", lambda *_: {})  # ``finished`` is made before, with its pictures


def plan(**changes):
    given = {"methods": ("sfd", "pecker", "salun", "retrain"), "forget": (1,), "seeds": (0,), "tuning_forget": (0,)}
    return Plan(**{**given, "tuning_seeds": (9,), "factors": (1.0,), "steps": 2, "samples": 4, **changes})


def harness(task, **changes):
    return Harness(lambda: task, dict(methods()), plan(**changes), progress=False, diagnose=True)


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    before = {name: weight.clone() for name, weight in task.true_score.state_dict().items()}
    results = harness(task).run(folder)
    assert all(torch.equal(weight, before[name]) for name, weight in task.true_score.state_dict().items())
    return folder, results


def test_everything_is_written_and_judged(finished):
    folder, results = finished
    names = {
        "compare.json",
        "runs.jsonl",
        "table.md",
        "quality.png",
        "curves.png",
        "samples.png",
        "samples",
        "report.html",
    }
    assert {path.name for path in folder.iterdir()} == names
    for name in ("sfd", "pecker", "salun", "retrain"):
        (line,) = results.of(name)
        assert {"equal_steps", "attacks", *line["marks"]} <= line.keys() and "failed" not in line
        assert ("equal_seconds" in line["marks"]) <= (name != "retrain")
        assert {"inception_score", "precision", "recall", "density", "coverage", "entropy"} <= line[
            "equal_steps"
        ].keys()
        assert line["attacks"]["probes"][0]["probe"] == "published"
        assert line["curve"][-1]["step"] == max(line["marks"].values())
        assert ("diagnostics" in line) == (name in ("sfd", "pecker"))
    page = (folder / "report.html").read_text()
    assert "Does the mask help?" in page and "data:image/png;base64" in page and "http://" not in page


def test_the_same_again_does_nothing_and_a_killed_run_is_the_run(finished, task, tmp_path):
    folder, _ = finished
    lines = (folder / RUNS).read_bytes()
    harness(task).run(folder)
    assert (folder / RUNS).read_bytes() == lines
    for name in ("compare.json", RUNS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    *_, salun, _ = lines.decode().splitlines(keepends=True)
    assert json.loads(salun)["method"] == "salun"
    (tmp_path / RUNS).write_text(lines.decode().replace(salun, ""))
    harness(task).run(tmp_path)
    again = json.loads((tmp_path / RUNS).read_text().splitlines()[-1])
    assert {**again, "seconds": 0} == {**json.loads(salun), "seconds": 0}


def test_more_methods_and_seeds_may_come_later_and_nothing_else(finished, task, tmp_path):
    folder, _ = finished
    for name in ("compare.json", RUNS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    count = len((folder / RUNS).read_text().splitlines())
    results = harness(task, methods=("pecker", "random"), seeds=(0, 1)).run(tmp_path)
    assert len(results.of("pecker")) == len(results.of("random")) == 2 and not results.of("salun")
    new = [json.loads(line) for line in (tmp_path / RUNS).read_text().splitlines()][count:]
    assert [(line["phase"], line["method"], line.get("seed")) for line in new] == [
        ("timing", "random", None), ("reported", "random", 0), ("reported", "pecker", 1), ("reported", "random", 1),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="holds a comparison with steps = 2, asked for is 3"):
        harness(task, steps=3).run(tmp_path)


def test_rates_are_tuned_before_anything_is_reported(task, tmp_path):
    results = harness(task, methods=("sfd",), factors=(0.5, 2.0)).run(tmp_path)
    tried = [line for line in results.lines if line["phase"] == "tuning"]
    assert [(line["factor"], line["forget"], line["seed"]) for line in tried] == [(0.5, [0], 9), (2.0, [0], 9)]
    assert all(set(line["marks"]) == {"equal_seconds"} and not line["curve"] for line in tried)
    assert results.of("sfd")[0]["factor"] in (0.5, 2.0)


def test_an_interrupted_comparison_says_what_is_kept_and_shows_it(task, tmp_path, monkeypatch):
    asked = harness(task, methods=("sfd", "random"))
    finished, one = [], harness_module._one

    def until_the_second(*given):
        if finished:
            raise KeyboardInterrupt
        finished.append(one(*given))
        return finished[0]

    monkeypatch.setattr(harness_module, "_one", until_the_second)
    with pytest.raises(KeyboardInterrupt, match="4 lines are kept in .*; the same command goes on"):
        asked.run(tmp_path)
    assert (tmp_path / "report.html").exists()
    monkeypatch.setattr(harness_module, "_one", one)
    assert len(asked.run(tmp_path).of("random")) == 1


def test_a_run_that_diverges_is_a_result(task, tmp_path):
    wild = dataclasses.replace(task, distillation_lr=1e30, distillation={**task.distillation, "warmup_steps": 0})
    results = harness(wild, methods=("sfd",), steps=4).run(tmp_path)
    assert "generator_loss is nan; lower the learning rates" in results.of("sfd")[0]["failed"]
    assert tables.quality(results, "equal_steps").rows[1][0] == "sfd (1 of 1 diverged)"


# -- known answers ---------------------------------------------------------------------------------


class Perfect:
    """Draws the training images, as many of each class as are asked for."""

    device = torch.device("cpu")

    def __init__(self, data):
        self.data = data

    def sample(self, labels, *, seed):
        order = [self.data.images[self.data.labels == label] for label in range(3)]
        return torch.cat([order[label][: int((labels == label).sum())] for label in range(3)])


def test_a_model_that_draws_the_real_images_is_as_near_as_can_be(task):
    verdict = Panel(task, (1,), 8, 0).verdict(Perfect(task.train))
    assert verdict["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert verdict["precision"] == verdict["recall"] == verdict["coverage"] == 1
    with torch.no_grad():
        seen = task.judge(task.train.images).argmax(1)
    forgotten = task.train.labels == 1
    assert verdict["unlearning_accuracy"] == pytest.approx(float((seen[forgotten] != 1).float().mean()))
    assert verdict["retain_accuracy"] == pytest.approx(float((seen == task.train.labels)[~forgotten].float().mean()))


def test_two_classes_are_forgotten_together(task):
    verdict = Panel(task, (0, 1), 8, 0).verdict(Perfect(task.train))
    with torch.no_grad():
        seen = task.judge(task.train.images[task.train.labels < 2]).argmax(1)
    assert verdict["unlearning_accuracy"] == pytest.approx(float((seen == 2).float().mean()))


def test_a_race_measures_what_a_step_takes(task, monkeypatch):
    monkeypatch.setattr(timing, "peak_mib", peak_mib)
    monkeypatch.setattr(MaskedDistiller, "flops", FLOPS)
    job = Job("reported", "pecker", 1.0, (1,), 0)
    (line,) = timing.race({"pecker": lambda: make(methods()["pecker"], task, job)}, progress=False)
    assert line["step_seconds"] > 0 and line["setup_seconds"] > 0 and line["trained"] < line["parameters"]
    assert min(line["flops"].values()) > 0
    weights = 4 * line["parameters"] / 2**20
    assert 3 * weights < line["peak_mib"] < 100 * weights  # three networks at least


def test_memory_is_what_is_held_and_what_comes_on_top():
    held = torch.zeros(1024, 256)

    def step():
        first = held + 1  # 1 MiB
        second = first.clone()  # 2
        del first
        third = second.double()  # 1 + 2
        return third.view(-1)[:1].clone()

    assert peak_mib(step, [held, held.view(-1)], torch.device("cpu")) == pytest.approx(4, abs=0.01)


def test_gradients_under_a_dense_mask_are_all_of_them(task):
    dense = make(methods()["sfd"], task, Job("reported", "sfd", 1.0, (1,), 0))
    get_ready(dense)
    dense.step()  # until the fake score has left the true score, nothing pulls on retained classes
    weights = {name: weight.clone() for name, weight in dense.generator.state_dict().items()}
    found = diagnostics.gradients(dense, batches=2)
    assert found["mass_forget"] == found["mass_retain"] == 1
    assert found["cosine"] == pytest.approx(found["cosine_active"]) and -1 <= found["cosine"] <= 1
    assert all(torch.equal(weight, weights[name]) for name, weight in dense.generator.state_dict().items())
    with pytest.raises(ValueError, match="at least 2 batches"):
        diagnostics.gradients(dense, batches=1)


def test_the_signal_of_a_gradient_is_the_share_that_batches_agree_on():
    ones, signs = torch.ones(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert diagnostics._mean_and_signal([ones, ones, ones])[1] == pytest.approx(1)
    assert diagnostics._mean_and_signal([ones, -ones])[1] == -1  # unbiased, so not clipped
    mean, signal = diagnostics._mean_and_signal([ones, signs])  # at right angles
    assert torch.equal(mean, (ones + signs) / 2) and signal == 0


def test_overrides_are_the_next_retained_classes(task):
    assert task.overrides((0,)) == (1,) and task.overrides((2,)) == (0,) and task.overrides((0, 1)) == (2, 2)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_takes_folders(task, tmp_path, capsys):
    generation = {"kind": "ddim", "steps": 2, "schedule": SCHEDULE.to_dict(), "sample_shape": [1, 8, 8]}
    models.save(task.true_score, tmp_path / "teacher", generation)
    models.save(task.judge, tmp_path / "judge")
    (tmp_path / "data").mkdir()
    for name, data in (("train", task.train), ("test", task.held_out)):
        write_npz(data, tmp_path / "data" / f"{name}.npz")
    places = {"pretrained_model_name_or_path": "teacher", "judge": "judge", "train_data_dir": "data"}
    flags = [part for name, place in places.items() for part in (f"--{name}", str(tmp_path / place))]
    flags += "--t_init 10 --t_min 2 --t_max 18 --train_batch_size 4 --forget_batch_size 2 --retrain_steps 2".split()
    flags += (
        "--methods sfd random --max_train_steps 1 --num 4 --seeds 0 --learning_rate_factors 1 --forget_class 1".split()
    )
    out = ["--output_dir", str(tmp_path / "out"), "--quiet", "--device", "cpu", "--json"]
    assert main(["compare", *flags, *out, "--dry_run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["settings"]["runs"] == {"tuning": 0, "reported": 2} and not (tmp_path / "out").exists()
    assert main(["compare", *flags, *out]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 2
    settings = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert settings["task"] == "data" and settings["distillation"]["batch_size"] == 4
    assert {name: part["images"] for name, part in settings["images"].items()} == {"train": 24, "held_out": 12}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--methods", "pecker", "magic"], "--methods: unknown method 'magic'; expected all, or some of sfd, pecker"),
        (["--judge", "judge"], "--pretrained_model_name_or_path: another task than the digits needs"),
        (["--sid_alpha", "1"], "--sid_alpha: the digits have settings of their own"),
        (["--seeds", "0", "100"], "tuning_seeds: 100 is reported too"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message, capsys):
    assert main(["compare", *flags, "--dry_run"]) == 2
    assert message in capsys.readouterr().err


def test_half_of_a_task_is_refused_before_anything_is_read():
    given = dict.fromkeys((*comparing._FOLDERS, *comparing._DISTILLATION), None)
    with pytest.raises(ValueError, match="--judge: another task"):
        comparing.check_flags(SimpleNamespace(**given | {"train_data_dir": "a", "pretrained_model_name_or_path": "b"}))


def test_every_method_can_be_made(task):
    for method in methods(density=0.3).values():
        contestant = make(method, task, Job("reported", method.name, 1.0, (1,), 0))
        assert isinstance(method.mask, MaskConfig) and isinstance(contestant.generation, dict)
        assert method.needs and isinstance(task.judge, nn.Module)
