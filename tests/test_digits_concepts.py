"""The study of concepts on digits, in a few steps: that it runs and is exact, not how well it forgets."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

import digits_concepts as study_script  # noqa: E402
import digits_concepts_tables as tables  # noqa: E402
import digits_pipelines as digits  # noqa: E402
import train_digits_pipeline as example  # noqa: E402

from pecker_fast import cli  # noqa: E402
from pecker_fast.data import load_digits  # noqa: E402


@pytest.fixture(scope="module")
def monkeymodule():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def study(tmp_path_factory, monkeymodule):
    """A trained pipeline; commands run in this process, which has imported everything already."""
    folder = tmp_path_factory.mktemp("study")
    monkeymodule.setenv("PECKER_FAST_CACHE", str(folder / "cache"))
    monkeymodule.setattr(digits, "load_judge", lambda progress: example.load_judge(progress=progress, short=True))
    monkeymodule.setattr(digits, "load_digits", lambda: load_digits().subset(torch.arange(100)))
    monkeymodule.setitem(digits.MANY_STEPS, "num_inference_steps", 2)
    attack = {"max_steps": 1, "every": 1, "batch_size": 2, "samples": 2}
    monkeymodule.setattr(digits, "ATTACK", digits.ATTACK | attack)
    monkeymodule.setattr(study_script, "SHARED", study_script.SHARED | {"mask_batches": 1})
    made = study_script.Study(folder / "out", short=True)
    example.main(made.pipeline, short=True)
    return made


@pytest.fixture(scope="module")
def results(study, monkeymodule):
    """Of one erasure, which takes one step, and of the control, which takes many."""

    def command(*arguments):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if arguments[0] == "-m":
                assert cli.main([str(argument) for argument in arguments[2:]]) == 0
            else:
                print(digits.fingerprint(digits.load(arguments[1])))
        return SimpleNamespace(stdout=said.getvalue())

    monkeymodule.setattr(study_script, "command", command)
    monkeymodule.setattr(study_script, "RUNS", {"pecker": study_script.RUNS["pecker"]})
    monkeymodule.setattr(study_script, "CONTROLS", (study_script.RETRAINED,))
    monkeymodule.setattr(tables, "SHOWN", ())
    study_script.write_json(study.folder / "parts" / "pipeline.json", {"seconds": 1.0})
    study_script.main(study.folder, results_dir=study.folder / "docs", short=True)
    return study_script.read_json(study.folder / "docs" / "concepts.json")


def test_every_word_of_a_caption_is_a_token(study):
    tokenizer = digits.load(study.pipeline).tokenizer
    for caption in (template.format(word) for template in example.TEMPLATES for word in example.WORDS):
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2


def test_latents_have_unit_deviation(study):
    vae = digits.load(study.pipeline).vae
    images = example.load_images()[0][:50]
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1.0, abs=1e-3)


def test_prompt_files_are_the_captions():
    folder = ROOT / "examples" / "prompts"

    def captions(*words):
        return [template.format(word) for word in words for template in example.TEMPLATES]

    forget, override = example.WORDS[study_script.FORGET], example.WORDS[study_script.OVERRIDE]
    kept = [word for word in example.WORDS if word != forget]
    files = {"digits_forget": captions(forget), "digits_override": captions(override), "digits_retain": captions(*kept)}
    for name, lines in files.items():
        assert (folder / f"{name}.txt").read_text().splitlines() == lines


def test_what_comes_out_is_exact(results):
    before, after = results["before"], results["runs"]["pecker"]["1"]
    assert before["reloaded"]["same_in_new_process"] and after["reloaded"]["same_in_new_process"]
    assert after["reloaded"]["sha256"] != before["reloaded"]["sha256"]
    assert after["delta"]["applied_bit_for_bit"] and after["delta"]["reverted_bit_for_bit"]
    assert after["delta"]["delta_bytes"] < after["delta"]["unet_bytes"] / 2


def test_every_run_is_judged_and_attacked(results):
    control = results["runs"][study_script.RETRAINED]["1"]
    assert results["runs"]["pecker"]["1"]["unlearn"]["one_step"] and not control["unlearn"]["one_step"]
    for run in (results["runs"]["pecker"]["1"], control):
        assert all(sum(row) == results["samples"] for row in run["judged"]["seen"])
        assert run["relearned"]["curve"][-1][0] == 1 or run["relearned"]["steps_to_return"] == 0


def test_parts_that_are_done_are_not_repeated(study, results, monkeypatch):
    monkeypatch.setattr(study_script, "command", None)
    assert study.run("pecker", 1) == results["runs"]["pecker"]["1"]
    picture = study.folder / "docs" / "before_after.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_attack_leaves_the_pipeline_as_it_is(study, results):
    erased = study.folder / "pecker-1" / "model"
    assert digits.fingerprint(digits.load(erased)) == results["runs"]["pecker"]["1"]["reloaded"]["sha256"]


def test_another_pipeline_is_not_the_same(study, results):
    before, after = study.pipeline, study.folder / "pecker-1" / "model"
    assert study_script.digest(before) == study_script.digest(before) != study_script.digest(after)
    assert not study_script.same(before, after)


def test_tables(results):
    text = tables.everything(results)
    assert text.count("| yes | yes | yes |") == 1 and "NO" not in text
    seen = [[0] * 10 for _ in range(10)]
    for digit, row in enumerate(seen):
        row[digit] = 10
    seen[3] = [0, 0, 0, 1, 0, 0, 0, 0, 9, 0]
    seen[5] = [0, 0, 0, 1, 0, 9, 0, 0, 0, 0]
    assert tables.unlearned(results, [{"seen": seen}] * 2) == (18, 20)
    assert tables.others(results, {"seen": seen}) == pytest.approx((8 + 0.9) / 9)


def test_targets_that_are_missed_are_named(results):
    seen = [[0] * 10 for _ in range(10)]
    for digit, row in enumerate(seen):
        row[digit if digit != 3 else 8] = 10
    run = results["runs"]["pecker"]["1"]
    met = {**results, "before": {**results["before"], "judged": {"seen": seen}}}
    met["runs"] = {"pecker": {"1": {**run, "judged": {"seen": seen}}}}
    assert study_script.missed(met) == []
    worse = [*seen[:3], [0, 0, 0, 2, 0, 0, 0, 0, 8, 0], *seen[4:9], [5] + [0] * 8 + [5]]
    met["runs"]["pecker"]["1"]["judged"] = {"seen": worse}
    assert study_script.missed(met) == ["pecker, seed 1: unlearned 80.0%"]
    met["runs"]["pecker"]["1"]["judged"] = {"seen": seen[:1] * 9 + seen[9:]}
    assert "others recognised" in study_script.missed(met)[-1]
    met["runs"]["pecker"]["1"]["judged"] = {"seen": seen}
    met["runs"]["pecker"]["1"]["delta"] = {**run["delta"], "reverted_bit_for_bit": False}
    assert study_script.missed(met) == ["pecker, seed 1: reverted_bit_for_bit is not so"]


def test_a_folder_of_another_study_is_refused(study):
    with pytest.raises(ValueError, match="has parts of a study with other settings"):
        study_script.Study(study.folder, short=True, pipeline_seed=5)
