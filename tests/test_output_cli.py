"""Commands write where they are told to: what is the user's, or is read, or is another run's, stays."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipelines import write_pipeline
from test_cli import DDIM, QUICK, _error, _one_thread, _tiny  # noqa: F401

from pecker_fast import BlockMask, Delta, MaskedDistiller, models
from pecker_fast.baselines import Baseline, BaselineConfig
from pecker_fast.cli import main
from pecker_fast.config import DistillConfig
from pecker_fast.data import ImageData
from pecker_fast.demo import DemoConfig, run_demo
from pecker_fast.errors import FileFormatError
from pecker_fast.models.diffusers_export import export_diffusers
from pecker_fast.schedule import NoiseSchedule

SOURCE = "--pretrained_model_name_or_path teacher"
SHORT = f"{SOURCE} {' '.join(QUICK)} --mask random --forget_class"
SMALL = "--max_train_steps 1 --width 8 --train_batch_size 8"
# Command -> flags, a name that it writes, and an input that it has.
FOLDERS = {
    "pretrain": (f"pretrain {SMALL}", "config.json", None),
    "judge": (f"judge {SMALL}", "judge.json", None),
    "distill": (f"distill {SOURCE} --max_train_steps 1 --train_batch_size 4", "model", "teacher"),
    "unlearn": (f"unlearn {SHORT} 3", "model", "teacher"),
    "gradient_ascent": (
        f"unlearn {SOURCE} --forget_class 3 --method gradient_ascent --max_train_steps 1 --train_batch_size 4",
        "baseline_config.json",
        "teacher",
    ),
    "extract": ("delta extract --before teacher --after after --mask_path mask", "README.md", "after"),
    "apply": ("delta apply --model teacher --delta known", "config.json", "known"),
    "revert": ("delta revert --model after --delta known", "config.json", "after"),
    "convert": ("convert --kind diffusers --from teacher", "scheduler_config.json", "teacher"),
}
FILES = {
    "mask": (f"mask {SOURCE} --forget_class 3 --mask random", "mask", "teacher"),
    "sample npz": ("sample --model teacher --class 3 --num 1", "three.npz", "teacher"),
    "sample png": ("sample --model teacher --class 3 --num 1", "three.png", "teacher"),
}
PLANNED = {
    "demo": ("demo --short", "report.html", None),
    "compare": ("compare --max_train_steps 1 --seeds 0", "compare.json", None),
}
EVERY = {**FOLDERS, **PLANNED}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, an erasure of it, its mask and its delta."""
    torch.set_num_threads(1)  # made before what conftest does for each test
    root = tmp_path_factory.mktemp("made")
    models.save(_tiny(), root / "teacher", DDIM)
    _distiller().save(root / "run")
    for name, called in {"model": "after", "delta": "known", "mask.safetensors": "mask"}.items():
        os.rename(root / "run" / name, root / called)
    shutil.rmtree(root / "run")
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _distiller():
    config = DistillConfig(
        forget=(3,),
        num_classes=10,
        sample_shape=(1, 8, 8),
        batch_size=2,
        generator_lr=1e-3,
        t_init=500,
        mask={"kind": "random", "density": 0.2},
    )
    distiller = MaskedDistiller(_tiny(), NoiseSchedule.from_dict(DDIM["schedule"]), config)
    distiller.step()
    return distiller


def write_to(place, command, *more):
    torch.manual_seed(0)
    flag = {"mask": "--output_file", "sample": "--output", "convert": "--to"}.get(command.split()[0], "--output_dir")
    return main([*command.split(), "--quiet", flag, str(place), *more])


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, folder, text, place, command, *more):
    """With exit code 3, one line that says why, and everything as it was; so in a dry run."""
    before = contents(folder)
    for flags in (more, (*more, "--dry_run")):
        capsys.readouterr()
        assert write_to(place, command, *flags) == 3, flags
        assert text in _error(capsys, command.split()[0])
        assert contents(folder) == before


