"""``pecker-fast delta``: from one model folder to another and back, and how it says no."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import DDIM, _error, _tiny
from test_delta import halves, moved, same

from pecker_fast import Delta, models
from pecker_fast.checkpoint import read_safetensors
from pecker_fast.cli import main
from pecker_fast.delta import Ledger
from pecker_fast.written import NAME

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Model folders base, first, second; masks a and b without a block in common; an empty folder to work in."""
    base = _tiny()
    models.save(base, tmp_path / "base", DDIM)
    for name, mask in zip("ab", halves(base), strict=True):
        mask.save(tmp_path / f"{name}.safetensors")
        models.save(moved(base, mask), tmp_path / f"after_{name}", DDIM)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def delta(action, *arguments):
    return main(["delta", action, *map(str, arguments), "--quiet"])


def extract(name, output):
    given = ("--before", "../base", "--after", f"../after_{name}", "--mask_path", f"../{name}.safetensors")
    assert delta("extract", *given, "--output_dir", output) == 0


def weights(folder):
    return read_safetensors(Path(folder) / WEIGHTS)[0]  # whatever bits they are


def listing(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_there_and_back(here, capsys):
    extract("a", "da")
    extract("b", "db")
    assert Delta.load("da").name == "da"
    assert delta("apply", "--model", "../base", "--delta", "da", "--output_dir", "m") == 0
    assert same(weights("m"), weights("../after_a"))
    assert models.load_config("m") == models.load_config("../base")
    assert delta("apply", "--model", "m", "--delta", "db", "--output-dir", "both") == 0
    assert [record.name for record in Ledger.load("both")] == ["da", "db"]
    assert delta("revert", "--model", "both", "--delta", "da", "--output_dir", "only_b") == 0
    assert same(weights("only_b"), weights("../after_b"))
    assert delta("revert", "--model", "both", "--delta", "da", "db", "--output_dir", "none") == 0
    assert same(weights("none"), weights("../base")) and len(Ledger.load("none")) == 0
    assert (here / "none" / WEIGHTS).read_bytes() == (here.parent / "base" / WEIGHTS).read_bytes()
    assert capsys.readouterr().out == ""


def test_several_at_once_and_json(here, capsys):
    extract("a", "da")
    extract("b", "db")
    assert main("delta apply --model ../base --delta da db --output_dir m --json --quiet".split()) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["carried"] == ["da", "db"] and values["output_dir"] == "m"
    assert values["weights"] == Delta.load("da").mask.numel + Delta.load("db").mask.numel
    Delta.load("da").revert(model := weights("m"), ledger=Ledger.load("m"))
    assert same(model, weights("../after_b"))


def test_other_files_go_along_and_other_weights_do_not(here):
    extract("a", "da")
    base = here.parent / "base"
    for name in ("generation.json", "README.md", "model.bin", "other.safetensors"):
        (base / name).write_text("x")
    (base / "sub").mkdir()
    assert delta("apply", "--model", base, "--delta", "da", "--output_dir", "m") == 0
    names = {path.name for path in (here / "m").iterdir()}
    kept = {"config.json", WEIGHTS, "generation.json", "README.md"}
    assert names == kept | {"pecker_deltas.json", "config.yaml", NAME}


def test_a_diffusers_folder(here):
    diffusers = pytest.importorskip("diffusers")
    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    network = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **small, **blocks)
    mask, _ = halves(network)
    mask.save("mask.safetensors")
    after = moved(network, mask)
    network.save_pretrained("unet")
    after.save_pretrained("after")
    files = ("--before", "unet", "--after", "after", "--mask_path", "mask.safetensors")
    assert delta("extract", *files, "--output_dir", "d") == 0
    assert delta("apply", "--model", "unet", "--delta", "d", "--output_dir", "edited") == 0
    assert same(diffusers.UNet2DModel.from_pretrained("edited"), after)
    Delta.load("d").apply(network)
    assert same(network, after)


def test_info(here, capsys):
    extract("a", "da")
    extract("b", "db")
    shutil.copytree("da", "dc")
    assert main("delta info --delta da db --json".split()) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["disjoint"] is True and values["overlaps"] == []
    assert values["deltas"]["da"]["file"]["bytes"] == (here / "da/pecker_delta.safetensors").stat().st_size
    assert values["deltas"]["db"]["weights"] == Delta.load("db").mask.numel
    assert main("delta info --delta da db".split()) == 0
    text = capsys.readouterr().out
    assert "they stack in any order" in text and "Delta('da':" in text
    assert main("delta info --delta da db dc --json".split()) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["disjoint"] is False and [entry["deltas"] for entry in values["overlaps"]] == [["da", "dc"]]
    assert main("delta info --delta da dc".split()) == 0
    assert "do not stack: da and dc" in capsys.readouterr().out
    assert main("delta info --delta da".split()) == 0
    assert "stack" not in capsys.readouterr().out


