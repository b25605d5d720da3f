"""The command line: what it writes, what it says, and how it ends."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pecker_fast import BlockMask, NoiseSchedule, models, saliency
from pecker_fast.cli import main
from pecker_fast.models import DDPMUNet, DigitsClassifier
from pecker_fast.written import NAME

MAKING = ("demo", "pretrain", "judge", "mask", "distill", "unlearn")
COMMANDS = (*MAKING, "sample", "evaluate", "compare", "delta", "convert", "doctor")
DDIM = {"kind": "ddim", "steps": 2, "schedule": NoiseSchedule.linear().to_dict(), "sample_shape": [1, 8, 8]}
QUICK = (
    "--max_train_steps",
    "2",
    "--train_batch_size",
    "4",
    "--forget_batch_size",
    "4",
    "--t_init",
    "500",
    "--mask_batches",
    "2",
)


@pytest.fixture(autouse=True)
def _one_thread(_same_start_for_every_test):
    """Networks this small only wait for a second thread, and long on a busy machine."""
    torch.set_num_threads(1)


def _tiny(**changes):
    torch.manual_seed(0)
    arguments = {"width": 4, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
    return DDPMUNet(**{**arguments, "image_size": 8, "channels": 1, "norm_groups": 2, **changes})


@pytest.fixture
def teacher(tmp_path):
    folder = tmp_path / "teacher"
    models.save(_tiny(), folder, DDIM)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, teacher):
    """An empty working folder with a teacher beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def _source(teacher):
    return ("--pretrained_model_name_or_path", str(teacher), "--forget_class", "3")


@pytest.fixture
def untrained_judge(monkeypatch):
    """A judge that knows nothing, in no time."""
    judge = DigitsClassifier(width=4).eval()
    monkeypatch.setattr("pecker_fast.digits_task.load_judge", lambda *_, **__: judge)


def _unlearn(teacher, *more):
    return main(["unlearn", "--pretrained_model_name_or_path", str(teacher), "--forget_class", "3", *QUICK, *more])


def _damage(folder, name, text):
    (folder / name).write_text(text)


