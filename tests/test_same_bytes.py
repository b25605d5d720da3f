"""The same content gives the same bytes: in every process, in any order, and as stock safetensors reads them."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from pecker_fast.checkpoint import write_safetensors
from pecker_fast.tensor_file import _DTYPES, bytes_of, write_tensors

TIMED = {"pretrain.json", "state.json", "manifest.json"}
"""How long something took is measured, and differs."""


def _written(tensors, metadata=None):
    file = io.BytesIO()
    write_tensors(file, tensors, metadata or {})
    return file.getvalue()


def _run(folder, hash_seed):
    folder.mkdir()
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("same_bytes.py")
    return subprocess.Popen([sys.executable, script, folder], env=environment, stderr=subprocess.PIPE, text=True)


def test_two_processes_write_the_same_bytes(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    processes = [_run(folder, seed) for folder, seed in zip(folders, ("1", "4242"), strict=True)]
    for process in processes:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error
    first, second = (
        {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file() and path.name not in TIMED
        }
        for folder in folders
    )
    assert {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)} == set()
    kinds = (
        "mask",
        "delta/pecker_delta",
        "out/delta/pecker_delta",
        "out/checkpoint-2/state",
        "edited/diffusion_pytorch_model",
    )
    assert {f"{kind}.safetensors" for kind in kinds} <= first.keys()


def test_the_order_of_names_does_not_matter():
    tensors = {"b": torch.ones(3), "a": torch.zeros(2).bool(), "ä": torch.arange(5), "c": torch.ones(1, 2).half()}
    metadata = {"z": "1", "a": "2", "é": '\n"', "format": "pt"}
    backwards = [dict(reversed(values.items())) for values in (tensors, metadata)]
    content = _written(tensors, metadata)
    assert content == _written(*backwards)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header) == ["__metadata__", "ä", "b", "c", "a"]
    assert list(header["__metadata__"]) == sorted(metadata)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"b": torch.ones(3), "a": torch.zeros(2, 2)},
        {"ä": torch.arange(5), "scalar": torch.tensor(7.0), "odd": torch.ones(3, dtype=torch.uint8)},
        {"empty": torch.empty(0, 3), "x": torch.ones(1).bfloat16()},
    ],
)
def test_where_the_library_has_one_order_the_bytes_are_its_own(tensors, metadata):
    assert _written(tensors, metadata) == save(tensors, metadata or None)


def test_stock_safetensors_reads_every_dtype_and_each_begins_where_it_should(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {str(dtype): torch.arange(1, 4).to(dtype) for dtype in _DTYPES}
    write_safetensors(path, tensors, {"two": "2", "one": "1"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"two": "2", "one": "1"}
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    assert begin % 8 == 0
    for name, entry in json.loads(content[8:begin]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors[name].element_size() == 0, name


def test_nothing_large_is_copied():
    """Weights go from their memory into the file, one tensor after the other."""
    tensors = {name: torch.randn(100, 100) for name in "abc"}
    for tensor in tensors.values():
        assert np.shares_memory(bytes_of(tensor), tensor.numpy())
    pieces = []
    write_tensors(type("Sink", (), {"write": lambda _, piece: pieces.append(piece)})(), tensors, {})
    assert [len(piece) for piece in pieces[1:]] == [40_000] * 3
    assert all(
        np.shares_memory(np.asarray(piece), tensors[name].numpy())
        for piece, name in zip(pieces[1:], "abc", strict=True)
    )


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.empty(2, device="meta"), "expected a dense tensor with values"),
        (torch.eye(2).to_sparse(), "expected a dense tensor with values"),
        (torch.ones(2, dtype=torch.complex128), "complex128 has no place"),
    ],
)
def test_tensors_without_bytes_of_their_own_are_named(tmp_path, tensor, text):
    with pytest.raises(ValueError, match=f"weight: .*{text}"):
        write_safetensors(tmp_path / "x", {"weight": tensor})
