"""The examples run, and do what they say."""

import runpy
from pathlib import Path

from pecker_fast import models

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_embed_masked_training_learns(capsys):
    accuracy = runpy.run_path(str(EXAMPLES / "embed_masked_training.py"))["main"](max_train_steps=100)
    assert accuracy > 0.9 and "kept every bit" in capsys.readouterr().out


def test_embed_distiller_logs_and_saves(tmp_path):
    log = runpy.run_path(str(EXAMPLES / "embed_distiller.py"))["main"](max_train_steps=10, output_dir=tmp_path)
    assert [line["step"] for line in log] == [5, 10]
    assert models.load(tmp_path / "result" / "model").config["image_size"] == 8
