"""Masks come and go as a whole: whatever happened to the model meanwhile, and whatever fails in between."""

import copy

import pytest
import torch
from models import conv_net, loss_of, masked_net
from test_outside_writes import small_unet
from torch import nn
from torch.nn.utils import prune

from pecker_fast import ActiveParameters, BlockMask, MaskedAdamW, apply_mask, change_mask
from pecker_fast.layers import MaskedLayer
from pecker_fast.scatter import ScatterTable


def an_unrelated_step():
    other = nn.Linear(4, 4)
    other(torch.randn(2, 4)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()


def is_plain(model):
    return not any(isinstance(module, MaskedLayer) for module in model.modules()) and "_pecker_active" not in vars(
        model
    )


# -- the model changed meanwhile -------------------------------------------------------------------


def add_head(model):
    model.head = nn.Linear(10, 2)


def replace_module(model):
    model[3] = nn.Conv2d(16, 16, 3, padding=1)


def delete_module(model):
    del model[5]


def wrap_module(model):
    model[3] = nn.Sequential(model[3], nn.Identity())


def add_parameter(model):
    model[0].register_parameter("gain", nn.Parameter(torch.ones(1)))


def switch_off(model):
    model.requires_grad_(False)


CHANGES = [add_head, replace_module, delete_module, wrap_module, add_parameter, switch_off]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_remove_gives_back_a_model_that_was_changed(change, density):
    model, active = masked_net(density)
    layers = [module for module in model.modules() if isinstance(module, MaskedLayer)]
    change(model)
    assert active.remove() is model and is_plain(model)
    assert all(type(layer).__name__ in ("Conv2d", "Linear", "GroupNorm") for layer in layers)
    assert all(p.requires_grad for p in model.parameters())  # those that were switched off meanwhile too
    an_unrelated_step()


def test_remove_below_an_adapter():
    peft = pytest.importorskip("peft")
    unet = small_unet()
    before = copy.deepcopy(unet.state_dict())
    active = apply_mask(unet, BlockMask.random(unet, 0.2, "row"))
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    active.remove()
    assert is_plain(unet)
    an_unrelated_step()
    unet.delete_adapters("default")
    names = {name.replace(".base_layer", ""): w for name, w in unet.state_dict().items() if "lora" not in name}
    assert all(torch.equal(names[name], w) for name, w in before.items())


def pruned(model):
    prune.random_unstructured(model[3], "weight", 0.5)


def take_away(model):
    del model[3].weight


def parametrize(model):
    nn.utils.parametrizations.weight_norm(model[3])


DAMAGES = [pruned, take_away, parametrize]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("call", ["remove", "step", "sync_", "forward", "change_mask"])
def test_a_damaged_store_says_so_and_changes_nothing(damage, call):
    model, active = masked_net()
    opt = torch.optim.SGD(active.parameters(), lr=0.1)
    loss_of(model).backward()
    damage(model)
    values, classes = active.values.clone(), [type(module) for module in model.modules()]
    calls = {
        "remove": active.remove,
        "step": opt.step,
        "sync_": active.sync_,
        "forward": lambda: model(torch.randn(2, 3, 8, 8)),
        "change_mask": lambda: change_mask(active, BlockMask.random(conv_net(), 0.5, "row")),
    }
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"weights of the masked Sequential are gone from their modules: 3\.weight"
        ):
            calls[call]()
    assert torch.equal(active.values, values) and [type(module) for module in model.modules()] == classes
    an_unrelated_step()


# -- something fails in between --------------------------------------------------------------------


class OutOfMemory(Exception):
    pass


def failing(real, after):
    """``real``, which raises from the ``after``-th call on."""
    calls = 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > after:
            raise OutOfMemory
        return real(*args, **kwargs)

    return call