@pytest.mark.parametrize("name", EVERY)
def test_a_folder_with_files_of_the_users_in_the_way(name, here, capsys):
    command, written, _ = EVERY[name]
    (here / "out").mkdir()
    if written == "model":
        (here / "out/model").mkdir()
        (here / "out/model/mine.txt").write_text("mine")
    else:
        (here / "out" / written).write_text("mine")
    for more in ((), ("--overwrite",)):
        refused(capsys, here, f"out/{written}: was not written by pecker_fast", "out", command, *more)
    (here / "out" / "config.yaml").write_text("mine: 1")
    os.rename(here / "out" / written, here / "aside")
    refused(capsys, here, "out/config.yaml: was not written by pecker_fast", "out", command)


@pytest.mark.parametrize("name", [name for name, (_, _, source) in {**FOLDERS, **FILES}.items() if source])
def test_what_is_read_is_not_written_to(name, here, capsys):
    command, _, source = {**FOLDERS, **FILES}[name]
    (here / "link").symlink_to(source)
    places = {source: "is the input", "link": "is the input"} if name in FOLDERS else {}
    places |= {f"{source}/new": "lies in the input", "link/new": "lies in the input"}
    places |= {".": "holds the input"} if name in FOLDERS else {}
    for place, relation in places.items():
        refused(capsys, here, relation, place, command, "--overwrite")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_there_is_worked_in_and_replaced_only_when_asked_to(name, here, capsys):
    command, written, _ = FOLDERS[name]
    (here / "disk").mkdir()
    (here / "disk/.gitignore").write_text("*")
    (here / "out").symlink_to("disk")
    inode = (here / "disk").stat().st_ino
    assert write_to("out", command) == 0
    assert (here / "disk" / written).exists() and (here / "disk/config.yaml").is_file()
    if name == "distill":  # done already, and says so
        assert write_to("out", command) == 0
        command = command.replace("--train_batch_size 4", "--train_batch_size 4 --max_train_steps 2 --overwrite")
    else:
        refused(capsys, here, "disk: holds a result of", "out", command)
    assert write_to("out", command, "--overwrite") == 0
    assert (here / "out").is_symlink() and (here / "disk").stat().st_ino == inode
    assert (here / "disk/.gitignore").read_text() == "*"
    assert "overwrite: false" in (here / "disk/config.yaml").read_text()
    mine = here / "disk" / ("model/mine.txt" if written == "model" else written)
    mine.write_text("mine")
    refused(capsys, here, mine.name, "out", command, "--overwrite")
    assert not [path for path in (here / "disk").iterdir() if path.name.startswith(".pecker_fast.") and path.is_dir()]


@pytest.mark.parametrize("name", FILES)
def test_files_are_replaced_only_when_they_are_ones_own(name, here, capsys):
    command, written, _ = FILES[name]
    (here / "drawn").mkdir()
    place = here / "drawn" / written
    assert write_to(place, command) == 0
    first = place.read_bytes()
    refused(capsys, here, "holds a result of", place, command)
    assert write_to(place, command, "--overwrite", "--seed", "1") == 0
    assert name == "sample png" or place.read_bytes() != first
    place.write_bytes(b"edited")
    refused(capsys, here, "was changed since pecker_fast wrote it", place, command, "--overwrite")
    other = here / "drawn" / f"other{place.suffix}"
    other.write_text("mine")
    refused(capsys, here, "was not written by pecker_fast", other, command, "--overwrite")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "sd" / "base")


@pytest.mark.parametrize(
    ("place", "relation"),
    [
        ("sd/base", "is the input"),
        ("link", "is the input"),
        ("sd", "holds the input"),
        ("sd/base/unet", "lies in the input"),
        ("sd/base/new/er", "lies in the input"),
    ],
)
def test_a_pipeline_that_is_read_is_not_written_to(place, relation, pipeline, tmp_path, monkeypatch, capsys):
    shutil.copytree(pipeline, tmp_path / "sd/base")
    (tmp_path / "link").symlink_to("sd/base")
    (tmp_path / "keep.txt").write_text("a dog")
    (tmp_path / "mine.py").write_text("def bright(images):\n    return images.mean((1, 2, 3)) / 255\n")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    steps = "--max_train_steps 1 --mask random --num_validation_images 0 --device cpu"
    erase = f"unlearn {SOURCE} --method esd --erase_concept cat --retain_prompts keep.txt {steps}"
    assert write_to(place, erase.replace("teacher", "sd/base"), "--overwrite") == 3
    assert relation in _error(capsys, "unlearn")
    look = (
        "evaluate --model sd/base --prompts keep.txt --concept dog --neighbour_concepts cat --detector mine.py:bright"
    )
    assert write_to(place, f"{look} --device cpu", "--overwrite") == 3
    assert relation in _error(capsys, "evaluate")
    assert contents(tmp_path) == before


