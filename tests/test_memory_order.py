"""``.to(memory_format=torch.channels_last)`` in mid-training: buffers, tables and optimizers follow the weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from models import Zoo, zoo_batch
from torch import nn

from pecker_fast import BlockMask, MaskedAdamW, apply_mask, change_mask

BLOCKS = ["row", (8, 8), (5, 7), "element", "auto"]
ADAM = {"lr": 0.01, "weight_decay": 0.1}
OPTIMIZERS = {
    "MaskedAdamW": lambda active: MaskedAdamW(active, **ADAM, ema_decay=0.9, saliency="abs"),
    "MaskedAdamW, reference": lambda active: MaskedAdamW(active, **ADAM, ema_decay=0.9, backend="reference"),
    "AdamW": lambda active: torch.optim.AdamW(active.parameters(), **ADAM),
    "AdamW, fused": lambda active: torch.optim.AdamW(active.parameters(), **ADAM, fused=True, amsgrad=True),
    "SGD": lambda active: torch.optim.SGD(active.parameters(), lr=0.1, momentum=0.9, nesterov=True),
}


def convert(model, memory_format=torch.channels_last):
    return model.to(memory_format=memory_format)


def masked(block, density=0.4, optimizer_of=OPTIMIZERS["MaskedAdamW"], before=None):
    torch.manual_seed(0)
    net = Zoo()
    mask = BlockMask.random(net, density, block, seed=1)
    if before is not None:
        convert(net, before)
    active = apply_mask(net, mask, unmaskable="dense")
    return net, active, optimizer_of(active)


def give_gradients(active, seed):
    """The same for every weight, wherever it lies: steps then have the same bits in every memory order."""
    rng = torch.Generator().manual_seed(seed)
    dense = {name: torch.randn(active.model.get_parameter(name).shape, generator=rng) for name in active.names}
    for entry, parameter in zip(active.entries, active.parameters(), strict=True):
        parameter.grad = entry.shaped(entry.of_dense(dense[entry.name]).clone())


def run(steps, block, density, optimizer_of):
    """Steps, between which the model is put into other orders; of one the gradients are there already."""
    net, active, optimizer = masked(block, density, optimizer_of)
    for number, memory_format in enumerate(steps):
        give_gradients(active, number)
        if memory_format is not None:
            convert(net, memory_format)
        optimizer.step()
        active.check()
    return net, active, optimizer


def assert_same(one, other):
    """Of the dense weights; the active parameters may lie in different orders."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


LAST, FIRST = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("optimizer_of", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_have_the_same_bits_whatever_the_order(block, density, optimizer_of):
    plain, kept, optimizer = run([None] * 5, block, density, optimizer_of)
    net, active, turned = run([None, None, LAST, FIRST, LAST], block, density, optimizer_of)
    assert not any(torch.isnan(weight).any() for weight in net.state_dict().values())
    assert_same(plain, net)
    if isinstance(optimizer, MaskedAdamW):
        first, second = (o.state[o.param_groups[0]["params"][0]] for o in (optimizer, turned))
        for key in first.keys() - {"step"}:
            for name in kept.names:
                assert torch.equal(active.to_dense(second[key], name), kept.to_dense(first[key], name)), (key, name)
        with kept.ema_weights(), active.ema_weights():
            assert_same(plain, net)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_afterwards_all_lies_as_if_it_had_been_converted_before(block, density):
    net, active, optimizer = run([None, LAST], block, density, OPTIMIZERS["MaskedAdamW"])
    _, expected, same = masked(block, density, before=LAST)
    assert [entry.channels_last for entry in active.entries] == [entry.channels_last for entry in expected.entries]
    assert any(entry.channels_last for entry in active.entries)
    assert active.fingerprint() == expected.fingerprint()
    tables = active.scatter_table(), expected.scatter_table()
    assert len(tables[0].run_parameter) == len(tables[1].run_parameter)
    for p, q in zip(active.parameters(), expected.parameters(), strict=True):
        assert p.stride() == q.stride()
    for p, q in zip(net.parameters(), expected.model.parameters(), strict=True):
        assert p.stride() == q.stride()
    same.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected.values.copy_(active.values)
    for store, stepping in ((active, optimizer), (expected, same)):
        give_gradients(store, 7)
        stepping.step()
    assert torch.equal(active.values, expected.values)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_backward_passes_before_and_after_add_up(block):
    results = []
    for turns in (False, True):
        net, active, optimizer = masked(block, optimizer_of=lambda active: MaskedAdamW(active))
        torch.manual_seed(1)
        for _ in range(3):
            for _ in range(2):  # accumulated across the change
                x, c = zoo_batch()
                net(x, c).square().mean().backward()
                if turns:
                    convert(net)
                    active.bind_()
            active.bind_()
            results.append({name: active.to_dense(active.grads, name) for name in active.names})
            optimizer.zero_grad(set_to_none=False)
    for plain, turned in zip(results[:3], results[3:], strict=True):
        for name, grad in plain.items():
            torch.testing.assert_close(turned[name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("part", ["conv_in", "strided", "upsample"])
def test_a_part_of_the_model_may_be_converted_alone(part):
    plain, _, _ = run([None] * 3, (8, 8), 0.4, OPTIMIZERS["MaskedAdamW"])
    net, active, optimizer = masked((8, 8))
    for number in range(3):
        give_gradients(active, number)
        optimizer.step()
        convert(net.get_submodule(part))
    assert_same(plain, net)
    active.bind_()
    assert {e.name for e in active.entries if e.channels_last} <= {f"{part}.weight"}


def through_a_file(objects):
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_a_copy_and_its_optimizer_follow_on_their_own(copied):
    net, active, optimizer = run([None, None], (8, 8), 0.4, OPTIMIZERS["MaskedAdamW"])
    other, stepping = copied((net, optimizer))
    convert(other)
    for store, own in ((active, optimizer), (stepping.active, stepping)):
        give_gradients(store, 5)
        own.step()
    assert_same(net, other)
    assert not any(entry.channels_last for entry in active.entries)


@pytest.mark.parametrize("block", [(8, 8), "row", "element"], ids=str)
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("optimizer_of", [OPTIMIZERS["MaskedAdamW"], OPTIMIZERS["AdamW"]])
def test_a_mask_that_changes_carries_the_state_of_each_weight(block, density, turns, optimizer_of):
    net, active, optimizer = run([None, None], block, density, optimizer_of)

    def moments():
        first = optimizer.param_groups[0]["params"][0]
        for entry, parameter in zip(active.entries, active.parameters(), strict=True):
            if isinstance(optimizer, MaskedAdamW):
                yield entry.name, entry.to_dense(entry.stretch(optimizer.state[first]["exp_avg"]))
            elif parameter in optimizer.state:
                yield entry.name, entry.to_dense(entry.flattened(optimizer.state[parameter]["exp_avg"]))

    before, was = dict(moments()), active.mask
    if turns:
        convert(net)
    change_mask(active, BlockMask.random(net, 0.5, block, seed=2), optimizer)
    for name, after in moments():
        if name in active.mask.parameters and name in before:
            both = active.mask.to_dense(name) & was.to_dense(name)
            assert torch.equal(after[both], before[name][both]), name


def test_a_linear_model_has_no_other_order():
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    active = apply_mask(net, BlockMask.random(net, 0.5, (4, 4)))
    entries = active.entries
    convert(net)
    active.bind_()
    assert active.entries is entries