PLACES = {
    "the buffer": ("torch.zeros", 0),
    "the gradients": ("torch.zeros_like", 0),
    "a parameter": ("pecker_fast.arrangement.view_of", 2),
    "the table": ("pecker_fast.flat_store.ScatterTable", 0),
    "the checksums": ("pecker_fast.synced_store.dense_checksums", 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_apply_mask_changes_nothing_when_memory_runs_out(place, monkeypatch):
    model = conv_net()
    model[0].bias.requires_grad_(False)
    mask = BlockMask.random(model, 0.3, "row")
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    name, after = PLACES[place]
    real = ScatterTable if place == "the table" else torch.zeros if place == "the buffer" else None
    if real is None:
        module, _, own = name.rpartition(".")
        real = torch.zeros_like if module == "torch" else getattr(__import__(module, fromlist=[own]), own)
    with monkeypatch.context() as patched:
        patched.setattr(name, failing(real, after))
        with pytest.raises(OutOfMemory):
            apply_mask(model, mask)
    assert is_plain(model) and [p.requires_grad for p in model.parameters()] == flags
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    an_unrelated_step()
    apply_mask(model, mask).remove()


@pytest.mark.parametrize("place", ["torch.zeros_like", "pecker_fast.arrangement.view_of"])
def test_change_mask_changes_nothing_when_memory_runs_out(place, monkeypatch):
    model, active = masked_net()
    opt = MaskedAdamW(active, lr=0.1)
    loss_of(model).backward()
    opt.step()
    opt.zero_grad()
    mask, parameters, values = active.mask, active.parameters(), active.values.clone()
    module, _, own = place.rpartition(".")
    with monkeypatch.context() as patched:
        patched.setattr(
            place, failing(getattr(torch if module == "torch" else __import__(module, fromlist=[own]), own), 0)
        )
        with pytest.raises(OutOfMemory):
            change_mask(active, BlockMask.random(model, 0.5, (4, 4)), opt)
    assert active.mask is mask and all(a is b for a, b in zip(active.parameters(), parameters, strict=True))
    loss_of(model).backward()
    opt.step()
    assert not torch.equal(active.values, values)
    active.check()


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_conversion_that_fails_halfway_keeps_the_masters(density, after):
    model, active = masked_net(density)
    parameters, values = active.parameters(), active.values.clone()
    with pytest.raises(OutOfMemory):
        model._apply(failing(lambda tensor: tensor.to(torch.bfloat16), after))
    assert all(a is b for a, b in zip(active.parameters(), parameters, strict=True))
    assert all(p.dtype == torch.float32 for p in parameters)
    model.to(torch.float32)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    torch.optim.SGD(active.parameters(), lr=0.1).step()
    active.check()
    assert not torch.equal(active.values, values)
    active.remove()


# -- gradients that are missing --------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [MaskedAdamW, lambda active: torch.optim.SGD(active.parameters(), lr=0.1)])
@pytest.mark.parametrize("trained", [False, True])
def test_switched_off_gradients_are_named_as_such(trained, optimizer):
    model, active = masked_net()
    opt = optimizer(active)
    if trained:
        loss_of(model).backward()
        opt.step()
        opt.zero_grad()
    model.requires_grad_(False)  # what add_adapter does
    model.append(nn.Linear(10, 2))
    loss_of(model).backward()
    with pytest.raises(
        RuntimeError, match=r"requires_grad=False: 0\.weight.*add_adapter.*active\.requires_grad_\(True\)"
    ):
        opt.step()
    active.requires_grad_(True)
    loss_of(model).backward()
    opt.step()


def test_gradients_that_the_user_switched_off_are_no_error():
    model, active = masked_net()
    opt = MaskedAdamW(active, lr=0.1)
    loss_of(model).backward()
    opt.step()
    opt.zero_grad()
    active.requires_grad_(False)
    values = active.values.clone()
    opt.step()
    assert torch.equal(active.values, values)


def net_of_three():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])