def test_a_project_of_the_users_is_left_alone(here, monkeypatch, capsys):
    """``--output_dir .`` where other work lies."""
    for name in ("model/weights", "delta/x"):
        (here / "project" / name).parent.mkdir(parents=True)
        (here / "project" / name).write_text("mine")
    monkeypatch.chdir(here / "project")
    command = f"unlearn {SHORT} 3".replace("teacher", "../teacher")
    refused(capsys, here, "was not written by pecker_fast", ".", command)
    os.rename("model", "own_model")
    os.rename("delta", "own_delta")
    assert write_to(".", command) == 0
    assert os.getcwd() == str(here / "project") and Path("own_model/weights").read_text() == "mine"


def test_two_erasures_do_not_lose_one(here, capsys):
    assert write_to("out", f"unlearn {SHORT} 3") == 0
    refused(capsys, here, "out: holds a result of unlearn already; give --overwrite", "out", f"unlearn {SHORT} 5")
    for command in (f"pretrain {SMALL}", f"distill {SOURCE}", "convert --kind diffusers --from teacher"):
        before = contents(here)
        assert write_to("out", command, "--overwrite") in (2, 3)
        assert contents(here) == before
    capsys.readouterr()
    assert write_to("out", f"unlearn {SHORT} 5", "--overwrite") == 0
    assert json.loads((here / "out/distill_config.json").read_text())["forget"] == [5]


