"""The examples run, and do what they say."""

import json
import runpy
from pathlib import Path

import accelerate
import pytest
import torch
from PIL import Image
from pipelines import write_pipeline
from safetensors.torch import load_file

from pecker_fast import models
from pecker_fast.cli import main
from pecker_fast.delta import Ledger
from pecker_fast.models.storage import WEIGHTS_NAME
from pecker_fast.parser import build_parser

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "base")


def _unet(pipeline):
    return load_file(pipeline / "unet" / WEIGHTS_NAME)


def test_embed_masked_training_learns(capsys):
    accuracy = runpy.run_path(str(EXAMPLES / "embed_masked_training.py"))["main"](max_train_steps=100)
    assert accuracy > 0.9 and "kept every bit" in capsys.readouterr().out


def test_embed_distiller_logs_and_saves(tmp_path):
    log = runpy.run_path(str(EXAMPLES / "embed_distiller.py"))["main"](max_train_steps=10, output_dir=tmp_path)
    assert [line["step"] for line in log] == [5, 10]
    assert models.load(tmp_path / "result" / "model").config["image_size"] == 8


def test_embed_text_to_image_changes_masked_weights_alone(pipeline, tmp_path, capsys):
    captions = ["three", "red cat", "photo of the dog"]
    for number in range(3):
        Image.new("RGB", (20 + number, 16), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": text}) for number, text in enumerate(captions)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    train = runpy.run_path(str(EXAMPLES / "embed_text_to_image.py"))["train"]
    sizes = {"resolution": 16, "batch_size": 2, "max_train_steps": 2}
    mask = train(pipeline, tmp_path, tmp_path / "out", learning_rate=1e-3, **sizes)
    before, after = _unet(pipeline), _unet(tmp_path / "out")
    changed = 0
    for name, weight in before.items():
        outside = ~mask.to_dense(name) if name in mask.parameters else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(after[name][outside], weight[outside]), name
        changed += int((after[name] != weight).sum())
    assert 0.9 * mask.numel < changed <= mask.numel
    source = (EXAMPLES / "embed_text_to_image.py").read_text()
    assert sum("  # <--" in line for line in source.splitlines()) == 5


def test_erase_celebrity(pipeline, tmp_path, capsys):
    erase = runpy.run_path(str(EXAMPLES / "erase_celebrity.py"))["erase"]
    assert erase(pipeline, tmp_path, "the cat", "the dog", short=True) == 0
    _was_erased(pipeline, tmp_path / "out" / "model")
    _there_and_back(pipeline, tmp_path / "out", tmp_path)


def test_erase_nudity(pipeline, tmp_path, capsys):
    erase = runpy.run_path(str(EXAMPLES / "erase_nudity.py"))
    assert erase["erase"](pipeline, tmp_path, short=True) == 0
    _was_erased(pipeline, tmp_path / "out" / "model")
    assert (tmp_path / "override.txt").read_text().splitlines() == 2 * ["the cat, three", "the dog, three"]
    forget, override = erase["prompts"](erase["SUBJECTS"], erase["KEYWORDS"], erase["DRESSED"])
    assert len(forget) == len(override) == len(set(forget)) == 2 * len(erase["SUBJECTS"]) * len(erase["KEYWORDS"])


@pytest.mark.parametrize(("name", "more"), [("celebrity", ("the cat", "the dog")), ("nudity", ())])
def test_examples_leave_the_steps_to_the_method(name, more, pipeline, tmp_path, monkeypatch):
    erase = runpy.run_path(str(EXAMPLES / f"erase_{name}.py"))["erase"]
    asked = []
    monkeypatch.setitem(erase.__globals__, "pecker_fast", asked.append)
    parser = build_parser()
    for method in ("pecker", "sfd", "esd", "salun"):
        for short in (False, True):
            erase(pipeline, tmp_path, *more, method=method, short=short)
            given = parser.parse_args(asked.pop())
            assert (given.method, given.max_train_steps) == (method, 1 if short else None)


def _was_erased(before, after):
    assert (after / "model_index.json").is_file() and len(Ledger.load(after / "unet")) == 1
    old, new = _unet(before), _unet(after)
    share = sum(int((new[name] != old[name]).sum()) for name in old) / sum(weight.numel() for weight in old.values())
    assert 0 < share <= 0.101


def _there_and_back(base, erased, folder):
    """Its delta makes of the ordinary pipeline the one-step generator, scheduler and all, and the other way round."""
    flags = ["--delta", str(erased / "delta"), "--quiet", "--output_dir"]
    assert main(["delta", "apply", "--model", str(base), *flags, str(folder / "edited")]) == 0
    assert main(["delta", "revert", "--model", str(folder / "edited"), *flags, str(folder / "back")]) == 0
    for name in (f"unet/{WEIGHTS_NAME}", "scheduler/scheduler_config.json"):
        assert (folder / "edited" / name).read_bytes() == (erased / "model" / name).read_bytes()
    for file in (path for path in base.rglob("*") if path.is_file()):
        assert (folder / "back" / file.relative_to(base)).read_bytes() == file.read_bytes()


def test_prompts_of_the_examples_are_prompts():
    celebrity = runpy.run_path(str(EXAMPLES / "erase_celebrity.py"))
    assert len(set(celebrity["TEMPLATES"])) == 25 and all(text.count("{}") == 1 for text in celebrity["TEMPLATES"])
    lines = (EXAMPLES / "retain_prompts.txt").read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if not line.startswith("#")]
    assert len(set(prompts)) == len(prompts) > 40
    words = runpy.run_path(str(EXAMPLES / "erase_nudity.py"))["KEYWORDS"]
    assert not any(word in prompt for word in words for prompt in prompts)