SKIPS = {
    "every second step": lambda step, layer: layer == 1 and step % 2 == 0,
    "at first": lambda step, layer: layer == 2 and step < 3,
    "at random": lambda step, layer: layer > 0 and (step * 7 + layer * 5) % 3 == 0,
    "from some step on": lambda step, layer: layer == 1 and step > 2,
}


@pytest.mark.filterwarnings("ignore:.*no gradient so far")
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("capturable", [False, True])
def test_layers_that_are_skipped_take_the_steps_that_torch_takes(skip, density, capturable):
    def run(masked):
        model = net_of_three()
        mask = BlockMask.random(model, density, "row")
        settings = {"lr": 0.05, "weight_decay": 0.1}
        if masked:
            opt = MaskedAdamW(apply_mask(model, mask), **settings, ema_decay=0.5, capturable=capturable)
        else:
            opt = torch.optim.AdamW(model.parameters(), **settings)
        generator = torch.Generator().manual_seed(0)
        before = copy.deepcopy(model.state_dict())
        average = {name: w.clone() for name, w in before.items()}
        for step in range(7):
            opt.zero_grad()
            h = torch.randn(4, 8, generator=generator)
            for number, layer in enumerate(model):
                h = h if SKIPS[skip](step, number) else layer(h)
            h.square().mean().backward()
            if not masked:
                for name, p in model.named_parameters():
                    if p.grad is not None:
                        p.grad *= mask.to_dense(name)
            opt.step()
            if not masked:
                for name, p in model.named_parameters():
                    p.data = torch.where(mask.to_dense(name), p.data, before[name])
                average = {n: average[n] + 0.5 * (w - average[n]) for n, w in model.state_dict().items()}
            if step == 4 and masked:  # a resumed run has the same counts
                state = copy.deepcopy(opt.state_dict())
                opt.load_state_dict(state)
        if not masked:
            return model.state_dict(), average
        found = {name: w.clone() for name, w in model.state_dict().items()}
        with ActiveParameters.of(model).ema_weights():
            return found, copy.deepcopy(model.state_dict())

    (weights, average), (expected, expected_average) = run(masked=True), run(masked=False)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(average[name], expected_average[name], rtol=1e-5, atol=1e-6)


def test_a_step_in_which_nothing_has_a_gradient_is_none():
    model, active = masked_net()
    opt = MaskedAdamW(active, lr=0.1, ema_decay=0.5)
    loss_of(model).backward()
    opt.step()
    before, state = active.values.clone(), copy.deepcopy(opt.state_dict()["state"])
    opt.zero_grad()
    opt.step()
    assert torch.equal(active.values, before)
    assert opt.state_dict()["state"][0]["step"] == state[0]["step"]


# -- weights that a hook computes ------------------------------------------------------------------


def plain_attribute(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    return layer


def as_buffer(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


HOOKED = {
    "weight_norm": (nn.utils.weight_norm, "weight_norm"),
    "spectral_norm": (nn.utils.spectral_norm, "spectral_norm"),
    "prune": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "prune"),
    "pruned bias": (lambda layer: prune.random_unstructured(layer, "bias", 0.5), "prune"),
    "a plain attribute": (plain_attribute, "the layer's weight is not a parameter"),
    "a buffer": (as_buffer, "the layer's weight is not a parameter"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 16), lambda: nn.Conv2d(8, 16, 1), lambda: nn.Conv2d(8, 8, 3)])
@pytest.mark.parametrize("how", HOOKED)
def test_layers_whose_weight_a_hook_computes_are_refused_by_name(how, make):
    wrap, reason = HOOKED[how]
    layer = wrap(make())
    model = nn.Sequential(layer, nn.Linear(16, 4))
    mask = BlockMask.random(model, 0.5, "row")
    assert all(name.startswith("1.") for name in mask.parameters)
    active = apply_mask(model, mask)
    refused = {name: why for name, why in active.found.refused.items() if name.startswith("0.")}
    assert refused and all(reason in why for why in refused.values())
    assert type(layer) is type(make())