def test_a_run_that_another_one_works_beside(here, capsys):
    """The other one is a process of its own, which is killed in the end."""
    code = (
        "import sys, time; from pecker_fast.output_folder import claim\n"
        "with claim(sys.argv[1], 'unlearn'): print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, here / "out"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        for command in (f"unlearn {SHORT} 3", f"pretrain {SMALL}", "convert --kind diffusers --from teacher"):
            assert write_to("out", command) == 3
            assert f"another run writes there (process {other.pid} on" in _error(capsys, command.split()[0])
            assert write_to("out", command, "--dry_run") == 3
            capsys.readouterr()
    finally:
        other.kill()
        other.wait()
    assert write_to("out", f"unlearn {SHORT} 3") == 0
    assert {path.name for path in (here / "out").iterdir() if path.name.startswith(".")} == {".pecker_fast.json"}


# -- checkpoints -----------------------------------------------------------------------------------


def test_checkpoints_of_other_libraries_stay(here, capsys):
    (here / "out/checkpoint-500").mkdir(parents=True)
    (here / "out/checkpoint-500/optimizer.bin").write_text("mine")
    for more in ((), ("--overwrite",), ("--resume_from_checkpoint", "latest")):
        for command in (f"unlearn {SHORT} 3", f"pretrain {SMALL}", f"distill {SOURCE} --max_train_steps 2"):
            refused_once(capsys, here, "checkpoint", "out", command, "--checkpointing_steps", "1", *more)


def refused_once(capsys, folder, text, place, command, *more):
    before = contents(folder)
    capsys.readouterr()
    assert write_to(place, command, *more) == 3
    assert text in _error(capsys, command.split()[0])
    assert contents(folder) == before


def test_what_lies_in_a_checkpoint_stays(here, capsys):
    steps = ("--checkpointing_steps", "1", "--checkpoints_total_limit", "1")
    assert write_to("out", f"unlearn {SHORT} 3", *steps) == 0
    (here / "out/checkpoint-2/notes.txt").write_text("mine")
    for more in (("--overwrite",), ("--resume_from_checkpoint", "latest", "--max_train_steps", "3")):
        refused_once(capsys, here, "checkpoint-2/notes.txt", "out", f"unlearn {SHORT} 3", *steps, *more)
    (here / "out/checkpoint-2/notes.txt").unlink()
    assert write_to("out", f"unlearn {SHORT} 5", *steps, "--overwrite") == 0
    resumed = ("--resume_from_checkpoint", "latest", "--max_train_steps", "3")
    assert write_to("out", f"unlearn {SHORT} 5", *steps, *resumed) == 0
    assert len((here / "out/metrics.jsonl").read_text().splitlines()) == 3


def test_a_checkpoint_is_no_place_to_write_to(here, capsys):
    assert write_to("out", f"unlearn {SHORT} 3", "--checkpointing_steps", "1") == 0
    resumed = ("--resume_from_checkpoint", "out/checkpoint-1")
    for place in ("out/checkpoint-1", "out/checkpoint-1/new"):
        refused_once(capsys, here, "the input out/checkpoint-1", place, f"unlearn {SHORT} 3", *resumed)
    assert write_to("longer", f"unlearn {SHORT} 3", *resumed) == 0
    refused_once(capsys, here, "already", "longer", f"unlearn {SHORT} 3", *resumed)  # not its own folder


# -- room ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretrain", "judge", "distill", "unlearn", "gradient_ascent", "apply", "convert"])
def test_a_full_disk_is_known_before_anything_is_trained(name, here, monkeypatch, capsys):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("pecker_fast.output_check.shutil.disk_usage", lambda _: free)
    refused(capsys, here, "but the disk has 0 MiB left; make room", "out", FOLDERS[name][0])


def test_room_for_checkpoints_is_counted(here, monkeypatch, capsys):
    free = type("Usage", (), {"free": 30 << 20})
    monkeypatch.setattr("pecker_fast.output_check.shutil.disk_usage", lambda _: free)
    steps = ("--max_train_steps", "100000", "--checkpointing_steps", "1", "--dry_run")
    assert write_to("out", f"unlearn {SHORT} 3", *steps) == 3
    assert "make room" in _error(capsys, "unlearn")
    assert write_to("out", f"unlearn {SHORT} 3", *steps, "--checkpoints_total_limit", "2") == 0


# -- from Python -----------------------------------------------------------------------------------


def _baseline(folder, **how):
    config = BaselineConfig(method="gradient_ascent", forget=(3,), num_classes=10, sample_shape=(1, 8, 8))
    data = ImageData(torch.zeros(10, 1, 8, 8), torch.arange(10), tuple("0123456789"))
    baseline = Baseline(_tiny(), NoiseSchedule.from_dict(DDIM["schedule"]), config, data=data)
    baseline.build_mask()
    baseline.save(folder, **how)


SAVES = {
    "MaskedDistiller.save": lambda folder, **how: _distiller().save(folder, **how),
    "Baseline.save": _baseline,
    "models.save": lambda folder, **how: models.save(_tiny(), folder, DDIM, **how),
    "Delta.save": lambda folder, **how: Delta.load("known").save(folder, **how),
    "export_diffusers": lambda folder, **how: export_diffusers("teacher", folder, **how),
}
WRITTEN = {"MaskedDistiller.save": "model", "Baseline.save": "model", "Delta.save": "README.md"}


@pytest.mark.parametrize("name", SAVES)
def test_functions_that_save_keep_to_it_too(name, here):
    save, written = SAVES[name], WRITTEN.get(name, "config.json")
    (here / "theirs").mkdir()
    (here / "theirs" / written).write_text("mine")
    for how in ({}, {"overwrite": True}):
        with pytest.raises(FileFormatError, match=f"{written}: was not written by pecker_fast"):
            save("theirs", **how)
    assert contents(here / "theirs") == {written: b"mine"}
    (here / "out").mkdir()
    (here / "out/notes").write_text("mine")
    save("out")
    with pytest.raises(FileFormatError, match=f"holds a result of {name} already; .*overwrite=True"):
        save("out")
    save("out", overwrite=True)
    assert (here / "out/notes").read_text() == "mine"


def test_masks_and_demos_from_python(here):
    mask = BlockMask.load("mask")
    mask.save("mask")  # a mask takes the place of a mask alone
    for other in ("teacher/diffusion_pytorch_model.safetensors", "teacher/config.json", "teacher"):
        before = contents(here)
        with pytest.raises(FileFormatError):
            mask.save(other)
        assert contents(here) == before
    (here / "shown").mkdir()
    (here / "shown/report.html").write_text("mine")
    with pytest.raises(FileFormatError, match=r"report.html: was not written"):
        run_demo(DemoConfig(short=True, progress=False, cache_dir=here / "cache"), here / "shown", overwrite=True)
