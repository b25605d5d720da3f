"""Pickled networks: their weights come out, nothing in the file runs, and anything else is refused."""

import io
import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_data_pickles import HOSTILE, MARKER, PROTO, RAW, _Calls, _peak_of
from torch import nn

from pecker_fast.errors import FileFormatError
from pecker_fast.models.module_pickle import read_module


class OwnModule(nn.Module):
    """Of a package that is neither torch nor diffusers."""


class _Opens(nn.Linear):
    """As an attacker's class would be pickled: under the name of one that is known, with a state that acts."""

    def __reduce__(self):
        return nn.Linear, (), _Calls(os.mkdir, (MARKER,))


def _network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(5, 2, bias=False)))
    network[1].running_mean += 1
    return network.eval().requires_grad_(False).half()


def _read(tmp_path, content):
    file = tmp_path / "snapshot.pkl"
    file.write_bytes(content)
    return read_module(file, "ema")


def _refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFormatError, match="snapshot.pkl: ") as caught:
        _read(tmp_path, content)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / MARKER).exists()
    return str(caught.value)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_weights_come_out_as_they_went_in(protocol, tmp_path):
    network = _network()
    network.to(memory_format=torch.channels_last)
    network[1].register_buffer("left_out", torch.zeros(2), persistent=False)
    found = _read(tmp_path, pickle.dumps({"ema": network, "step": 5, "cost": 0.5}, protocol=protocol))
    expected = network.state_dict()
    assert found.class_name == "Sequential" and set(found.tensors) == set(expected)
    for name, tensor in expected.items():
        read = found.tensors[name].read()
        assert torch.equal(read, tensor) and read.dtype == tensor.dtype and read.is_contiguous()


def test_numbers_of_every_kind_and_shared_storages(tmp_path):
    network = nn.Module()
    base = torch.arange(24.0)
    for number, dtype in enumerate((torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8)):
        network.register_buffer(f"b{number}", (torch.arange(6) % 2).to(dtype))
    network.register_buffer("view", base[3:21].view(3, 6)[:, 1:4])
    network.register_buffer("scalar", torch.tensor(7.5))
    network.register_buffer("empty", torch.zeros(0, 3))
    network.register_buffer("none", None)
    found = _read(tmp_path, pickle.dumps({"ema": network})).tensors
    expected = network.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("protocol", [0, 5])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_objects_are_refused(kind, protocol, tmp_path, monkeypatch):
    _refused(tmp_path, monkeypatch, pickle.dumps({"ema": nn.Identity(), "more": HOSTILE[kind]}, protocol=protocol))


OTHER = {
    "another package": {"ema": OwnModule()},
    "a state that acts": {"ema": nn.Sequential(_Opens(1, 1))},
    "torch.load": {"ema": _Calls(torch.load, ("x.pt",))},
    "torch.save": {"ema": _Calls(torch.save, (1, MARKER))},
    "a storage that is a pickle": {"ema": _Calls(torch.storage._load_from_bytes, (pickle.dumps(HOSTILE["mkdir"]),))},
    "a call with arguments": {"ema": _Calls(nn.Linear, (1 << 20, 1 << 20))},
    "a function of torch.nn": {"ema": _Calls(nn.init.ones_, (torch.zeros(2),))},
    "getattr": {"ema": _Calls(getattr, (nn.Linear, "forward"))},
    "a hook": {"ema": nn.Linear(1, 1)},
    "no network": {"ema": [1]},
    "another key": {"G": _network()},
    "no dict": [_network()],
    "weights alone": {"ema": {"a": torch.zeros(2)}},
}
OTHER["a hook"]["ema"].register_forward_hook(print)


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_no_network_of_torch_or_diffusers_is_refused(kind, tmp_path, monkeypatch):
    message = _refused(tmp_path, monkeypatch, pickle.dumps(OTHER[kind]))
    if kind in ("another package", "torch.load", "getattr"):
        assert "do not trust this file" in message


@pytest.mark.parametrize("kind", RAW)
def test_hostile_bytes_are_refused(kind, tmp_path, monkeypatch):
    _refused(tmp_path, monkeypatch, RAW[kind])


def test_files_of_torch_save_are_named(tmp_path, monkeypatch):
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save({"ema": _network()}, stream, _use_new_zipfile_serialization=zipped)
        assert "is a file of torch.save" in _refused(tmp_path, monkeypatch, stream.getvalue())


