"""What cannot be trained is refused with a clear error, and not a bit of the model or of an optimizer changes.

What other tests cover is not repeated: optimizers on wrong parameters (test_embedding_optimizers), masks of other
models, empty masks and masking twice (test_apply), saliency that is not finite and files that are damaged (test_mask).
"""

import copy
import dataclasses

import pytest
import torch
from models import conv_net, loss_of, mask_of, masked_net
from test_active import assert_same_bits, off_mask
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from pecker_fast import BlockMask, Delta, MaskedAdamW, ParameterMask, apply_mask, change_mask

OPTIMIZERS = {
    "MaskedAdamW": lambda active: MaskedAdamW(active, lr=0.01, weight_decay=0.1, ema_decay=0.9),
    "SGD": lambda active: torch.optim.SGD(active.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1),
}


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()


def everything_of(model, *optimizers):
    """Copies of all that a refused call must leave alone, as one flat dict."""
    found = {"classes": [type(module) for module in model.modules()], "store": vars(model).get("_pecker_active")}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = tensor.grad
        found[name] = tensor.detach() if tensor.is_meta else tensor.detach().clone()
        found[f"{name}: flags"] = (id(tensor), tensor.requires_grad, None if grad is None else grad.clone())
    for number, optimizer in enumerate(optimizers):
        held = copy.deepcopy(optimizer.state_dict())
        found |= {f"{number} groups": held["param_groups"], f"{number} ids": [*map(id, optimizer.state)]}
        found |= {f"{number} {key} {name}": v for key, state in held["state"].items() for name, v in state.items()}
    return found


def same(a, b):
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and (a.is_meta or torch.equal(a, b))
    return type(a) is type(b) and a == b


class refused:
    """Within the block an error is raised that matches, and all of ``everything_of`` stays as it was."""

    def __init__(self, error, match, model, *optimizers):
        self.raises, self.held = pytest.raises(error, match=match), (model, *optimizers)

    def __enter__(self):
        self.before = everything_of(*self.held)
        return self.raises.__enter__()

    def __exit__(self, *error):
        matched = self.raises.__exit__(*error)
        after = everything_of(*self.held)
        assert self.before.keys() == after.keys()
        for name, value in self.before.items():
            assert same(value, after[name]), name
        return matched


# -- masks with damaged contents -------------------------------------------------------------------


def with_blocks(mask, name, active=None, **fields):
    """The mask with other block numbers, or another grid, for one weight; nothing is checked here."""
    old = mask.parameters[name]
    active = old.active if active is None else torch.as_tensor(active)
    changed = ParameterMask(dataclasses.replace(old.grid, **fields), active)
    return dataclasses.replace(mask, parameters={**mask.parameters, name: changed})