def _error(capsys, command):
    """The one line that a command ended with."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"pecker-fast {command}: error: ")
    assert "Traceback" not in captured.err
    return lines[0]


# -- what works ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"example:\n  pecker-fast {command}" in capsys.readouterr().out


def test_from_training_to_images(here, capsys, untrained_judge):
    """pretrain, mask, unlearn, sample, evaluate, each with --json."""

    def run(*arguments):
        assert main([*arguments, "--json", "--quiet"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return json.loads(captured.out)

    small = (
        "--max_train_steps",
        "2",
        "--train_batch_size",
        "4",
        "--width",
        "4",
        "--num_inference_steps",
        "2",
    )
    assert run("pretrain", *small, "--output_dir", "teacher")["images"] == 1797
    source = _source("teacher")
    density = ("--mask_density", "0.25", "--block", "row", "--forget_batch_size", "4", "--mask_batches", "2")
    chosen = run("mask", *source, *density)
    assert BlockMask.load("mask.safetensors").density == chosen["density"] <= 0.25
    options = ("--mask-path=mask.safetensors", "--override-class", "8", "--output-dir", "out")
    result = run("unlearn", *source, *QUICK, *options)
    assert result["trainable_parameters"] == chosen["active"]
    written = {path.name for path in (here / "out").iterdir()}
    assert written == {
        "model",
        "delta",
        "mask.safetensors",
        "distill_config.json",
        "metrics.jsonl",
        "config.yaml",
        NAME,
    }
    steps = [json.loads(line) for line in (here / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    run("sample", "--model", "out/model", "--class", *map(str, range(10)), "--num", "9", "--output", "x.npz")
    judged = run("evaluate", "--images", "x.npz", "--forget_class", "3")
    assert judged["images"] == 90
    again = run("evaluate", "--model", "out/model", "--forget_class", "3", "--num", "9")  # the same noise
    assert again["retain_accuracy"] == pytest.approx(judged["retain_accuracy"], abs=0.02)
    assert again["frechet_distance"] == pytest.approx(judged["frechet_distance"], rel=0.01)


@pytest.mark.parametrize("kind", ["saliency", "random", "dense"])
def test_every_kind_of_mask_unlearns(kind, here, teacher, capsys):
    block = ("--mask", kind, "--block", "4x4", "--mask_density", "0.5", "--mask_lr_scale", "mass")
    assert _unlearn(teacher, *block, "--output_dir", "out", "--quiet") == 0
    assert capsys.readouterr().out == ""
    density = BlockMask.load("out/mask.safetensors").density
    assert density == 1 if kind == "dense" else density <= 0.5
    assert models.load_config("out/model")["generation"]["kind"] == "one_step"


def test_unlearn_replaces_an_older_result_and_keeps_other_files(here, teacher):
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    assert _unlearn(teacher, "--output_dir", "out", "--quiet") == 0
    assert (here / "out" / "notes.txt").read_text() == "mine"
    assert list(here.iterdir()) == [here / "out"]


def test_mask_and_pretrain_from_given_images(here, teacher, capsys):
    for label in range(10):
        (here / "images" / str(label)).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 25 * label, np.uint8)).save(here / f"images/{label}/0.png")
    data = ("--train_data_dir", "images", "--json", "--quiet")
    assert main(["mask", *_source(teacher), "5", "--forget_batch_size", "4", *data]) == 0
    size = ("--resolution", "8", "--channels", "1", "--max_train_steps", "1", "--width", "4")
    assert main(["pretrain", *size, *data, "--output_dir", "new"]) == 0
    capsys.readouterr()
    assert main(["pretrain", *size[2:], *data, "--output_dir", "newer"]) == 0  # the images say how large they are
    assert models.load_config("newer") == models.load_config("new")
    capsys.readouterr()
    assert main(["pretrain", "--resolution", "5", *data, "--output_dir", "newest"]) == 2
    assert "must be one of 8, 4" in _error(capsys, "pretrain")


def test_samples_depend_on_the_seed_alone(here, teacher):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        arguments = ["--model", str(teacher), "--class", "3", "--num", "5", "--seed", seed]
        assert main(["sample", *arguments, "--output", f"{name}.npz", "--quiet"]) == 0
    a, b, c = (np.load(f"{name}.npz", allow_pickle=False) for name in "abc")
    assert a["images"].dtype == np.uint8
    assert a["images"].shape == (5, 8, 8, 1)
    assert a["labels"].dtype == np.int64
    assert a["labels"].tolist() == [3] * 5
    assert (a["images"] == b["images"]).all()
    assert (a["images"] != c["images"]).any()


def test_sample_draws_a_grid(here, teacher):
    arguments = ["--model", str(teacher), "--class", "3", "4", "--num", "5", "--output", "new/x.png"]
    assert main(["sample", *arguments, "--quiet"]) == 0
    with Image.open("new/x.png") as image:
        assert image.format == "PNG"
        assert image.size == (4 * (5 * 9 - 1), 4 * (2 * 9 - 1))


def test_sample_works_without_the_distiller(here, teacher):
    """In a process of its own, where the distiller's code cannot run: a stub stands in its place."""
    code = (
        "import sys, types\n"
        "stub = sys.modules['pecker_fast.distiller'] = types.ModuleType('pecker_fast.distiller')\n"
        "stub.MaskedDistiller = None\n"
        "from pecker_fast.cli import main\n"
        f"code = main('sample --class 3 --num 2 --output x.npz --model'.split() + [{str(teacher)!r}])\n"
        "assert sys.modules['pecker_fast.distiller'] is stub\n"
        "assert 'pecker_fast.demo' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert np.load("x.npz")["images"].shape == (2, 8, 8, 1)


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["versions"]["torch"] == torch.__version__
    assert values["backends"]["masked_adamw_"]["cpu"]["used"] in ("cpu", "reference")
    assert main(["doctor"]) == 0
    assert "masked_adamw_" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        "demo --forget_class 3 5 --override_class 8 6 --cache_dir cache",
        "pretrain --output_dir out",
        "mask --pretrained_model_name_or_path ../teacher --forget_class 3",
        "unlearn --pretrained_model_name_or_path ../teacher --forget_class 3 --output_dir out",
        "sample --model ../teacher --class 3 --output x.npz",
        "evaluate --model ../teacher --forget_class 3 --cache_dir cache",
    ],
)
def test_dry_run_writes_nothing(arguments, here, capsys):
    assert main([*arguments.split(), "--dry-run", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["dry_run"] is True
    assert values["settings"]
    assert values["would_write"]
    assert main([*arguments.split(), "--dry-run"]) == 0
    assert "settings:" in capsys.readouterr().out
    assert not list(here.iterdir())


def test_dry_run_shows_what_was_resolved(here, teacher, capsys):
    assert _unlearn(teacher, "--output_dir", "out", "--density", "0.2", "--dry_run", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    total = sum(parameter.numel() for parameter in _tiny().parameters())
    assert values["parameters"] == {"model": total, "active_at_most": round(0.2 * total)}
    assert values["settings"]["generator_lr"] == 1e-5
    assert values["settings"]["sample_shape"] == [1, 8, 8]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--forget_class", "10"], "unknown class 10; the model has classes 0 to 9"),
        (["--forget_class", "-1"], "unknown class -1"),
        (["--override_class", "3"], "class 3 is to be forgotten"),
        (["--mask_density", "0"], "in (0, 1], got 0.0"),
        (["--mask_density", "1.5"], "in (0, 1], got 1.5"),
        (["--mask_density", "nan"], "in (0, 1], got nan"),
        (["--block", "0x4"], "expected row, element, auto or OUTxIN"),
        (["--max_train_steps", "0"], "expected a positive integer"),
        (["--seed", "x"], "expected an integer from 0"),
        (["--t_init", "1000"], "timestep 1000"),
        (["--generator_lr", "-1"], "expected a positive number"),
        (["--mask", "best"], "invalid choice"),
        (["--max_steps", "3"], "unknown arguments: --max_steps 3"),
    ],
)
def test_bad_settings_are_usage_errors(more, text, here, teacher, capsys):
    assert _unlearn(teacher, *more, "--output_dir", "out") == 2
    assert text in _error(capsys, "unlearn")
    assert not list(here.iterdir())


def test_unknown_command_and_no_command(capsys):
    assert main(["erase"]) == 2
    assert main([]) == 2
    assert "required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: _damage(f, "config.json", "{"), "truncated or not JSON"),
        (lambda f: _damage(f, "config.json", '{"_class_name": "UNet"}'), "'UNet', expected DDPMUNet"),
        (
            lambda f: _damage(f, "diffusion_pytorch_model.safetensors", "x"),
            "truncated or not a safetensors file",
        ),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "no such file"),
        (lambda f: models.save(DigitsClassifier(), f, overwrite=True), "expected a pretrained diffusion model"),
        (
            lambda f: models.save(_tiny(), f, {**DDIM, "kind": "one_step", "t_init": 5}, overwrite=True),
            "one-step generator",
        ),
    ],
)
def test_bad_models_are_file_errors(damage, text, here, teacher, capsys):
    damage(teacher)
    assert _unlearn(teacher, "--output_dir", "out") == 3
    message = _error(capsys, "unlearn")
    assert text in message
    assert str(teacher) in message
    assert not list(here.iterdir())


