"""What a dry run of an erasure tells: its settings, and what it will take."""

import json
from pathlib import Path

import pytest
import torch
from erasing import ESD, FLAGS, PECKER, unlearn, write_place

from pecker_fast import distill_masks
from pecker_fast.cli import main
from pecker_fast.commands import concept_estimate
from pecker_fast.commands.concept_job import Job
from pecker_fast.commands.concept_training import sketch
from pecker_fast.concepts import PipelineFolder, recipe
from pecker_fast.parser import build_parser
from pecker_fast.time_estimate import TimeEstimate


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("concepts"))


ESTIMATE = concept_estimate.estimate
"""Which takes seconds; but for its own test dry runs do without."""


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(concept_estimate, "estimate", lambda job: ({"seconds": 7.0}, "in seven seconds"))
    return place


def test_flags_are_settings(capsys):
    flags = ("--guidance_scale", "1.5", "2", "3", "--prompt_dropout", "0", "--negative_prompt", "cat", "--negative_in")
    more = ("fake_score", "true_score", "--micro_batch_size", "1", "--train_method", "xattn", "--t_init", "500")
    unlearn("dry", *PECKER, *flags, *more, "--dry_run", "--json")
    found = json.loads(capsys.readouterr().out)
    settings = found["settings"]
    assert settings["guidance"] == {
        **{"fake_score_update": 1.5, "fake_score": 2.0, "true_score": 3.0, "dropout": 0.0},
        "negative_in": ["fake_score", "true_score"],
    }
    assert (settings["micro_batch_size"], settings["t_init"], settings["share_frozen_weights"]) == (1, 500, True)
    assert (settings["ema_decay"], settings["eps"], settings["fake_score_mask"]) == (None, 1e-6, "same")
    assert all(".attn2." in prefix for prefix in settings["mask"]["region"])
    assert "note" in found and settings["max_train_steps"] == 2  # nothing but the diffusion model to start from
    assert found["parameters"]["model"] == 203204 > found["parameters"]["active_at_most"] > 0
    assert "dry/model" in found["would_write"] and "dry/distill_config.json" in found["would_write"]
    assert found["estimate"] == {"seconds": 7.0}
    assert not Path("dry").exists()


@pytest.mark.parametrize(("method", "steps"), [("pecker", 25_000), ("distill", 25_000), ("esd", 200), ("salun", 200)])
def test_steps_are_the_methods_own(method, steps, capsys):
    base = ("--pretrained_model_name_or_path", "epsilon", "--output_dir", "dry", "--method", method)
    assert (
        main(["unlearn", *base, "--erase_concept", "cat", "--retain_prompts", "keep.txt", "--dry_run", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)["settings"]["max_train_steps"]
    assert found == steps == recipe.STEPS.get(method, 25_000)


@pytest.mark.parametrize("flags", [(*PECKER, "--mask", "saliency"), ESD], ids=["pecker", "esd"])
def test_a_sketch_has_all_but_the_weights(flags, monkeypatch):
    source = ("--pretrained_model_name_or_path", "epsilon", "--output_dir", "out", *FLAGS)
    job = Job.read(build_parser().parse_args(["unlearn", *source, *flags, "--mixed_precision", "bf16"]))
    monkeypatch.setattr(PipelineFolder, "tensors", None)
    monkeypatch.setattr(distill_masks, "compute_saliency", None)
    trainer = sketch(job)
    assert 0.9 * job.active_at_most < trainer.active.numel <= job.active_at_most
    assert {name: tuple(weight.shape) for name, weight in trainer.true_score.state_dict().items()} == job.base.shapes
    assert {weight.dtype for weight in trainer.true_score.parameters()} == {torch.bfloat16}


def test_what_a_dry_run_foretells(monkeypatch):
    timed = TimeEstimate(steps=2, step_seconds=3.0, setup_seconds=1.0, flops_per_second=1e9, by="network")
    monkeypatch.setattr(concept_estimate, "estimate_seconds", lambda trainer, steps, by: timed)
    source = ("--pretrained_model_name_or_path", "epsilon", "--output_dir", "out", *FLAGS, *PECKER, "--mask", "random")
    job = Job.read(build_parser().parse_args(["unlearn", *source, "--device", "cpu", "--guidance_scale", "1"]))
    values, text = ESTIMATE(job)
    memory, parts = values["memory_bytes"], values["memory_bytes"]["parts"]
    assert memory["peak"] == memory["step"] > memory["held"] > 3 * 0.9 * 4 * 203204
    assert parts["active_weights"] == parts["gradients"] <= 4 * 2 * job.active_at_most < 1.1 * parts["active_weights"]
    assert (values["seconds"], values["step_seconds"]) == (7.0, 3.0)
    assert "estimated memory on cpu" in text and "estimated time" in text
