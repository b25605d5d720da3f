"""``pecker-fast unlearn``: interrupted and resumed writes what an uninterrupted run writes."""

import json
import signal

import pytest
import torch
from test_cli import DDIM, _error, _one_thread, _tiny, _unlearn  # noqa: F401

from pecker_fast import MaskedDistiller, models
from pecker_fast.checkpoint import read_safetensors
from pecker_fast.cli import main

STEPS = ("--max_train_steps", "5", "--quiet")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs ``pecker-fast unlearn`` as a new process would, with dropout."""
    models.save(_tiny(dropout=0.2), tmp_path / "teacher", DDIM)
    monkeypatch.chdir(tmp_path)

    def run(*more):
        torch.manual_seed(0)
        return _unlearn(tmp_path / "teacher", *STEPS, *more)

    return run


def interrupt_after(monkeypatch, steps, how):
    original = MaskedDistiller.step

    def step(self):
        metrics = original(self)
        if self.steps_done == steps:
            how()
        return metrics

    monkeypatch.setattr(MaskedDistiller, "step", step)


def assert_same_tensors(*folders):
    for name in ("model/diffusion_pytorch_model.safetensors", "mask.safetensors"):
        ours, theirs = (read_safetensors(folder / name)[0] for folder in folders)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("how", "left"),
    [
        (lambda: signal.raise_signal(signal.SIGTERM), 3),  # the step is finished, and saved
        (lambda: signal.raise_signal(signal.SIGINT), 3),
        (raise_interrupt, 2),  # in the midst of a step: the last regular checkpoint
    ],
    ids=["SIGTERM", "SIGINT", "KeyboardInterrupt"],
)
def test_interrupted_and_resumed_equals_uninterrupted(how, left, run, tmp_path, monkeypatch, capsys):
    assert run("--output_dir", "whole") == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, how)
        assert run("--output_dir", "out", "--checkpointing_steps", "2", "--checkpoints_total_limit", "1") == 130
    message = _error(capsys, "unlearn")
    assert f"out/checkpoint-{left} is complete" in message and "--resume_from_checkpoint latest" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"checkpoint-{left}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "teacher", "whole"]

    arguments = ("--checkpointing_steps", "2", "--checkpoints_total_limit", "1", "--resume_from_checkpoint", "latest")
    assert run("--output_dir", "out", *arguments) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in (tmp_path / "whole").iterdir()} | {"checkpoint-4"}
    assert_same_tensors(tmp_path / "out", tmp_path / "whole")
    for name in ("metrics.jsonl", "distill_config.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_a_checkpoint_by_name_and_more_steps(run, tmp_path, capsys):
    assert run("--output_dir", "whole") == 0
    assert run("--output_dir", "out", "--max_train_steps", "2", "--checkpointing_steps", "2") == 0
    assert run("--output_dir", "longer", "--resume_from_checkpoint", "out/checkpoint-2") == 0
    assert_same_tensors(tmp_path / "longer", tmp_path / "whole")
    assert run("--output_dir", "done", "--max_train_steps", "2", "--resume_from_checkpoint", "out/checkpoint-2") == 0
    assert len((tmp_path / "done" / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        ("--output_dir new --resume_from_checkpoint latest", 3, "new: has no finished checkpoint"),
        ("--output_dir new --resume_from_checkpoint out/checkpoint-9", 3, "out/checkpoint-9: no such folder"),
        ("--output_dir out --checkpointing_steps 2", 3, "has checkpoints of an earlier run, the last of step 2"),
        ("--output_dir new --checkpoints_total_limit 2", 2, "give --checkpointing_steps too"),
        ("--output_dir new --checkpointing_steps 0", 2, "expected a positive integer"),
        ("--output_dir out --resume_from_checkpoint latest --seed 5", 2, "config.seed = 0, this distiller has 5"),
        ("--output_dir out --resume_from_checkpoint latest --max_train_steps 1", 2, "has done 2 steps already"),
        ("--output_dir out --resume_from_checkpoint latest --mask_path other", 2, "another mask than the one in use"),
    ],
)
def test_what_cannot_be_resumed(more, code, text, run, tmp_path, capsys):
    assert run("--output_dir", "out", "--max_train_steps", "2", "--checkpointing_steps", "2") == 0
    source = ["--pretrained_model_name_or_path", "teacher", "--forget_class", "3", "--mask", "random"]
    assert main(["mask", *source, "--output_file", "other", "--quiet"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(*more.split()) == code
    assert text in _error(capsys, "unlearn")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_dry_run_names_the_checkpoints(run, tmp_path, capsys):
    assert run("--output_dir", "out", "--checkpointing_steps", "2", "--dry_run", "--json") == 0
    assert "out/checkpoint-*" in json.loads(capsys.readouterr().out)["would_write"]
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
