"""The record of deltas beside a model's weights: little on the disk cannot ask for a large memory."""

import base64
import json
import tracemalloc
import zlib

import pytest
from torch import nn

from pecker_fast.checkpoint import write_safetensors
from pecker_fast.delta import Ledger
from pecker_fast.errors import FileFormatError
from pecker_fast.mask import BlockMask
from pecker_fast.models.storage import DELTAS_ATTRIBUTE

NAME = "pecker_deltas.json"
MIB = 1 << 20


def _packed(size, byte=b"\xff"):
    machine = zlib.compressobj(9)
    pieces = [machine.compress(byte * min(MIB, size - start)) for start in range(0, size, MIB)]
    return base64.b64encode(b"".join([*pieces, machine.flush()])).decode()


def _entry(blocks, bits, sizes=None, grids=None):
    header = {
        "grids": json.dumps({"w": [[blocks, 2], [blocks, 2, 1], [1, 2]]}) if grids is None else grids,
        "bytes": json.dumps([-(-blocks // 8)] if sizes is None else sizes),
        "total": str(2 * blocks),
        "density_asked": "1.0",
        "mass": "",
    }
    return {"name": "x", "before": "0", "after": "0", "mask": header, "bits": bits}


def _ledger(*entries):
    return {"format": "pecker_fast.deltas", "version": 1, "deltas": list(entries)}


BOMBS = {
    "more bits than the header says": lambda: _ledger(_entry(80, _packed(64 * MIB))),
    "a header that claims as many": lambda: _ledger(_entry(8 * 64 * MIB, _packed(64 * MIB))),
    "a weight that claims them and one that takes them back": lambda: _ledger(
        _entry(8 * 64 * MIB, _packed(64 * MIB), [64 * MIB, 1 - 64 * MIB])
    ),
    "the largest number": lambda: _ledger(_entry(8, _packed(MIB), [2**63])),
    "not a number": lambda: _ledger(_entry(8, _packed(MIB), [1e400])),
    "nothing, and bits": lambda: _ledger(_entry(0, _packed(64 * MIB), [])),
    "something behind the bits": lambda: _ledger(
        _entry(8, base64.b64encode(zlib.compress(b"\xff") + b"x" * MIB).decode())
    ),
    "many that are each within reason": lambda: _ledger(*[_entry(MIB, _packed(MIB // 8))] * 40),
    "depth": lambda: _ledger(_entry(8, _packed(1), grids="[" * 100_000)),
    "a list of weights": lambda: _ledger(_entry(8, _packed(1), grids="[1]")),
    "a text for an entry": lambda: _ledger("x"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_before_they_take_memory(tmp_path, bomb, monkeypatch):
    monkeypatch.setattr("pecker_fast.delta.ledger._FREE", MIB)
    values = BOMBS[bomb]()
    (tmp_path / NAME).write_text(json.dumps(values))
    model = nn.Linear(2, 8)
    model.__dict__[DELTAS_ATTRIBUTE] = values
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=rf"{NAME}: damaged record of applied deltas"):
            Ledger.load(tmp_path)
        with pytest.raises(ValueError, match="not what pecker_fast writes"):
            Ledger.of(model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * 8 * MIB if "many" in bomb else peak < 8 * MIB


def _full(blocks):
    return _ledger(_entry(blocks, _packed(-(-blocks // 8))))


def test_what_fits_beside_its_weights_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pecker_fast.delta.ledger._FREE", 1000)
    for blocks in (8, 1000):
        (tmp_path / NAME).write_text(json.dumps(_full(blocks)))
        assert Ledger.load(tmp_path).records[0].mask.parameters["w"].numel == 2 * blocks
    (tmp_path / NAME).write_text(json.dumps(_full(5000)))
    with pytest.raises(FileFormatError, match="keep it beside its weights"):
        Ledger.load(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(4 * 5000))
    assert len(Ledger.load(tmp_path)) == 1
    model = nn.Linear(2, 5000, bias=False)
    model.__dict__[DELTAS_ATTRIBUTE] = _full(5000)
    assert len(Ledger.of(model)) == 1


@pytest.mark.parametrize("grids", ["[1]", "[" * 100_000, '{"w": 1}', '{"w": [[1e400], [1], [1]]}', "{}x"])
def test_hostile_headers_of_masks_are_damage_and_no_crash(tmp_path, grids):
    tensors, header = BlockMask({}, 1, 0.5, None).to_tensors()
    write_safetensors(tmp_path / "mask", tensors, header | {"grids": grids})
    with pytest.raises(FileFormatError, match="mask: damaged mask"):
        BlockMask.load(tmp_path / "mask")