def _storage():
    """Two halves, as torch pickles them."""
    stream = io.BytesIO()
    storage = torch.storage.TypedStorage([0.0, 0.0], dtype=torch.float16, _internal=True)
    torch.save(storage, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def test_headers_that_claim_more_than_the_file_has(tmp_path, monkeypatch):
    raw = _storage()
    described = [raw.replace(b"K\x02Nt", b"J" + struct.pack("<i", numel) + b"Nt") for numel in (1 << 30, -1, 3)]
    for damaged in (*described, raw[:-12] + (3).to_bytes(8, "little") + raw[-4:], raw[:-1], raw + b"\0"):
        content = {"ema": _Calls(torch.storage._load_from_bytes, (damaged,))}
        message = _refused(tmp_path, monkeypatch, pickle.dumps(content))
        assert "bytes of numbers; expected" in message or "than a storage of numbers" in message


def _pickles(*values):
    return b"".join(pickle.dumps(value, protocol=2) for value in values)


def test_storages_that_are_none(tmp_path, monkeypatch):
    """As torch's, but the description is a tuple of the file's own making, or the machine another one."""
    magic, little = (0x1950A86A20F9469CFC6C, 1001), {"little_endian": True}
    for raw in (
        _pickles(*magic, little, ("storage", "k", 2), ["k"]) + b"\x02" + bytes(11),
        _pickles(*magic, little, ("k", "k"), ["k"]) + bytes(8),
        _pickles(*magic, {"little_endian": False}, 1, 2) + bytes(8),
        _pickles(*magic, 1, 2, 3),
        _pickles(1, 2),
    ):
        content = {"ema": _Calls(torch.storage._load_from_bytes, (raw,))}
        _refused(tmp_path, monkeypatch, pickle.dumps(content))


def test_tensors_that_are_none(tmp_path, monkeypatch):
    storage = torch.zeros(6).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    for offset, size, stride in (
        (0, (7,), (1,)),
        (1, (2, 3), (3, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (7,), (0,)),
        (0, (2, 3), (3,)),
        (0, (1 << 30, 1 << 30, 0), (0, 0, 0)),
        (0, (2.0,), (1,)),
        (0, (1,) * 9, (1,) * 9),
    ):
        tensor = _Calls(torch._utils._rebuild_tensor_v2, (typed, offset, size, stride, False, OrderedDict()))
        message = _refused(tmp_path, monkeypatch, pickle.dumps({"ema": tensor}))
        assert "a tensor whose shape does not fit its numbers" in message


def test_networks_within_networks_end(tmp_path, monkeypatch):
    """A module that is its own child, and children that are shared, so that they are 2^40."""
    itself = nn.Module()
    itself._modules["a"] = itself
    shared = nn.Module()
    for _ in range(40):
        child, shared = shared, nn.Module()
        shared.a = shared.b = child
    for network in (itself, shared):
        message = _refused(tmp_path, monkeypatch, pickle.dumps({"ema": network}))
        assert "modules within one another, 20000 modules or 100000 tensors" in message


def test_wide_networks_end(tmp_path, monkeypatch):
    """A layer with many weights that stands in many places."""
    layer, network = nn.Module(), nn.Module()
    layer._parameters = dict.fromkeys(map(str, range(400)), nn.Parameter(torch.zeros(1)))
    network._modules = dict.fromkeys(map(str, range(300)), layer)
    for found in (network, nn.ModuleList([nn.Identity()] * 20_001)):
        assert "100000 tensors, which is no" in _refused(tmp_path, monkeypatch, pickle.dumps({"ema": found}))


def test_damaged_files_are_refused_or_read(tmp_path):
    """Never another error; a plain pickle has no checksum, so that damage to a number cannot be seen."""
    content = pickle.dumps({"ema": _network()[:2]})
    generator = np.random.default_rng(0)
    refused = 0
    for trial in range(90):
        damaged = bytearray(content)
        if trial % 3 == 0:
            del damaged[generator.integers(len(content)) :]
        else:
            damaged[generator.integers(len(content))] = generator.integers(256)
        try:
            for tensor in _read(tmp_path, bytes(damaged)).tensors.values():
                tensor.read()
        except FileFormatError:
            refused += 1
        else:
            assert trial % 3, "truncated, and read all the same"
    assert refused >= 40


def test_memory_stays_within_the_file(tmp_path):
    """Thirty thousand empty objects, and one long text that is fetched as often."""
    text = b"X" + struct.pack("<I", 30_000) + b"a" * 30_000
    content = PROTO + b"}X\x03\x00\x00\x00ema](" + text + b"q\x00" + b"h\x00" * 30_000 + b"}" * 30_000 + b"es."
    file = tmp_path / "snapshot.pkl"
    file.write_bytes(content)

    def read():
        with pytest.raises(FileFormatError, match="got a dict with"):
            read_module(file, "ema")

    assert _peak_of(read) < 80 * len(content)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileFormatError, match=r"nowhere.pkl: cannot be read"):
        read_module(tmp_path / "nowhere.pkl", "ema")
    with pytest.raises(FileFormatError, match="it is empty"):
        _read(tmp_path, b"")
