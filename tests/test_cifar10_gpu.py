"""The CIFAR-10 task runs on a CPU, at a tiny size, in several calls, from nothing but what they leave."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import background
import image_sets
import pytest
import torch

from pecker_fast import NoiseSchedule, models
from pecker_fast.cli import main

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")

ROOT = Path(__file__).parents[1]


def call(folder: Path, *parts: str, **environment: str) -> tuple[int, str, str]:
    """Exit status, summary and everything that was printed."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables |= {"PECKER_FAST_REHEARSE": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    variables |= {"PYTHONPATH": str(ROOT), "CIFAR10_DIR": str(folder / "data"), **environment}
    command = ["bash", ROOT / "benchmarks/cifar10_gpu.sh", folder / "out", *parts]
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    summary = folder / "out" / "summary.txt"
    return run.returncode, summary.read_text() if summary.exists() else "", run.stdout + run.stderr


def rehearse() -> tuple[tempfile.TemporaryDirectory, list[tuple[int, str, str]]]:
    """A teacher that is cut short and goes on once its checkpoints are lost, and a judge."""
    holder = tempfile.TemporaryDirectory()
    folder = Path(holder.name)
    pixels, labels = image_sets.random_pixels(60), [i % 10 for i in range(60)]
    for split in ("train", "test"):
        image_sets.parquet(folder / "data" / "plain_text" / f"{split}-00000-of-00001.parquet", pixels, labels)
    calls = [call(folder, "teacher", "compare", "assets", TEACHER_SECONDS="0.001")]
    shutil.rmtree(folder / "out.scratch")
    calls.append(call(folder, "teacher", "judge"))
    return holder, calls


BACKGROUND = rehearse


@pytest.fixture(scope="module")
def rehearsed():
    holder, calls = background.result(rehearse)
    return Path(holder.name), calls


def test_a_call_that_is_not_enough_says_what_is_left(rehearsed):
    _, ((status, summary, log), _) = rehearsed
    assert status == 5, log
    assert re.search(r"teacher: 1 of 4 steps done, 3 left: \d+ s, [\d.]+ ms a step", summary)
    assert "compare: waits for teacher and judge" in summary and "assets: waits for" in summary


def test_where_the_checkpoints_are_lost_the_next_call_goes_on_from_the_weights(rehearsed):
    folder, (_, (status, summary, log)) = rehearsed
    assert status == 0, log
    assert "no checkpoint in SCRATCH; goes on from the weights in OUT with a new optimizer" in summary
    assert "teacher: all 4 steps done" in summary and "judge: exit status 0" in summary
    report = json.loads((folder / "out/teacher/pretrain.json").read_text())
    assert (report["restarts"], report["steps_done"], report["steps"]) == ([1], 4, 4)
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "judge", "judge.log", "summary.txt", "teacher", "teacher.log"
    ]  # fmt: skip
    pieces = sorted(path for path in (folder / "out/teacher").glob("*.safetensors"))
    assert len(pieces) == 3 and all(path.stat().st_size <= 96_000 for path in pieces)
    assert {tensor.dtype for tensor in models.load(folder / "out/teacher").parameters()} == {torch.float32}


def test_the_card_says_what_was_measured(rehearsed, tmp_path, monkeypatch):
    folder, _ = rehearsed
    monkeypatch.setenv("PECKER_FAST_REHEARSE", "1")
    for name in ("teacher", "judge"):
        shutil.copytree(folder / "out" / name, tmp_path / name)
    assets = _module("cifar10_assets")
    assets.write_assets(tmp_path, folder / "data/plain_text", images=2)
    measured = json.loads((tmp_path / "assets/measured.json").read_text())
    card = (tmp_path / "assets/README.md").read_text()
    assert card.splitlines()[2].startswith("**A rehearsal")
    assert f"| judge, test part | {measured['test_accuracy']:.2%} |" in card
    assert f"to the test part | {measured['frechet_drawn_test']:.4g} |" in card
    assert "weights after the steps 1." in card and "{" not in card
    assert measured["train_accuracy"] == measured["test_accuracy"]  # made up of the same images
    assert measured["frechet_train_test"] < 1e-6 < measured["frechet_drawn_test"]
    again = models.load(tmp_path / "assets/teacher").state_dict()
    assert all(torch.equal(w, again[k]) for k, w in models.load(folder / "out/teacher").state_dict().items())


@pytest.mark.parametrize("rehearsal", ["0", "1"])
def test_its_commands_are_understood(tmp_path, monkeypatch, capsys, rehearsal):
    """What it would run, at full size too, is parsed and planned by the commands themselves."""
    data = tmp_path / "data" / "plain_text"
    _module("cifar10").made_up(data)
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/log\ncase "$2" in left) exit $LEFT ;; esac\n')
    stub.chmod(0o755)
    for left in ("5", "0"):
        call(tmp_path, PYTHON=str(stub), LEFT=left, PECKER_FAST_REHEARSE=rehearsal)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    commands = [line[2:] for line in lines if line[:2] == ["-m", "pecker_fast"] and "--dry_run" not in line]
    assert [command[0] for command in commands] == ["pretrain", "judge", "compare"]
    plans = {}
    for command in commands:
        assert main([*command, "--dry_run", "--json"]) == 0, capsys.readouterr().err
        plans[command[0]] = json.loads(capsys.readouterr().out)
        if command[0] == "pretrain":  # a plan of compare names the teacher's classes
            ddim = {
                "kind": "ddim",
                "steps": 2,
                "schedule": NoiseSchedule.linear().to_dict(),
                "sample_shape": [3, 32, 32],
            }
            small = {"width": 4, "channel_mult": (1,), "num_res_blocks": 1, "norm_groups": 2}
            models.save(models.DDPMUNet(**small), tmp_path / "out" / "teacher", ddim)
    assert plans["compare"]["settings"]["forget"] == [0]
    if rehearsal == "0":
        assert 9e6 < plans["pretrain"]["parameters"]["model"] < 11e6
        assert plans["compare"]["settings"]["runs"] == {"tuning": 6, "reported": 6}
        size = 2 * (plans["pretrain"]["parameters"]["model"] + plans["judge"]["parameters"]["model"])
        assert 2 * size < 50e6  # folder and assets


def test_what_is_left_of_a_comparison_is_counted(tmp_path):
    tool = _module("cifar10")
    settings = {"methods": ["sfd", "pecker"], "seeds": [0, 1], "runs": {"tuning": 2, "reported": 4}}
    (tmp_path / "compare.plan.json").write_text(json.dumps({"settings": settings}))
    assert tool.left("compare", tmp_path) == (False, "0 of 2 tuning runs and 0 of 4 reported runs done, 6 left")
    lines = [{"phase": "timing", "method": "sfd"}, {"phase": "tuning", "method": "sfd", "seed": 9, "seconds": 7.6}]
    lines += [{"phase": "reported", "method": m, "seed": s} for m, s in (("sfd", 0), ("sfd", 5), ("random", 0))]
    (tmp_path / "compare").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "compare" / "runs.jsonl").write_text(text + '{"phase": "repo')
    done, said = tool.left("compare", tmp_path)
    assert not done and said.startswith("1 of 2 tuning runs and 1 of 4 reported runs done, 4 left, training takes up")


def test_wrong_usage_is_told(tmp_path):
    status, _, log = call(tmp_path, "tescher")
    assert status == 2 and "unknown part tescher" in log
    status, _, log = call(tmp_path, "teacher")
    assert status == 2 and "plain_text: no such folder" in log


def _module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
