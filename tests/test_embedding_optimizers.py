"""Any optimizer on the active parameters: off-mask weights keep their bits; optimizers on wrong ones are refused."""

import copy
import gc

import pytest
import torch
from models import Zoo, conv_net, loss_of, mask_of, masked_net, zoo_batch
from test_active import assert_same_bits, off_mask
from torch import nn

from pecker_fast import BlockMask, MaskedAdamW, apply_mask, step_hooks

OPTIMIZERS = {
    "SGD": {"lr": 0.01},
    "SGD nesterov": {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "SGD foreach": {"lr": 0.01, "momentum": 0.9, "foreach": True},
    "SGD fused": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "fused": True},
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "Adam fused amsgrad": {"lr": 0.01, "amsgrad": True, "fused": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1, "foreach": False},
    "AdamW foreach": {"lr": 0.01, "weight_decay": 0.1, "foreach": True},
    "AdamW fused": {"lr": 0.01, "weight_decay": 0.1, "fused": True},
    "AdamW tensor_lr": {"lr": torch.tensor(0.01), "foreach": False},
    "Adamax": {"lr": 0.01, "weight_decay": 0.1},
    "NAdam": {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01, "foreach": True},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Adagrad": {"lr": 0.01},
    "Adagrad fused": {"lr": 0.01, "fused": True},
    "Adadelta": {"lr": 1.0, "weight_decay": 0.1},
    "Adafactor": {"lr": 0.01},
    "ASGD": {"lr": 0.01},
    "Rprop": {"lr": 0.01},
    "Lion": {"lr": 1e-3, "weight_decay": 0.1},
}


