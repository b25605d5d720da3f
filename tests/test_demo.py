"""The demonstration in its short form: everything is written, nothing is left behind, the cache is used."""

import json
import time

import numpy as np
import pytest
import torch

from pecker_fast import BlockMask, demo, digits_task, models
from pecker_fast.cli import main
from pecker_fast.errors import FileFormatError
from pecker_fast.written import NAME

RUN_KEYS = {
    "density", "steps", "images_seen", "seconds", "mask_seconds", "flops", "unlearning_accuracy",
    "unlearning_accuracy_ci95", "retain_accuracy", "frechet_distance", "steps_to_target", "worst_after_target",
    "trainable_parameters", "changed_parameters",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    config = demo.DemoConfig(forget=(3, 5), override=(8, 6), short=True, cache_dir=folder / "cache", progress=False)
    return folder, demo.run_demo(config, folder / "out")


def test_everything_is_written(finished):
    folder, metrics = finished
    out = folder / "out"
    assert {p.name for p in out.iterdir()} == {
        "report.html", "before_after.png", "curves.png", "saliency.png", "metrics.json", "mask.safetensors", "model",
        "distill_config.json", "delta", NAME,
    }  # fmt: skip
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["forget_class"] == [3, 5] and metrics["override_class"] == [8, 6]
    for name, run in metrics["runs"].items():
        assert set(run) >= RUN_KEYS, name
        assert 0 <= run["unlearning_accuracy_ci95"][0] <= run["unlearning_accuracy_ci95"][1] <= 1
        assert run["seconds"] > run["mask_seconds"] > 0 and run["flops"] > 0


def test_masks_do_what_they_say(finished):
    folder, metrics = finished
    mask = BlockMask.load(folder / "out" / "mask.safetensors")
    runs = metrics["runs"]
    assert runs["masked"]["trainable_parameters"] == mask.numel and mask.density <= 0.3
    assert runs["dense"]["density"] == 1.0
    for run in runs.values():
        assert 0 < run["changed_parameters"] <= run["trainable_parameters"]
    assert runs["random"]["flops"] < runs["dense"]["flops"]  # its mask costs nothing


def test_the_saved_model_is_the_teacher_off_the_mask(finished):
    folder, _ = finished
    teacher = digits_task.load_teacher(folder / "cache", progress=False, short=True)
    model = models.load(folder / "out" / "model")
    mask = BlockMask.load(folder / "out" / "mask.safetensors")
    for name, weight in teacher.state_dict().items():
        outside = ~mask.to_dense(name)
        assert torch.equal(model.state_dict()[name][outside], weight[outside]), name


def test_teacher_and_judge_come_from_the_cache_the_second_time(finished):
    folder, _ = finished
    started = time.perf_counter()
    digits_task.load_teacher(folder / "cache", progress=False, short=True)
    digits_task.load_judge(folder / "cache", progress=False, short=True)
    assert len(list((folder / "cache").iterdir())) == 2
    assert time.perf_counter() - started < 2  # training them takes far longer


def test_sampling_from_the_model_folder_alone(finished):
    folder, _ = finished
    arguments = ["sample", "--model", str(folder / "out" / "model"), "--class", "3", "--num", "5", "--seed", "1"]
    for name in ("a.npz", "b.npz"):
        assert main([*arguments, "--output", str(folder / name), "--quiet"]) == 0
    a, b = (np.load(folder / name, allow_pickle=False) for name in ("a.npz", "b.npz"))
    assert a["images"].shape == (5, 8, 8, 1) and a["images"].dtype == np.uint8
    assert a["labels"].tolist() == [3] * 5 and np.array_equal(a["images"], b["images"])


def test_an_unwritable_output_is_known_before_any_training(tmp_path):
    (tmp_path / "file").write_text("x")
    config = demo.DemoConfig(short=True, cache_dir=tmp_path / "cache", progress=False)
    with pytest.raises(FileFormatError, match="file"):
        demo.run_demo(config, tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_unknown_classes_and_densities_are_refused(tmp_path):
    for settings in ({"forget": (10,)}, {"forget": (-1,)}, {"density": 0.0}, {"forget": (3,), "override": (3,)}):
        with pytest.raises(ValueError):
            demo.run_demo(demo.DemoConfig(short=True, progress=False, **settings), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_default_override_is_the_next_retained_digit():
    assert demo.DemoConfig(forget=(3,)).distill_config("dense").override == (4,)
    assert demo.DemoConfig(forget=(8, 9)).distill_config("dense").override == (0, 0)


def test_the_target_is_the_first_time_both_accuracies_are_reached():
    point = {"unlearning_accuracy": 1.0, "retain_accuracy": 0.9, "frechet_distance": 9.0}
    curve = [{"step": 5, **point}, {"step": 10, **point, "retain_accuracy": 0.96, "frechet_distance": 3.0}]
    curve.append({"step": 15, **point, "unlearning_accuracy": 0.8, "retain_accuracy": 0.99, "frechet_distance": 4.0})
    assert demo._target(curve) == {
        "steps_to_target": 10,
        "worst_after_target": {"unlearning_accuracy": 0.8, "retain_accuracy": 0.96, "frechet_distance": 4.0},
    }
    assert demo._target(curve[:1])["steps_to_target"] is None
