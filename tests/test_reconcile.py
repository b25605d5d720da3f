"""dense_checksums and reconcile_: what the native kernels do is what plain torch does, and what the docstrings say."""

import pytest
import torch
from adamw import DTYPES, Model

from pecker_fast import native, reconcile
from pecker_fast.reconcile import dense_checksums, reconcile_, reconcile_reference_

BLOCKS = ["row", (4, 3), "element"]
SHAPES = [(40, 30), (7, 9), (257, 300), (4, 8, 3, 3), (5,)]
needs_native = pytest.mark.skipif(not native.available(), reason="the native module is not built")


@pytest.fixture(params=[pytest.param("cpu", marks=needs_native), "reference"])
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(reconcile, "_native", lambda *_: (None, {}))


def agreeing(block="row", density=0.4, dtypes=(torch.float32,)):
    model = Model(SHAPES, block, density, list(dtypes))
    value = torch.randn(model.numel, generator=torch.Generator().manual_seed(0))
    model.table.scatter_(value)
    return model, value


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.4, 1.0])
def test_the_native_checksums_are_those_of_plain_torch(dtype, block, density, monkeypatch):
    model, _ = agreeing(block, density, [dtype, torch.float32])
    for isa in ("scalar", None):
        native.load().use_isa(isa)
        found = dense_checksums(model.table, torch.float32, 5)
        with monkeypatch.context() as patched:
            patched.setattr(reconcile, "_native", lambda *_: (None, {}))
            assert torch.equal(found, dense_checksums(model.table, torch.float32, 5))
    assert bool(found.any()) == (model.numel > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_change_of_one_weight_shows(backend, dtype):
    model, _ = agreeing(dtypes=[dtype])
    before = dense_checksums(model.table, torch.float32)
    for number, target in enumerate(model.table.targets):
        for position in target.mask.index()[:: max(1, target.mask.numel // 7)].tolist():
            flat = target.dense.view(-1)
            kept = flat[position].clone()
            flat[position] = (
                torch.nextafter(kept.float(), torch.tensor(9.0)) if dtype == torch.float32 else kept * 2 + 1
            )
            after = dense_checksums(model.table, torch.float32)
            assert (after != before).nonzero().flatten().tolist() == [number]
            flat[position] = kept
    swapped = model.table.targets[0]
    one, other = swapped.mask.index()[:2].tolist()
    swapped.dense.view(-1)[[one, other]] = swapped.dense.view(-1)[[other, one]]
    assert dense_checksums(model.table, torch.float32)[0] != before[0]


def test_what_is_outside_the_mask_does_not_count(backend):
    model, _ = agreeing()
    before = dense_checksums(model.table, torch.float32)
    for target in model.table.targets:
        outside = ~target.mask.to_dense()
        target.dense[outside] = 7.0
    assert torch.equal(dense_checksums(model.table, torch.float32), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("follow", [False, True])
def test_written_weights_are_taken_over_and_the_others_follow(backend, dtype, block, follow):
    model, value = agreeing(block, 0.4, [dtype])
    written = torch.arange(len(SHAPES)) % 2 == 0
    moved = value + (torch.arange(model.numel) % 3 == 0)
    for target in model.table.targets:
        target.dense.view(-1)[target.mask.index()[::5]] = 3.0
    dense = [target.dense.clone() for target in model.table.targets]
    found = moved.clone()
    versions = [target.dense._version for target in model.table.targets]
    sums = reconcile_(found, model.table, written, follow=follow, base=11)
    assert torch.equal(sums, dense_checksums(model.table, torch.float32, 11))
    assert versions == [target.dense._version for target in model.table.targets]
    begin = 0
    for number, target in enumerate(model.table.targets):
        stretch, index = slice(begin, begin + target.mask.numel), target.mask.index()
        begin += target.mask.numel
        old, active = dense[number].view(-1)[index], target.dense.view(-1)[index]
        differ = old != moved[stretch].to(dtype)
        if written[number]:
            expected = torch.where(differ, old.float(), moved[stretch])
            assert torch.equal(found[stretch], expected) and torch.equal(active, expected.to(dtype))
        else:
            assert torch.equal(found[stretch], moved[stretch])
            assert torch.equal(active, moved[stretch].to(dtype) if follow else old)
        outside = ~target.mask.to_dense()
        assert torch.equal(target.dense[outside], dense[number][outside])


def test_not_a_number_and_the_sign_of_zero_are_bits_like_others(backend):
    model, value = agreeing()
    flat = model.table.targets[0].dense.view(-1)
    index = model.table.targets[0].mask.index()
    value[:2] = torch.tensor([0.0, 1.0])
    model.table.scatter_(value)
    flat[index[:2]] = torch.tensor([-0.0, torch.nan])
    reconcile_(value, model.table, torch.ones(len(SHAPES), dtype=torch.bool))
    assert torch.signbit(value[0]) and value[1].isnan()


def test_float64_buffers_are_served_to_the_last_bit():
    model = Model([(6, 5)], "row", 0.5, [torch.float64])
    value = torch.randn(model.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model.table.scatter_(value)
    before = dense_checksums(model.table, torch.float64)
    target = model.table.targets[0]
    position = target.mask.index()[3]
    target.dense.view(-1)[position] = torch.nextafter(target.dense.view(-1)[position], torch.tensor(9.0).double())
    assert dense_checksums(model.table, torch.float64) != before
    reconcile_reference_(value, model.table, torch.tensor([True]), follow=True)
    assert torch.equal(value, target.dense.view(-1)[target.mask.index()])
