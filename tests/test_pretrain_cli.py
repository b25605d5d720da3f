"""``pecker-fast pretrain`` in several calls, and how weights are stored."""

from __future__ import annotations

import json
import shutil

import image_sets
import pytest
import torch

from pecker_fast import models
from pecker_fast.cli import main
from pecker_fast.data import load_dataset
from pecker_fast.evaluation import predict
from pecker_fast.flags import size
from pecker_fast.pretrain_checkpoint import Checkpoints

SMALL = ["--width", "4", "--train_batch_size", "4", "--quiet"]


@pytest.fixture
def pretrain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_sets.npz(tmp_path / "images.npz", image_sets.random_pixels(12, 8), [i % 2 for i in range(12)])
    common = ["pretrain", "--train_data_dir", "images.npz", "--max_train_steps", "3", "--lr_warmup_steps", "1", *SMALL]
    return lambda folder, *more: main([*common, "--output_dir", folder, *more])


def equal(a, b):
    one, other = (models.load(folder).state_dict() for folder in (a, b))
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_out_of_time_is_exit_code_5_and_the_next_call_goes_on(pretrain, tmp_path, capsys):
    assert pretrain("whole") == 0
    assert pretrain("cut", "--max_train_seconds", "1e-9") == 5
    assert "1 of 3 steps done, 2 left; cut/checkpoint-1 is complete" in capsys.readouterr().err
    report = json.loads((tmp_path / "cut" / "pretrain.json").read_text())
    assert (report["steps_done"], report["steps"], report["restarts"]) == (1, 3, [])
    assert not equal("cut", "whole")
    shutil.copytree("cut", "cold")
    assert pretrain("cut", "--resume_from_checkpoint", "latest", "--checkpointing_steps", "2") == 0
    assert equal("cut", "whole")
    assert {path.name for path in (tmp_path / "cut").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert json.loads((tmp_path / "cut" / "pretrain.json").read_text())["seconds"] > report["seconds"]
    again = ["--resume_from_checkpoint", "checkpoint-1", "--init", "cold"]
    assert pretrain("more", *again) == 2
    assert pretrain("more", "--init", "cold") == 0
    assert not equal("more", "whole")
    assert json.loads((tmp_path / "more" / "pretrain.json").read_text())["restarts"] == [1]


def test_what_does_not_go_together_is_refused(pretrain, tmp_path, capsys):
    assert pretrain("cut", "--max_train_seconds", "1e-9") == 5
    for more, text in (
        (["--init", "cut", "--learning_rate", "1"], "was trained with learning_rate = 0.003, here it is 1.0"),
        (["--init", "cut", "--width", "8"], "another network"),
        (["--init", "absent"], "absent/pretrain.json: cannot be read"),
        (["--checkpoints_total_limit", "1"], "there are no checkpoints"),
        (["--resume_from_checkpoint", "cut/checkpoint-1", "--seed", "1"], "saved with seed = 0"),
        (["--max_shard_size", "16XB"], "expected a size such as 16MB"),
        (["--max_shard_size", "1KB"], "expected at least"),
        (["--save_dtype", "float8"], "invalid choice"),
    ):
        capsys.readouterr()
        assert pretrain("new", *more) in (2, 3)
        assert text in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    assert pretrain("cut", "--max_train_seconds", "9") == 3
    assert "has checkpoints of an earlier run, the last of step 1; continue it with" in capsys.readouterr().err
    assert pretrain("cut", "--resume_from_checkpoint", "latest") == 0
    assert pretrain("new", "--init", "cut") == 2
    assert "says that 3 of 3 steps are done" in capsys.readouterr().err


def test_interrupted_it_leaves_a_checkpoint(pretrain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "pecker_fast.commands.pretraining.Checkpoints",
        lambda *a, **k: Checkpoints(*a, **{**k, "interrupted": lambda: True}),
    )
    assert pretrain("cut", "--checkpointing_steps", "100") == 130
    assert "interrupted; 1 of 3 steps done, 2 left; cut/checkpoint-1 is complete" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-1"]


def test_a_judge_is_judged_as_it_is_stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_sets.npz(tmp_path / "images.npz", image_sets.random_pixels(12, 8), [i % 2 for i in range(12)])
    stored = ["--save_dtype", "float16", "--max_shard_size", "6KB"]
    steps = ["--max_train_steps", "2", "--output_dir", "judge"]
    assert main(["judge", "--train_data_dir", "images.npz", *steps, *SMALL, *stored]) == 0
    judge, held_out = models.load("judge"), load_dataset("images.npz").split()[1]
    right = float((predict(held_out.images, judge) == held_out.labels).float().mean())
    assert json.loads((tmp_path / "judge" / "judge.json").read_text())["held_out_accuracy"] == right
    assert all(torch.equal(weight, weight.half().float()) for weight in judge.parameters())
    assert len(list((tmp_path / "judge").glob("*.safetensors"))) > 1


def test_sizes_are_read():
    assert [size(text) for text in ("7", "16MB", "2KiB", "1GB", "3KB")] == [7, 16 * 10**6, 2048, 10**9, 3000]