def test_missing_model(here, capsys):
    assert main(["sample", "--model", "nowhere", "--class", "3", "--output", "x.npz"]) == 3
    assert "nowhere: no such folder" in _error(capsys, "sample")


def test_sample_refuses_unknown_classes_and_models_that_cannot_draw(here, teacher, capsys):
    assert main(["sample", "--model", str(teacher), "--class", "10", "--output", "x.npz"]) == 2
    assert "unknown class 10" in _error(capsys, "sample")
    models.save(DigitsClassifier(), teacher, overwrite=True)
    assert main(["sample", "--model", str(teacher), "--class", "3", "--output", "x.npz"]) == 3
    assert "nothing can be sampled" in _error(capsys, "sample")
    assert not list(here.iterdir())


@pytest.mark.parametrize("kind", ["foreign", "truncated", "missing", "other model"])
def test_bad_masks_are_file_errors(kind, here, teacher, capsys):
    mask = here.parent / "mask.safetensors"
    if kind != "missing":
        BlockMask.random(_tiny(width=8) if kind == "other model" else _tiny(), 0.5).save(mask)
    if kind == "truncated":
        mask.write_bytes(mask.read_bytes()[:-10])
    if kind == "foreign":
        mask.write_bytes((teacher / "diffusion_pytorch_model.safetensors").read_bytes())
    assert _unlearn(teacher, "--mask_path", str(mask), "--output_dir", "out") == 3
    message = _error(capsys, "unlearn")
    assert str(mask) in message
    assert kind != "other model" or "was not made for this DDPMUNet" in message
    assert not list(here.iterdir())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", "pickle", "float", "empty"])