@pytest.mark.parametrize("action", ["extract", "apply", "revert", "info"])
def test_help_has_an_example(action, capsys):
    assert main(["delta", action, "--help"]) == 0
    assert f"example:\n  pecker-fast delta {action}" in capsys.readouterr().out


def test_dry_runs_check_everything_and_write_nothing(here, capsys):
    extract("a", "da")
    before = listing(here.parent)
    for arguments in (
        "extract --before ../base --after ../after_b --mask_path ../b.safetensors --output_dir db",
        "apply --model ../base --delta da --output_dir m",
        "revert --model ../after_a --delta da --output_dir m",
    ):
        assert main(["delta", *arguments.split(), "--dry-run", "--json"]) == 0
        values = json.loads(capsys.readouterr().out)
        assert values["dry_run"] is True and values["would_write"] and values["parameters"]["changed"] > 0
    assert main("delta apply --model ../after_a --delta da --output_dir m --dry_run".split()) == 3
    assert "is applied already" in _error(capsys, "delta")
    assert listing(here.parent) == before and not (here / "m").exists()


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("apply --model ../after_a --delta da", "../after_a and da: delta 'da' is applied already"),
        ("apply --model ../base --delta da da", "../base and da: delta 'da' is applied already"),
        ("revert --model ../base --delta da", "delta 'da' is not applied"),
        ("apply --model ../after_b --delta da", "the model is not the base of delta 'da'"),
        ("apply --model ../base --delta da nowhere", "nowhere: no such folder"),
        ("apply --model nowhere --delta da", "nowhere: no such folder"),
        ("apply --model da --delta da", "weights are missing"),
        ("apply --model . --delta da", "got 0 files"),
        ("apply --model ../base --delta ../base", "pecker_config.json: cannot be read"),
        ("extract --before ../base --after ../after_a --mask_path ../b.safetensors", "outside the mask differ"),
        ("extract --before ../base --after ../after_a --mask_path nowhere", "nowhere: no such file"),
        ("extract --before ../base --after ../wide --mask_path ../a.safetensors", "expected float32"),
        ("extract --before ../base --after ../after_a --mask_path ../wide.safetensors", "the mask is for"),
    ],
)
def test_what_does_not_fit_is_a_file_error(arguments, text, here, capsys):
    extract("a", "da")
    wide = _tiny(width=8)
    models.save(wide, here.parent / "wide", DDIM)
    halves(wide)[0].save(here.parent / "wide.safetensors")
    before = listing(here.parent)
    assert main(["delta", *arguments.split(), "--output_dir", "out"]) == 3
    assert text in _error(capsys, "delta")
    assert listing(here.parent) == before and not (here / "out").exists()


def test_damaged_folders_are_file_errors(here, capsys):
    extract("a", "da")
    assert delta("apply", "--model", "../base", "--delta", "da", "--output_dir", "m") == 0
    for path in (here / "da/pecker_delta.safetensors", here / "m/pecker_deltas.json", here / "m" / WEIGHTS):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert delta("revert", "--model", "m", "--delta", "da", "--output_dir", "out") == 3
        assert path.name in _error(capsys, "delta")
        path.write_bytes(whole)
    assert not (here / "out").exists()
    assert delta("revert", "--model", "m", "--delta", "da", "--output_dir", "out") == 0


def test_unwritable_output(here, capsys):
    extract("a", "da")
    (here / "file").write_text("in the way")
    assert delta("apply", "--model", "../base", "--delta", "da", "--output_dir", "file/out") == 3
    assert "cannot write into" in _error(capsys, "delta")
    assert {path.name for path in here.iterdir()} == {"da", "file"}


@pytest.mark.parametrize("arguments", ["", "squash", "apply --model m", "info", "info --delta d --model m"])
def test_usage(arguments, here, capsys):
    assert main(["delta", *arguments.split()]) == 2
    assert "error:" in capsys.readouterr().err


def test_files_without_an_index_are_refused(here, capsys):
    extract("a", "da")
    base = here.parent / "base"
    (base / WEIGHTS).rename(base / "model-00001-of-00002.safetensors")
    torch.save({}, base / "model.bin")
    shutil.copy(base / "model-00001-of-00002.safetensors", base / "model-00002-of-00002.safetensors")
    assert delta("apply", "--model", base, "--delta", "da", "--output_dir", "m") == 3
    assert "got 2 files; save the model again" in _error(capsys, "delta")