def make_optimizer(name, parameters):
    kind = name.split()[0]
    library = pytest.importorskip("lion_pytorch") if kind == "Lion" else torch.optim
    return getattr(library, kind)(parameters, **OPTIMIZERS[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("block", ["row", (8, 8), "element"])
def test_off_mask_weights_keep_their_bits_and_active_ones_move(name, block):
    model = Zoo()
    mask = BlockMask.random(model, 0.3, block)
    before = off_mask(model, mask)
    active = apply_mask(model, mask)
    start = [parameter.detach().clone() for parameter in active.parameters()]
    optimizer = make_optimizer(name, active.parameters())
    x, c = zoo_batch()
    for _ in range(3):
        optimizer.zero_grad()
        model(x, c).square().mean().backward()
        optimizer.step()
    active.check()  # the dense weights have followed, exactly
    assert_same_bits(before, off_mask(model, mask))
    moved = sum(int((a != b).sum()) for a, b in zip(start, active.parameters(), strict=True))
    assert moved > active.numel // 2
    largest = max(
        (t.numel() for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)), default=0
    )
    assert largest <= max(parameter.numel() for parameter in active.parameters())


def test_muon_on_matrices_beside_adamw_on_the_rest():
    model = conv_net()
    mask = BlockMask.random(model, 0.3, "row")
    before = off_mask(model, mask)
    active = apply_mask(model, mask)
    matrices = [parameter for parameter in active.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in active.parameters() if parameter.dim() != 2]
    assert matrices and others
    start = active.values.clone()
    optimizers = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01)]
    for _ in range(3):
        active.zero_grad()
        loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
    active.check()
    assert_same_bits(before, off_mask(model, mask))
    assert int((active.values != start).sum()) > active.numel // 2


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_lbfgs_evaluates_the_weights_that_it_tries(line_search_fn):
    """It moves weights within a step and evaluates them: on stale dense weights it would not converge."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    mask = mask_of(model, ("0.weight", "2.weight"), 0.6)
    twin, before = copy.deepcopy(model), off_mask(model, mask)
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
    active = apply_mask(model, mask)
    optimizer = torch.optim.LBFGS(active.parameters(), max_iter=6, line_search_fn=line_search_fn)
    kept = {name: mask.to_dense(name) for name, _ in twin.named_parameters()}
    expected = torch.optim.LBFGS(twin.parameters(), max_iter=6, line_search_fn=line_search_fn)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    def dense_closure():
        expected.zero_grad()
        loss = (twin(x) - y).square().mean()
        loss.backward()
        for name, weight in twin.named_parameters():
            weight.grad *= kept[name]
        return loss

    for _ in range(2):
        optimizer.step(closure)
        expected.step(closure=dense_closure)
    active.check()
    assert_same_bits(before, off_mask(model, mask))
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-9, atol=1e-9)


# -- clipping --------------------------------------------------------------------------------------


def masked_and_dense(dtype=torch.float64):
    """A masked model and a dense one whose gradients are masked afterwards, both after one backward."""
    model = Zoo().to(dtype)
    dense = copy.deepcopy(model)
    mask = BlockMask.random(model, 0.4, (8, 8))
    active = apply_mask(model, mask)
    x, c = zoo_batch(dtype)
    for net in (model, dense):
        net(x, c).square().mean().backward()
    for name, weight in dense.named_parameters():
        weight.grad *= mask.to_dense(name) if name in mask.parameters else 0
    return active, dense


def assert_gradients_equal(active, dense):
    active.bind_()
    for name in active.names:
        torch.testing.assert_close(active.to_dense(active.grads, name), dense.get_parameter(name).grad)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("foreach", [False, True])
def test_clipping_by_norm_is_that_of_the_dense_masked_gradients(norm_type, foreach):
    active, dense = masked_and_dense()
    arguments = {"max_norm": 1e-3, "norm_type": norm_type, "foreach": foreach}
    norm = torch.nn.utils.clip_grad_norm_(active.parameters(), **arguments)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(dense.parameters(), **arguments))
    assert norm > 1e-3
    assert_gradients_equal(active, dense)


def test_clipping_by_value_is_that_of_the_dense_masked_gradients():
    active, dense = masked_and_dense()
    limit = float(active.grads.abs().max()) / 3
    for parameters in (active.parameters(), dense.parameters()):
        torch.nn.utils.clip_grad_value_(parameters, limit)
    assert_gradients_equal(active, dense)
    assert float(active.grads.abs().max()) == limit


# -- optimizers on the wrong parameters ------------------------------------------------------------


def assert_refused(optimizer, model, match):
    state, held = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert_same_bits(state, model.state_dict())
    assert str(held) == str(optimizer.state_dict())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_from_before_the_mask_is_refused(kind):
    model = conv_net()
    optimizer = kind(model.parameters(), lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    apply_mask(model, BlockMask.random(model, 0.3, "row"))
    loss_of(model).backward()
    assert_refused(optimizer, model, r"dense weights of a masked model .* make the optimizer after apply_mask")


def test_an_optimizer_that_lacks_some_active_parameters_is_refused_by_name():
    model, active = masked_net()
    chosen = [p for n, p in model.named_parameters() if n.endswith(".weight") or n == "0.weight_active"]
    optimizer = torch.optim.SGD(chosen, lr=0.1)
    loss_of(model).backward()
    assert_refused(optimizer, model, r"without their active parameters: 3\.weight, 5\.weight")


def test_optimizers_on_all_parameters_or_on_parts_are_legitimate():
    model, active = masked_net()
    start = active.values.clone()
    everything = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    parts = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(active.parameters()[2:], lr=0.1)]
    unrelated = torch.optim.SGD(conv_net().parameters(), lr=0.1)
    before = off_mask(model, active.mask)
    for optimizer in (everything, *parts, unrelated):
        active.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    active.check()
    assert_same_bits(before, off_mask(model, active.mask))
    assert not torch.equal(active.values, start)


@pytest.mark.parametrize("make", [MaskedAdamW, lambda active: torch.optim.AdamW(active.parameters())])
def test_an_optimizer_of_a_removed_mask_is_refused(make):
    model, active = masked_net()
    optimizer = make(active)
    loss_of(model).backward()
    active.remove()
    assert_refused(optimizer, model, r"a mask that was removed or replaced: 0\.weight")
    apply_mask(model, active.mask)  # the same mask again: new active parameters
    loss_of(model).backward()
    assert_refused(optimizer, model, "a mask that was removed")


def test_parameters_of_a_removed_mask_are_not_kept_alive():
    gc.collect()
    already = len(step_hooks._abandoned)
    _, active = masked_net()
    gone = [p for _, dense, p in active.pairs() if dense is not p]  # the others are the model's own weights again
    active.remove()
    assert gone and len(step_hooks._abandoned) == already + len(gone)
    del gone, active
    gc.collect()
    assert len(step_hooks._abandoned) == already


def test_gradients_from_before_the_mask_move_nothing():
    model = conv_net()
    loss_of(model).backward()  # somebody's own saliency
    mask = BlockMask.random(model, 0.3, "row")
    before = off_mask(model, mask)
    apply_mask(model, mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    loss_of(model).backward()
    optimizer.step()
    assert_same_bits(before, off_mask(model, mask))
