"""What stands around a training step keeps working: scalers, schedulers, accumulation, compilation, checkpointing."""

import copy
import shutil

import pytest
import torch
from budget import assert_within_budget
from models import Zoo, conv_net, loss_of, masked_net, zoo_batch
from test_active import assert_same_bits
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from pecker_fast import BlockMask, MaskedAdamW, apply_mask

OPTIMIZERS = {
    "MaskedAdamW": lambda active: MaskedAdamW(active, lr=0.01, weight_decay=0.1, ema_decay=0.9),
    "AdamW": lambda active: torch.optim.AdamW(active.parameters(), lr=0.01, weight_decay=0.1),
    "AdamW fused": lambda active: torch.optim.AdamW(active.parameters(), lr=0.01, weight_decay=0.1, fused=True),
    "SGD": lambda active: torch.optim.SGD(active.parameters(), lr=0.01, momentum=0.9),
}


# -- GradScaler and autocast -----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_with_infinite_gradients_is_skipped_and_changes_no_bit(optimizer, dtype):
    model, active = masked_net()
    opt = OPTIMIZERS[optimizer](active)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def step(factor):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model)
        scaler.scale(loss.float() * factor).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(active.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()

    start = active.values.clone()
    step(1.0)
    assert not torch.equal(active.values, start) and scaler.get_scale() == 64.0
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    values, average = active.values.clone(), None if active.ema is None else active.ema.clone()
    step(float("inf"))
    assert scaler.get_scale() == 32.0
    assert_same_bits(dict(weights), dict(model.state_dict()))
    assert torch.equal(active.values, values) and (average is None or torch.equal(active.ema, average))
    for before, after in zip(state["state"].values(), opt.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(before[k]), torch.as_tensor(after[k])) for k in before)
    step(1.0)
    active.check()
    assert not torch.equal(active.values, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_are_the_dense_ones_within_budget(dtype):
    model = conv_net()
    dense, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    mask = BlockMask.random(model, 0.4, (8, 8))
    active = apply_mask(model, mask)
    x = torch.randn(4, 3, 8, 8)
    for net in (model, dense):
        with torch.autocast("cpu", dtype=dtype):
            loss = net(x).float().square().mean()
        loss.backward()
    truth(x.double()).square().mean().backward()
    active.bind_()
    for name in active.names:
        kept = mask.to_dense(name)
        got = active.to_dense(active.grads, name)
        plain, exact = (net.get_parameter(name).grad * kept for net in (dense, truth))
        assert_within_budget(got.to(dtype), exact, plain.to(dtype))
        assert bool((got[~kept] == 0).all())


# -- learning rates --------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=6),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.02, total_steps=8),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=10.0),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("fused", [True, False], ids=["MaskedAdamW", "AdamW"])
def test_schedulers_drive_masked_training_as_they_drive_dense_training(scheduler, fused):
    """Every block active in float64: the steps must be those of torch.optim.AdamW under the same schedule."""
    model, dense = conv_net().double(), conv_net().double()
    dense.load_state_dict(model.state_dict())
    active = apply_mask(model, BlockMask.dense(model))
    opt = MaskedAdamW(active, lr=0.01) if fused else torch.optim.AdamW(active.parameters(), lr=0.01)
    pairs = [(model, opt), (dense, torch.optim.AdamW(dense.parameters(), lr=0.01))]
    schedules = [SCHEDULERS[scheduler](opt) for _, opt in pairs]
    rates = []
    for number in range(6):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number)).double()
        for (net, opt), schedule in zip(pairs, schedules, strict=True):
            opt.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            opt.step()
            schedule.step(*[1.0] if scheduler == "ReduceLROnPlateau" else [])
        rates.append({opt.param_groups[0]["lr"] for _, opt in pairs})
    assert all(len(rate) == 1 for rate in rates) and len(set.union(*rates)) > 1
    for a, b in zip(model.state_dict().values(), dense.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# -- accumulation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", ["row", (8, 8), "element"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_four_micro_batches_are_one_batch(dtype, block, set_to_none):
    model = conv_net().to(dtype)
    truth = copy.deepcopy(model).double()
    mask = BlockMask.random(model, 0.4, block)
    active = apply_mask(model, mask)
    x = torch.randn(8, 3, 8, 8, dtype=dtype)
    truth(x.double()).square().mean().backward()
    grads = []
    for micro_batches in (1, 4):
        active.zero_grad(set_to_none)
        for part in x.chunk(micro_batches):
            (model(part).square().mean() / micro_batches).backward()
        active.bind_()
        grads.append(active.grads.clone())
    if dtype == torch.float64:
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)
    exact = {name: truth.get_parameter(name).grad * mask.to_dense(name) for name in active.names}
    for name in active.names:
        once, four_times = (active.to_dense(grad, name) for grad in grads)
        assert_within_budget(four_times, exact[name], once)


# -- gradient checkpointing ------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("block", ["row", (8, 8)])
def test_gradients_with_checkpointing_are_the_same_bits(use_reentrant, block):
    """Dropout inside: the recomputation must draw the same numbers."""
    model = nn.Sequential(conv_net()[:4], nn.Dropout(0.3), conv_net()[4:])
    active = apply_mask(model, BlockMask.random(model, 0.3, block))
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        active.zero_grad(set_to_none=True)
        h = torch.randn(4, 3, 8, 8, requires_grad=use_reentrant)  # the reentrant one asks for it
        for part in model:
            h = checkpoint(part, h, use_reentrant=use_reentrant) if checkpointed else part(h)
        h.square().mean().backward()
        active.bind_()
        grads.append(active.grads.clone())
    assert torch.equal(grads[0], grads[1]) and bool(grads[0].any())


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_kind_of_layer_compiles_without_graph_breaks(training, autocast):
    model = Zoo().train(training)
    active = apply_mask(model, BlockMask.random(model, 0.3, (8, 8)))
    compiled = torch.compile(copy.deepcopy(model) if training else model, fullgraph=True, backend="aot_eager")
    x, c = zoo_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.set_grad_enabled(training):
        got, expected = compiled(x, c), model(x, c)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {}
    torch.testing.assert_close(got, expected, **tolerance)
    if training:
        loss = got.float().square().mean()
        loss.backward()
        expected.float().square().mean().backward()
        for (name, a), b in zip(compiled.named_parameters(), model.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, **tolerance)
        assert all(parameter.grad is not None for parameter in active.parameters())


def test_a_compiled_model_trains_with_any_optimizer_and_sees_every_step():
    model, active = masked_net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    opt = torch.optim.SGD(active.parameters(), lr=0.1)
    x = torch.randn(4, 3, 8, 8)
    losses = []
    for _ in range(4):
        opt.zero_grad()
        loss = compiled(x).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
        torch.testing.assert_close(compiled(x), model(x))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_inductor_gives_the_same_gradients():
    model = nn.Sequential(nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 4))
    active = apply_mask(model, BlockMask.random(model, 0.3, "row"))
    x = torch.randn(8, 12)
    grads = []
    for net in (model, torch.compile(model, fullgraph=True)):
        active.zero_grad()
        net(x).square().mean().backward()
        active.bind_()
        grads.append(active.grads.clone())
    torch.testing.assert_close(grads[1], grads[0])