DAMAGE = {
    "unsorted": ({"active": [2, 0, 1]}, "out of order or twice"),
    "duplicate": ({"active": [0, 1, 1]}, "out of order or twice"),
    "too large": ({"active": [0, 6]}, "numbers from 0 to 6"),
    "negative": ({"active": [-1, 0]}, "numbers from -1 to 0"),
    "a float": ({"active": [0.0, 1.0]}, "float32"),
    "flags": ({"active": [True, False, True, True, False, False]}, "torch.bool"),
    "two dimensions": ({"active": [[0, 1]]}, r"\(1, 2\)"),
    "transposed": ({"view": (4, 6, 1), "block": (1, 6)}, r"view \(4, 6, 1\)"),
    "view of another shape": ({"view": (6, 8, 1), "block": (1, 8)}, r"expected view \(6, 4, 1\)"),
    "block of nothing": ({"block": (0, 4)}, r"block \(0, 4\)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_masks_are_refused_wherever_they_come_in(kind, tmp_path):
    changes, match = DAMAGE[kind]
    model = net()
    good = mask_of(model, ("0.weight", "2.weight"))
    bad, match = with_blocks(good, "0.weight", **changes), f"damaged mask: 0.weight: .*{match}"
    with refused(ValueError, match, model):
        apply_mask(model, bad)
    with refused(ValueError, match, model):
        Delta.extract(model, copy.deepcopy(model), bad)
    with pytest.raises(ValueError, match=match):
        bad.save(tmp_path / "mask.safetensors")
    assert not list(tmp_path.iterdir())
    for make in OPTIMIZERS.values():
        trained = copy.deepcopy(model)
        active = apply_mask(trained, good)
        optimizer = make(active)
        train(trained, optimizer)
        with refused(ValueError, match, trained, optimizer):
            change_mask(active, bad, optimizer)
        train(trained, optimizer)
        active.check()


def test_block_numbers_changed_in_place_are_noticed():
    model = net()
    mask = mask_of(model, ("0.weight",))
    mask.parameters["0.weight"].active[0] = 2
    with refused(ValueError, "damaged mask: 0.weight: .*out of order or twice", model):
        apply_mask(model, mask)


@pytest.mark.parametrize("other", [{"0.weight": torch.ones(6, 4)}, None])
def test_what_is_no_mask_is_refused(other):
    model = net()
    with refused(TypeError, "mask: expected a BlockMask, got .*from_saliency makes one", model):
        apply_mask(model, other)


# -- weights that cannot be masked -----------------------------------------------------------------


def replaced(weight):
    """Two layers, the first with another weight."""
    model = net()
    wants = weight.is_floating_point() and not weight.is_meta
    model[0].weight = nn.Parameter(weight, requires_grad=wants)
    return model


WEIGHTS = {
    "expanded": (lambda: torch.randn(1, 4).expand(6, 4), r"not dense in memory \(strides \(0, 1\)\)"),
    "every second column": (lambda: torch.randn(6, 8)[:, ::2], r"not dense in memory \(strides \(8, 2\)\)"),
    "meta": (lambda: torch.empty(6, 4, device="meta"), "on the meta device"),
    "integer": (lambda: torch.ones(6, 4, dtype=torch.int8), "it is torch.int8, not a float"),
    "complex": (lambda: torch.randn(6, 4, dtype=torch.complex64), "it is torch.complex64, not a float"),
    "float8": (lambda: torch.randn(6, 4).to(torch.float8_e4m3fn), "expected float32.*got torch.float8_e4m3fn"),
    "subclass": (lambda: TwoTensor(torch.randn(6, 4), torch.randn(6, 4)), "it is a TwoTensor"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_cannot_be_masked_are_refused_by_name_and_left_out_of_random_masks(kind):
    make, match = WEIGHTS[kind]
    model, full = replaced(make()), BlockMask.dense(net())
    with refused(ValueError, f"0.weight cannot be masked: .*{match}.*leave it out of the mask", model):
        apply_mask(model, full)
    mask = BlockMask.random(model, 0.5, "row")
    assert "0.weight" not in mask.parameters
    active = apply_mask(model, mask)
    assert not model[0].weight.requires_grad and "0.weight" not in active.names
    active.remove()


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
def test_quantised_weights_are_refused_by_name():
    model = replaced(torch.quantize_per_tensor(torch.randn(6, 4), 0.1, 0, torch.qint8))
    with pytest.raises(ValueError, match="0.weight cannot be masked: it is torch.qint8"):
        apply_mask(model, BlockMask.dense(net()))
    assert type(model[0]) is nn.Linear and model[2].weight.requires_grad


@pytest.mark.parametrize("kind", ["subclass", "float8"])
def test_only_plain_float32_weights_train_dense(kind):
    model = replaced(WEIGHTS[kind][0]())
    with refused(ValueError, "0.weight cannot train dense: expected a plain float32 tensor, got", model):
        apply_mask(model, mask_of(model, ("2.weight",)), unmaskable="dense")


def test_a_model_of_meta_weights_has_none():
    model = net().to("meta")
    with refused(ValueError, "no maskable weight .*0.weight: it is on the meta device", model):
        apply_mask(model, BlockMask.dense(net()))


def test_complex_parameters_beside_the_mask_are_frozen_and_come_back():
    model = net()
    model[2].phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    active = apply_mask(model, mask_of(model, ("0.weight",)))
    assert not model[2].phase.requires_grad
    active.remove()
    assert model[2].phase.requires_grad


def test_a_transposed_weight_is_dense_in_memory_and_trains():
    model = replaced(torch.randn(4, 6).t())
    mask = mask_of(model, ("0.weight",))
    dense, before = copy.deepcopy(model), off_mask(model, mask)
    active = apply_mask(model, mask)
    optimizers = [MaskedAdamW(active, weight_decay=0.0), torch.optim.Adam([dense[0].weight])]
    x = torch.randn(5, 4)
    for _ in range(3):
        for other, optimizer in zip((model, dense), optimizers, strict=True):
            optimizer.zero_grad()
            other(x).square().mean().backward()
            if other is dense:
                dense[0].weight.grad *= mask.to_dense("0.weight")
            optimizer.step()
    assert model[0].weight.stride() == (1, 6)
    assert_same_bits(before, off_mask(model, mask))
    torch.testing.assert_close(model[0].weight, dense[0].weight)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def test_a_shared_weight_is_refused_where_it_would_be_masked():
    model = tied()
    saliency = {name: torch.rand_like(parameter) for name, parameter in model.named_parameters()}
    with refused(ValueError, "0.weight cannot be masked: it is shared by 2 modules; leave it out", model):
        apply_mask(model, BlockMask.from_saliency(saliency, 1.0))


@pytest.mark.parametrize("unmaskable", ["frozen", "dense"])
def test_a_shared_weight_is_fine_where_it_is_not_masked(unmaskable):
    model = tied()
    mask, before = mask_of(model, ("3.weight", "2.bias")), model[0].weight.detach().clone()
    active = apply_mask(model, mask, unmaskable=unmaskable)
    train(model, MaskedAdamW(active, lr=0.01))
    active.remove()
    assert model[0].weight is model[2].weight
    assert torch.equal(model[0].weight, before) == (unmaskable == "frozen")


def test_a_layer_that_is_called_twice_is_one_layer():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    mask = BlockMask.random(model, 0.5, "row")
    dense = copy.deepcopy(model)
    active, x = apply_mask(model, mask), torch.randn(5, 4)
    for other in (model, dense):
        other(x).square().mean().backward()
    active.bind_()
    expected = dense[0].weight.grad * mask.to_dense("0.weight")
    torch.testing.assert_close(active.to_dense(active.grads, "0.weight"), expected)


@pytest.mark.parametrize("part", [lambda model: model[2], lambda model: nn.Sequential(model[2], nn.Linear(3, 2))])
def test_a_part_of_a_masked_model_is_not_masked_on_its_own(part):
    model = net()
    active = apply_mask(model, mask_of(model, ("0.weight",)))
    other = part(model)
    with refused(ValueError, "2 is a part of a Sequential that is masked already; mask that model as a whole", model):
        apply_mask(other, BlockMask.random(other, 1.0, "row"))
    active.remove()
    apply_mask(other, BlockMask.random(other, 1.0, "row"))


# -- optimizers that do not belong to the model ----------------------------------------------------


def test_the_state_of_another_mask_of_the_same_size_is_refused():
    model = net()
    first = mask_of(model, ("0.weight",))
    second = with_blocks(first, "0.weight", active=[3, 4, 5])
    assert first.numel == second.numel
    active = apply_mask(model, first)
    optimizer = OPTIMIZERS["MaskedAdamW"](active)
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    change_mask(active, second, optimizer)
    with refused(
        ValueError, "as many as here, but of other blocks.* load the mask it was saved with", model, optimizer
    ):
        optimizer.load_state_dict(saved)
    change_mask(active, first, optimizer)
    optimizer.load_state_dict(saved)
    del saved["mask"]  # as it was before states said so
    optimizer.load_state_dict(saved)


def test_masked_adamw_takes_no_further_group():
    model, active = masked_net()
    optimizer = MaskedAdamW(active)
    with refused(ValueError, "cannot add a group.*an optimizer of their own", model, optimizer):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_deep_copied_optimizer_steps_the_model_that_was_copied_with_it(make):
    model, x = net(), torch.randn(5, 4)
    optimizer = make(apply_mask(model, BlockMask.random(model, 0.5, "row")))
    train(model, optimizer)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    before = everything_of(model, optimizer)
    for network, its in ((twin, its_optimizer), (model, optimizer)):
        assert same(model[0].weight.detach(), before["0.weight"])  # the twin's step did not touch it
        its.zero_grad()
        network(x).square().mean().backward()
        its.step()
    assert_same_bits(dict(model.state_dict()), dict(twin.state_dict()))
    assert not torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_that_is_copied_alone_leaves_the_model_alone(make):
    model = net()
    optimizer = make(apply_mask(model, BlockMask.random(model, 0.5, "row")))
    train(model, optimizer)
    alone, before = copy.deepcopy(optimizer), everything_of(model, optimizer)
    for group in alone.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    alone.step()
    after = everything_of(model, optimizer)
    assert all(same(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("change", ["change_mask", "remove", "remove and mask again"])
def test_an_optimizer_on_a_stale_list_of_parameters_is_refused(change):
    model, active = masked_net()
    stale, second = active.parameters(), BlockMask.random(model, 0.3, "row", seed=3)
    loss_of(model).backward()
    if change == "change_mask":
        change_mask(active, second)
    else:
        active.remove()
    if change == "remove and mask again":
        apply_mask(model, active.mask)
    optimizer = torch.optim.LBFGS(stale)  # made only now, from a list that was taken before

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with refused(RuntimeError, "a mask that was removed or replaced: 0.weight.*make a new optimizer", model, optimizer):
        optimizer.step(closure)


STALE_CALLS = {
    "remove": lambda active: active.remove(),
    "bind_": lambda active: active.bind_(),
    "scatter_": lambda active: active.scatter_(),
    "zero_grad": lambda active: active.zero_grad(),
    "parameters": lambda active: active.parameters(),
    "check": lambda active: active.check(),
    "change_mask": lambda active: change_mask(active, active.mask),
    "MaskedAdamW": MaskedAdamW,
}


@pytest.mark.parametrize("call", STALE_CALLS)
@pytest.mark.parametrize("masked_again", [False, True])
def test_a_store_that_was_removed_is_done(call, masked_again):
    model = conv_net()
    active = apply_mask(model, BlockMask.random(model, 0.3, "row"))
    active.remove()
    if masked_again:
        apply_mask(model, active.mask)
    with refused(RuntimeError, r"mask of this Sequential was removed.*ActiveParameters.of\(model\)", model):
        STALE_CALLS[call](active)
