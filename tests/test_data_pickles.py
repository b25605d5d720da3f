"""Pickles that are not data: nothing in them runs, and they are refused at once."""

import builtins
import functools
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import bombs
import image_sets
import numpy as np
import pytest

from pecker_fast.data import load_dataset
from pecker_fast.data.plain_pickle import read_plain_pickle
from pecker_fast.errors import FileFormatError

MARKER = "pickle_ran"


class _Calls:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class _State(dict):
    """Pickled with BUILD on an object whose class has ``__setstate__``."""

    def __setstate__(self, state):
        os.mkdir(state)

    def __reduce__(self):
        return _State, (), MARKER


def _nested(depth):
    value = _Calls(os.mkdir, (MARKER,))
    for _ in range(depth):
        value = _Calls(functools.partial, (print, value))
    return value


PROTO = b"\x80\x02"
HOSTILE = {
    "system": _Calls(os.system, (f"mkdir {MARKER}",)),
    "mkdir": _Calls(os.mkdir, (MARKER,)),
    "eval": _Calls(eval, (f"__import__('os').mkdir('{MARKER}')",)),
    "exec": _Calls(exec, (f"import os; os.mkdir('{MARKER}')",)),
    "getattr": _Calls(getattr, (_State, "__setstate__")),
    "partial": _Calls(functools.partial, (os.mkdir, MARKER)),
    "numpy.load": _Calls(np.load, ("x.npy", None, True)),
    "numpy.array": np.array([{}], dtype=object),
    "numpy of floats": np.zeros(3),
    "open": _Calls(open, (MARKER, "w")),
    "import": _Calls(builtins.__import__, ("antigravity",)),
    "nested": _nested(20),
    "setstate": _State(),
    "object": pickle.PickleError(),
    "set": {1, 2},
}
RAW = {
    "INST": b"(S'mkdir pickle_ran'\nios\nsystem\n.",
    "OBJ": PROTO + b"(cos\nmkdir\nU\x0apickle_rano.",
    "NEWOBJ": PROTO + b"cos\nmkdir\nU\x0apickle_ran\x85\x81.",
    "text protocol": b"cos\nmkdir\n(S'pickle_ran'\ntR.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
    "name that is no string": b"\x80\x04K\x01K\x02\x93.",
    "other name of numpy": PROTO + b"cnumpy.core.multiarray\nfromfile\n.",
    "extension": PROTO + b"\x82\x01.",
    "persistent": PROTO + b"U\x01xQ.",
    "call of a value": PROTO + b"K\x01)R.",
    "another class": PROTO + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R.",
    "dtype of objects": PROTO + b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.",
    "state of a dict": PROTO + b"}}U\x01aK\x01sb.",
    "decoding": PROTO + b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00rot_13\x86R.",
    "huge integer": PROTO + b"\x8b" + struct.pack("<I", 1 << 30) + b"\xff" * 50,
    "huge text integer": PROTO + b"L" + b"9" * 1_000_000 + b"L\n.",
    "huge bytes": PROTO + b"B\xff\xff\xff\x7fabc.",
    "huge bytes of 64 bits": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"K\x01.",
    "memo bomb": PROTO + b"Kr".join([b"]"] * 2) + b"r\xff\xff\xff\xff0.",
    "unknown memo": PROTO + b"}j\xff\xff\xff\xff.",
    "doubling": PROTO + b"K\x01" + b"q\x00h\x00\x86" * 60 + b"]s.",
    "deep key": PROTO + b"}" + b"K\x01" + b"\x85" * 50_000 + b"K\x01s.",
    "many": PROTO + b"N" * 300_001 + b".",
    "growing": PROTO + b"]q\x00(" + b"h\x00" * 5000 + b"e" + b"(h\x00h\x00e" * 5000 + b".",
    "itself": PROTO + b"]q\x00h\x00a.",
    "empty": b"",
    "no stop": PROTO + b"}",
    "no stack": PROTO + b".",
    "rest": PROTO + b"}.}.",
    "only a mark": PROTO + b"(.",
    "odd items": PROTO + b"}(U\x01au.",
    "protocol 9": b"\x80\x09}.",
}


