"""Folders appear complete or not at all; damaged files are refused by name."""

import json
import os
import random

import pytest
import torch

from pecker_fast import checkpoint
from pecker_fast.checkpoint import atomic_folder, read_json, read_safetensors, write_json, write_safetensors
from pecker_fast.errors import FileFormatError


def _names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "new" / "model"
    with atomic_folder(target) as unfinished:
        assert unfinished.parent == target.parent
        (unfinished / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    assert _names(target.parent) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_failure_leaves_everything_as_it_was(tmp_path, error):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(type(error)), atomic_folder(target) as unfinished:
        (unfinished / "half.txt").write_text("half")
        raise error
    assert _names(tmp_path) == ["model"]
    assert _names(target) == ["old.txt"]


def test_replacement_keeps_what_the_new_folder_does_not_have(tmp_path):
    target = tmp_path / "model"
    (target / "checkpoint-5").mkdir(parents=True)
    (target / "checkpoint-5" / "x").write_text("x")
    (target / "config.json").write_text("old")
    with atomic_folder(target) as unfinished:
        (unfinished / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert (target / "checkpoint-5" / "x").read_text() == "x"
    assert _names(tmp_path) == ["model"]


def test_older_folder_returns_when_the_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename = os.rename

    def fail_for_the_new_one(source, destination):
        if ".tmp-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(checkpoint.os, "rename", fail_for_the_new_one)
    with pytest.raises(FileFormatError, match="No space left"), atomic_folder(target) as unfinished:
        (unfinished / "new.txt").write_text("new")
    assert _names(tmp_path) == ["model"]
    assert _names(target) == ["old.txt"]


def test_unwritable_targets_are_named(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FileFormatError, match="file: is a file"), atomic_folder(file):
        pass
    with pytest.raises(FileFormatError, match=r"cannot write into .*file"), atomic_folder(file / "model"):
        pass
    assert file.read_text() == "x"

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    # By hand, because a test that runs as root may write anywhere.
    monkeypatch.setattr(checkpoint.Path, "mkdir", refuse)
    with (
        pytest.raises(FileFormatError, match=f"{tmp_path.name} .Permission denied"),
        atomic_folder(tmp_path / "m"),
    ):
        pass


def test_json_round_trip(tmp_path):
    values = {"a": [1, 0.1, 1e-300, None], "b": {"c": "ä"}}
    write_json(tmp_path / "v.json", values)
    assert read_json(tmp_path / "v.json") == values
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "v.json", {"a": float("nan")})
    with pytest.raises(FileFormatError, match=r"missing.v\.json"):
        write_json(tmp_path / "missing" / "v.json", values)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"nul", b"[" * 100_000])
def test_damaged_json_is_refused(tmp_path, content):
    path = tmp_path / "v.json"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"v\.json"):
        read_json(path)


def test_missing_files_are_refused(tmp_path):
    for read in (read_json, read_safetensors):
        for path in (tmp_path / "absent", tmp_path):
            with pytest.raises(FileFormatError, match=path.name):
                read(path)


def test_tensors_round_trip_in_any_layout(tmp_path):
    path = tmp_path / "t.safetensors"
    flat = torch.arange(24.0)
    tensors = {
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "view": flat[4:10],
        "other_view": flat[8:].view(4, 4).T,
        "bf16": torch.randn(3).bfloat16(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    write_safetensors(path, tensors, {"format": "pt"})
    loaded, header = read_safetensors(path)
    assert header == {"format": "pt"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    write_safetensors(path, {"a": torch.zeros(1)})
    assert read_safetensors(path)[1] == {}
    with pytest.raises(FileFormatError, match="cannot be written"):
        write_safetensors(tmp_path / "absent" / "t", {"a": torch.zeros(1)})


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {"a": torch.ones(1000)})
    loaded, _ = read_safetensors(path)
    with path.open("r+b") as file:
        file.seek(200)
        file.write(b"\x07" * 2000)
    assert torch.equal(loaded["a"], torch.ones(1000))


def test_damaged_safetensors_never_crash(tmp_path):
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {"a": torch.ones(4, 4), "b": torch.arange(3)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"t\.safetensors"):
            read_safetensors(path)
    draw = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_safetensors(path)
        except FileFormatError:
            pass


def test_folder_permissions_are_ordinary(tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").write_text("")
    with atomic_folder(tmp_path / "model") as unfinished:
        write_safetensors(unfinished / "file", {"a": torch.zeros(1)})
    assert (tmp_path / "model").stat().st_mode == plain.stat().st_mode
    assert (tmp_path / "model" / "file").stat().st_mode == (plain / "file").stat().st_mode


def test_json_file_is_readable_text(tmp_path):
    write_json(tmp_path / "v.json", {"b": 1, "a": 2})
    text = (tmp_path / "v.json").read_text()
    assert text == '{\n  "b": 1,\n  "a": 2\n}\n'
    assert json.loads(text) == {"b": 1, "a": 2}