def test_bad_images_are_file_errors(content, here, capsys):
    file = here / "x.npz"
    arrays = {
        "pickle": {"images": np.array([{}], dtype=object), "labels": np.zeros(1, np.int64)},
        "float": {"images": np.zeros((2, 8, 8, 1)), "labels": np.zeros(2, np.int64)},
        "empty": {"images": np.zeros((0, 8, 8, 1), np.uint8), "labels": np.zeros(0, np.int64)},
    }
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, **arrays[content])
    assert main(["evaluate", "--images", "x.npz", "--forget_class", "3", "--cache_dir", "cache"]) == 3
    assert "x.npz" in _error(capsys, "evaluate")
    assert not (here / "cache").exists()


def test_empty_data_folder(here, teacher, capsys):
    (here.parent / "images").mkdir()
    for command in (
        ["pretrain", "--resolution", "8", "--output_dir", "out"],
        ["mask", "--pretrained_model_name_or_path", str(teacher), "--forget_class", "3"],
    ):
        assert main([*command, "--train_data_dir", str(here.parent / "images")]) == 3
        assert "holds no class folders" in _error(capsys, command[0])
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "pretrain --max_train_steps 1 --output_dir",
        "unlearn --pretrained_model_name_or_path ../teacher --forget_class 3 --output_dir",
        "mask --pretrained_model_name_or_path ../teacher --forget_class 3 --output_file",
        "sample --model ../teacher --class 3 --output",
    ],
)
def test_unwritable_output(command, here, capsys):
    (here / "file").write_text("in the way")
    assert main([*command.split(), "file/out"]) == 3
    message = _error(capsys, command.split()[0])
    assert "cannot write into" in message
    assert "choose another" in message
    assert [path.name for path in here.iterdir()] == ["file"]


def test_weights_that_are_nan_are_refused_at_reading(here, teacher, capsys):
    model = _tiny()
    torch.nn.init.constant_(model.conv_out.bias, float("nan"))
    models.save(model, teacher, DDIM, overwrite=True)
    assert main(["sample", "--model", str(teacher), "--class", "3", "--output", "x.npz"]) == 3
    assert "conv_out.bias has 1 of 1 values NaN or infinite" in _error(capsys, "sample")
    assert _unlearn(teacher, "--mask", "dense", "--output_dir", "out", "--quiet") == 3
    message = _error(capsys, "unlearn")
    assert "conv_out.bias has 1 of 1 values NaN or infinite" in message and "learning rate" not in message
    assert not list(here.iterdir())


def test_non_finite_values(here, teacher, capsys):
    """Of weights that are finite, and whose outputs are not."""
    model = _tiny()
    torch.nn.init.constant_(model.conv_in.weight, torch.finfo(torch.float32).max)
    models.save(model, teacher, DDIM, overwrite=True)
    assert main(["sample", "--model", str(teacher), "--class", "3", "--output", "x.npz"]) == 4
    assert "NaN or infinite" in _error(capsys, "sample")
    assert _unlearn(teacher, "--mask", "dense", "--output_dir", "out", "--quiet") == 4
    assert "step 1: fake_score_loss is nan" in _error(capsys, "unlearn")
    assert not list(here.iterdir())


def test_saliency_that_is_nan_is_refused(here, teacher, capsys, monkeypatch):
    monkeypatch.setattr(saliency, "accumulate_saliency_", lambda total, *_: total.fill_(float("nan")))
    assert _unlearn(teacher, "--output_dir", "out") == 4
    assert "NaN or infinite" in _error(capsys, "unlearn")
    assert not list(here.iterdir())


def test_interrupted_run_leaves_nothing(here, teacher, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pecker_fast.distiller.MaskedDistiller.step", interrupt)
    assert _unlearn(teacher, "--output_dir", "out", "--quiet") == 130
    assert "interrupted" in _error(capsys, "unlearn")
    assert not list(here.iterdir())