def _refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "set" / "data_batch_1"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match="data_batch_1: ") as caught:
        load_dataset(file.parent)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / MARKER).exists()
    return str(caught.value)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_objects_are_refused(kind, protocol, tmp_path, monkeypatch):
    content = {"data": HOSTILE[kind], "labels": [1]}
    message = _refused(tmp_path, monkeypatch, pickle.dumps(content, protocol=protocol))
    assert "byte" in message
    if protocol == 5 and isinstance(HOSTILE[kind], _Calls):
        assert "which may run code; do not trust this file" in message


@pytest.mark.parametrize("kind", RAW)
def test_hostile_bytes_are_refused(kind, tmp_path, monkeypatch):
    _refused(tmp_path, monkeypatch, RAW[kind])


def _peak_of(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", bombs.BOMBS)
def test_bombs_are_refused_before_they_take_memory(kind, tmp_path):
    content, message = bombs.BOMBS[kind]

    def read():
        with pytest.raises(FileFormatError, match=f"^data_batch_1: byte .*{message}"):
            read_plain_pickle(Path("data_batch_1"), np.frombuffer(content, np.uint8))

    assert _peak_of(read) < 20 * len(content)
    assert _peak_of(lambda: pickle.loads(content)) > (1 if kind == "a copy a key" else 300) * len(content)  # a control


def test_a_bomb_of_names_is_refused_before_it_takes_memory(tmp_path):
    image_sets.cifar10_python(tmp_path, image_sets.random_pixels(1), [0])
    (tmp_path / "batches.meta").write_bytes(bombs.NAMES)

    def read():
        with pytest.raises(FileFormatError, match=f"batches.meta: expected the names.*, got list of {bombs.TIMES + 1}"):
            load_dataset(tmp_path)

    assert _peak_of(read) < 20 * len(bombs.NAMES)


def test_what_numpy_writes_of_bytes_is_no_bomb(tmp_path):
    """Every byte of protocol 2 is spelled as a character, of one or two bytes in the file, and encoded once."""
    for fill in (65, 200):
        values = {"data": np.full((40, 3072), fill, np.uint8), "more": bytes([fill]) * 50_000}
        data = np.frombuffer(pickle.dumps(values, protocol=2), np.uint8)
        found = read_plain_pickle(tmp_path, data)
        assert np.array_equal(found["data"], values["data"]) and found["more"] == values["more"]


def test_the_hostile_ones_would_run(tmp_path, monkeypatch):
    """A control: what is refused above does act when it is unpickled."""
    monkeypatch.chdir(tmp_path)
    for kind in ("mkdir", "eval", "exec", "nested", "setstate"):
        pickle.loads(pickle.dumps(HOSTILE[kind]))
        (tmp_path / MARKER).rmdir()
    pickle.loads(RAW["text protocol"])
    assert (tmp_path / MARKER).exists()


def test_hostile_names_of_classes(tmp_path, monkeypatch):
    image_sets.cifar10_python(tmp_path / "set", image_sets.random_pixels(1), [0])
    meta = tmp_path / "set" / "batches.meta"
    monkeypatch.chdir(tmp_path)
    for names in (HOSTILE["mkdir"], ["a"] * 10, ["a"] * 9, list(range(10)), {"a": 1}, 7, None):
        meta.write_bytes(pickle.dumps({"label_names": names}, protocol=2))
        with pytest.raises(FileFormatError, match="batches.meta: "):
            load_dataset(tmp_path / "set")
    assert not (tmp_path / MARKER).exists()


def test_plain_values_are_read(tmp_path):
    values = {
        "a": [1, -2, 300, 70_000, True, False, None],
        "b": ("x", ("y",), (), ("p", "q", "r"), (1, 2, 3, 4)),
        "c": {"d": b"bytes", "e": "ü" * 300},
    }
    for protocol in (2, 3, 4, 5):
        data = np.frombuffer(pickle.dumps(values, protocol=protocol), np.uint8)
        assert read_plain_pickle(tmp_path, data) == values
