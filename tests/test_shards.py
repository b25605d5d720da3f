"""Weights in fewer bits and several files: they come back rounded once; damage and contradictions are refused."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

from pecker_fast.checkpoint import read_json, read_safetensors, write_json, write_safetensors
from pecker_fast.errors import FileFormatError
from pecker_fast.models import DDPMUNet, DigitsClassifier, load, load_config, save
from pecker_fast.models.shards import divide
from pecker_fast.written import NAME

INDEX = "diffusion_pytorch_model.safetensors.index.json"
FIRST, SECOND = (f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2))
LIMIT = 30_000


def network():
    torch.manual_seed(0)
    shape = {"image_size": 8, "channels": 1, "num_res_blocks": 1, "channel_mult": (1, 2), "norm_groups": 2}
    return DDPMUNet(width=4, attention_resolutions=(), **shape)


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Float16, in two files."""
    path = tmp_path_factory.mktemp("models") / "m"
    save(model, path, dtype=torch.float16, max_shard_size=LIMIT)
    return path


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "m")


def same(got, model, through=None, dtype=torch.float32):
    expected = {name: w if through is None else w.to(through) for name, w in model.state_dict().items()}
    return all(torch.equal(w, expected[name].to(dtype)) for name, w in got.state_dict().items())


def test_pieces_are_small_enough_and_hold_everything_once(model, folder):
    files = sorted(path.name for path in folder.iterdir())
    assert files == [NAME, "config.json", FIRST, SECOND, INDEX]
    assert all((folder / name).stat().st_size <= LIMIT for name in (FIRST, SECOND))
    index = read_json(folder / INDEX)
    assert list(index["weight_map"]) == list(model.state_dict())
    assert index["metadata"]["total_size"] == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert read_safetensors(folder / FIRST)[0]["conv_in.weight"].dtype == torch.float16


def test_it_loads_in_the_model_s_own_dtype_or_the_one_asked_for(model, folder):
    assert same(load(folder), model, torch.float16)
    assert not same(load(folder), model)
    assert same(load(folder, torch.float64), model, torch.float16, torch.float64)
    assert same(load(folder, torch.float16), model, torch.float16, torch.float16)


def test_either_alone_and_neither(model, tmp_path):
    save(model, tmp_path / "pieces", max_shard_size=2 * LIMIT)
    assert same(load(tmp_path / "pieces"), model)
    save(model, tmp_path / "half", dtype=torch.bfloat16, max_shard_size=10**9)
    assert not (tmp_path / "half" / INDEX).exists()
    assert same(load(tmp_path / "half"), model, torch.bfloat16)
    save(model, tmp_path / "plain")
    assert load_config(tmp_path / "plain").keys() == {"_class_name", "_format_version", "architecture", "generation"}
    save(model.half(), tmp_path / "own")
    model.float()
    assert {w.dtype for w in load(tmp_path / "own").state_dict().values()} == {torch.float16}


def test_an_older_folder_s_files_are_not_read(model, damaged):
    """Those of an older result go; beside other files of weights config.json says which count."""
    other = network()
    with torch.no_grad():
        other.conv_in.bias.fill_(3.0)
    save(other, damaged, overwrite=True)
    assert not list(damaged.glob("*-of-*")) and not (damaged / INDEX).exists() and same(load(damaged), other)
    (damaged / INDEX).write_text("{}")
    assert same(load(damaged), other)
    (damaged / INDEX).unlink()
    save(model, damaged, max_shard_size=LIMIT * 2, overwrite=True)
    assert same(load(damaged), model)


def test_integers_stay_integers(tmp_path):
    judge = DigitsClassifier(width=2)
    judge(torch.randn(4, 1, 8, 8))
    save(judge, tmp_path / "judge", dtype=torch.float16)
    loaded = load(tmp_path / "judge").state_dict()
    counts = [name for name, tensor in judge.state_dict().items() if not tensor.is_floating_point()]
    assert all(torch.equal(loaded[name], judge.state_dict()[name]) for name in counts)


def test_what_cannot_be_stored_so_is_refused_and_nothing_written(model, tmp_path):
    with pytest.raises(ValueError, match=r"max_shard_size: expected at least \d+ bytes, for .* alone, got 300"):
        save(model, tmp_path / "m", max_shard_size=300)
    large = network()
    with torch.no_grad():
        large.conv_in.bias[0] = 1e5
    with pytest.raises(ValueError, match=r"conv_in.bias goes up to 1e\+05, beyond what torch.float16"):
        save(large, tmp_path / "m", dtype=torch.float16)
    large.conv_in.half()
    with pytest.raises(ValueError, match="in several"):
        save(large, tmp_path / "m", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_groups_keep_the_order_and_start_a_new_file_only_when_they_must():
    tensors = {str(i): torch.zeros(100 * (i + 1)) for i in range(6)}
    groups = divide(tensors, 4000)
    assert [name for group in groups for name in group] == list(tensors)
    assert len(groups) == 4 and len(divide(tensors, 10**6)) == 1


@pytest.mark.parametrize("name", [FIRST, SECOND, INDEX])
def test_missing_and_truncated_files_are_named(damaged, name):
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(FileFormatError, match=name):
        load(damaged)
    (damaged / name).unlink()
    with pytest.raises(FileFormatError, match=name):
        load(damaged)


@pytest.mark.parametrize(
    "where",
    ["../m.safetensors", "/etc/passwd", f"sub/{SECOND}", f"../m/{SECOND}", f"{SECOND}\n", "config.json", "", 3, None],
)
def test_an_index_that_leads_elsewhere_is_refused(damaged, where):
    index = read_json(damaged / INDEX)
    index["weight_map"]["conv_in.bias"] = where
    write_json(damaged / INDEX, index)
    with pytest.raises(FileFormatError, match=r"conv_in.bias is said to be in"):
        load(damaged)


def change_map(folder, index):
    index["weight_map"]["conv_in.bias"] = SECOND


def forget_one(folder, index):
    del index["weight_map"]["conv_in.bias"]


def no_map(folder, index):
    index["weight_map"] = {}


def other_size(folder, index):
    index["metadata"]["total_size"] += 1


def swap_file(folder, index):
    write_safetensors(folder / SECOND, {"conv_out.bias": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_map, r"first: conv_in.bias"),
        (forget_one, r"first: conv_in.bias"),
        (no_map, "weight_map is missing or empty"),
        (other_size, "total_size"),
        (swap_file, f"{SECOND}: does not hold"),
    ],
)
def test_files_that_contradict_the_index_are_refused(damaged, change, message):
    index = read_json(damaged / INDEX)
    change(damaged, index)
    write_json(damaged / INDEX, index)
    with pytest.raises(FileFormatError, match=message):
        load(damaged)


@pytest.mark.parametrize(("key", "value"), [("dtype", "float8"), ("dtype", []), ("weights", "../x"), ("weights", 1)])
def test_configs_that_name_something_else_are_refused(damaged, key, value):
    write_json(damaged / "config.json", {**read_json(damaged / "config.json"), key: value})
    with pytest.raises(FileFormatError, match=f"{key} is "):
        load(damaged)


def test_mutated_indices_load_or_are_refused(damaged):
    path = damaged / INDEX
    whole, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(40):
        mutated = bytearray(whole)
        mutated[draw.randrange(len(whole))] = draw.choice(b'0123456789{}[]",:.-/ abc')
        path.write_bytes(mutated)
        try:
            load(damaged)
        except FileFormatError:
            refused += 1
    assert refused > 25
    assert json.loads(whole)
