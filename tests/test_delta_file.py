"""Folders of deltas: small, the same to the bit, and refused where a single bit of them is not."""

import copy
import hashlib
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_delta import moved, same

from pecker_fast import BlockMask, Delta
from pecker_fast.checkpoint import read_json, write_json
from pecker_fast.delta import Ledger
from pecker_fast.errors import FileFormatError
from pecker_fast.models import DDPMUNet
from pecker_fast.written import NAME

CONFIG, PAYLOAD = "pecker_config.json", "pecker_delta.safetensors"


def make(block="row", dtype=torch.float32):
    base = Zoo().to(dtype)
    mask = BlockMask.random(base, 0.3, block)
    after = moved(base, mask)
    return base, after, Delta.extract(base, after, mask, name="three", metadata={"class": 3, "note": "é", "lr": 1e-5})


@pytest.fixture
def saved(tmp_path):
    make()[2].save(tmp_path / "delta")
    return tmp_path / "delta"


@pytest.mark.parametrize("block", ["row", "element", (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_deltas_are_the_same(tmp_path, block, dtype):
    base, after, delta = make(block, dtype)
    delta.save(tmp_path / "new" / "delta")
    assert {path.name for path in (tmp_path / "new").rglob("*")} == {"delta", CONFIG, PAYLOAD, "README.md", NAME}
    loaded = Delta.load(tmp_path / "new" / "delta")
    assert loaded.info() == delta.info() and loaded.fingerprints == delta.fingerprints
    assert loaded.mask == delta.mask and loaded.layouts == delta.layouts
    assert all(torch.equal(loaded.payload[name], bits) for name, bits in delta.payload.items())
    assert loaded.overlaps(delta) == list(delta.payload)
    loaded.apply(base)
    assert same(base, after)


def test_weights_of_several_dtypes(tmp_path):
    base = Zoo()
    base.conv_in.half()
    base.hidden.bfloat16()
    base.out.double()
    mask = BlockMask.random(base, 0.7, (3, 5))
    after = moved(base, mask)
    Delta.extract(base, after, mask).save(tmp_path / "delta")
    Delta.load(tmp_path / "delta").apply(base)
    assert same(base, after)


def test_the_order_of_a_state_dict_does_not_matter(tmp_path):
    base, after, delta = make()
    backwards = [dict(reversed(model.state_dict().items())) for model in (base, after)]
    other = Delta.extract(*backwards, delta.mask)
    assert other.fingerprints == delta.fingerprints
    other.save(tmp_path / "delta")
    Delta.load(tmp_path / "delta").apply(base)
    assert same(base, after)


@pytest.mark.parametrize("block", ["row", (64, 64), "element"])
def test_the_size_is_the_density_times_the_model(tmp_path, block):
    model = DDPMUNet(width=64)
    mask = BlockMask.random(model, 0.1, block)
    weights = sum(p.numel() for p in model.parameters())
    Delta.extract(model, moved(model, mask), mask).save(tmp_path / "delta")
    size = sum(path.stat().st_size for path in (tmp_path / "delta").iterdir())
    bits = weights / 8 if block == "element" else 0
    assert 1.0 < size / (mask.density * 4 * weights + bits) < 1.03


def test_saving_replaces_an_older_delta_if_asked_to_or_leaves_it(saved, monkeypatch):
    base, after, delta = make("element")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("pecker_fast.checkpoint.write_tensors", full)
        with pytest.raises(FileFormatError, match="no space left"):
            delta.save(saved, overwrite=True)
    with pytest.raises(FileFormatError, match="holds a result of Delta.save already"):
        delta.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    delta.save(saved, overwrite=True)
    assert Delta.load(saved).mask == delta.mask
    (saved.parent / "file").write_text("")
    with pytest.raises(FileFormatError, match="file"):
        delta.save(saved.parent / "file")
    assert {path.name for path in saved.parent.iterdir()} == {"delta", "file"}


# -- damage ----------------------------------------------------------------------------------------


def identical(folder, delta):
    """Whether the folder loads as the same delta; a refusal counts as well."""
    try:
        loaded = Delta.load(folder)
    except FileFormatError:
        return True
    return (
        loaded.info() == delta.info()
        and loaded.layouts == delta.layouts
        and loaded.mask == delta.mask
        and all(torch.equal(loaded.payload[name], bits) for name, bits in delta.payload.items())
    )


@pytest.mark.parametrize("name", [CONFIG, PAYLOAD])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_noticed(saved, name, data):
    whole = (saved / name).read_bytes()
    delta = Delta.load(saved)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        (saved / name).write_bytes(damaged)
        assert identical(saved, delta)
        if name == PAYLOAD:
            with pytest.raises(FileFormatError, match="SHA-256"):
                Delta.load(saved)
    finally:
        (saved / name).write_bytes(whole)


def test_every_entry_of_the_settings_is_guarded(saved):
    config = read_json(saved / CONFIG)
    delta = Delta.load(saved)
    for key in config.keys() - {"sha256"}:
        changed = {**config, key: {**config[key], "x": 1} if isinstance(config[key], dict) else f"{config[key]}x"}
        write_json(saved / CONFIG, changed)
        with pytest.raises(FileFormatError, match="checksum|expected"):
            Delta.load(saved)
    write_json(saved / CONFIG, config)
    assert identical(saved, delta) and Delta.load(saved).name == "three"


@pytest.mark.parametrize("name", [CONFIG, PAYLOAD])
@pytest.mark.parametrize("damage", ["half", "last byte", "empty", "missing", "longer", "text", "folder"])
def test_damaged_files_are_refused_by_name(saved, name, damage):
    path = saved / name
    whole = path.read_bytes()
    path.unlink()
    contents = {
        "half": whole[: len(whole) // 2],
        "last byte": whole.rstrip()[:-1],
        "empty": b"",
        "longer": whole + b"x",
        "text": b"hello",
    }
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(FileFormatError, match=name):
        Delta.load(saved)


def _forge(folder, change_config=lambda c: None, change_tensors=lambda t: None, header=None):
    """Change the content and make all checksums right again."""
    config, tensors = read_json(folder / CONFIG), load_file(folder / PAYLOAD)
    with safe_open(folder / PAYLOAD, "pt") as file:
        strings = file.metadata() | (header or {})
    change_tensors(tensors)
    save_file(tensors, folder / PAYLOAD, strings)
    content = (folder / PAYLOAD).read_bytes()
    config["payload"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del config["sha256"]
    change_config(config)
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    write_json(folder / CONFIG, config | {"sha256": hashlib.sha256(text.encode()).hexdigest()})


FORGERIES = {
    "nothing": ({}, None),
    "foreign": ({"change_config": lambda c: c.update(format="other")}, "expected a delta"),
    "newer": ({"change_config": lambda c: c.update(version=2)}, "upgrade pecker_fast"),
    "no fingerprints": ({"change_config": lambda c: c.pop("fingerprints")}, "do not fit together"),
    "a fingerprint less": ({"change_config": lambda c: c["fingerprints"].pop("rest")}, "do not fit together"),
    "no number": ({"change_config": lambda c: c["fingerprints"].update(rest="x")}, "do not fit together"),
    "no payload": ({"change_config": lambda c: c.pop("payload")}, "no such file"),
    "a weight less": ({"change_config": lambda c: c["tensors"].pop("hidden.weight")}, "the mask is for hidden.weight"),
    "other dtype": ({"change_config": lambda c: c["tensors"].update({"hidden.weight": "float64 (36, 24)"})}, "xor"),
    "list": ({"change_config": lambda c: c.update(tensors=[1, 2])}, "do not fit together"),
    "short xor": ({"change_tensors": lambda t: t.update(xor=t["xor"][:-4].clone())}, "xor: expected"),
    "short mask": ({"change_tensors": lambda t: t.update(mask=t["mask"][:-1].clone())}, "mask: .* bytes expected"),
    "full mask": ({"change_tensors": lambda t: t["mask"].fill_(255)}, "do not fit together"),
    "no mask": ({"change_tensors": lambda t: t.pop("mask")}, "do not fit together"),
    "no grids": ({"header": {"grids": "{}"}}, "do not fit together"),
    "sizes": ({"header": {"bytes": "[-1]"}}, "do not fit together"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_foreign_and_inconsistent_folders_are_refused(saved, kind):
    arguments, message = FORGERIES[kind]
    _forge(saved, **arguments)
    if message is None:  # the control: the forgery itself is sound
        Delta.load(saved)
        return
    with pytest.raises(FileFormatError, match=message):
        Delta.load(saved)


def test_a_delta_is_not_taken_for_a_mask(saved):
    with pytest.raises(FileFormatError, match="expected a mask .* got a file with format 'pecker_fast.delta'"):
        BlockMask.load(saved / PAYLOAD)


def test_a_missing_folder_and_a_model_folder_are_refused(tmp_path, saved):
    with pytest.raises(FileFormatError, match="nowhere: no such folder"):
        Delta.load(tmp_path / "nowhere")
    (saved / CONFIG).rename(saved / "config.json")
    with pytest.raises(FileFormatError, match="pecker_config.json: cannot be read"):
        Delta.load(saved)


# -- the record beside a model ---------------------------------------------------------------------


def test_records_survive_the_file(tmp_path):
    base, after, delta = make("element")
    delta.apply(base)
    Ledger.of(base).save(tmp_path)
    (record,) = Ledger.load(tmp_path)
    assert record.same_as(delta.record) and record.name == "three" and record.holds(base.state_dict())
    assert not record.holds(Zoo().state_dict()) and not record.holds({})
    assert repr(Ledger.load(tmp_path)) == "Ledger('three')"
    shutil.rmtree(tmp_path)
    assert len(Ledger.load(tmp_path)) == 0


def test_damaged_records_are_refused_or_do_not_count(tmp_path):
    base, after, delta = make("row")
    delta.apply(base)
    Ledger.of(base).save(tmp_path)
    path = tmp_path / "pecker_deltas.json"
    whole, seen = path.read_bytes(), set()
    for bit in range(0, 8 * len(whole), 61):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            ledger = Ledger.load(tmp_path).holding(base.state_dict())
        except FileFormatError:
            seen.add("refused")
            continue
        seen.add(len(ledger))
        model = copy.deepcopy(base).state_dict()
        delta.revert(model, ledger=ledger)  # what a delta needs of its own is not in the record
        assert same(model, {n: t for n, t in _reverted(base, delta).items()})
    assert "refused" in seen and 0 in seen


def _reverted(model, delta):
    model = copy.deepcopy(model)
    delta.revert(model)
    return model.state_dict()
