"""Copies, moves and checkpoints of a masked model are those of a dense one, also in the middle of training."""

import copy
import io
from collections import Counter

import pytest
import torch
from models import conv_net, loss_of, masked_net
from test_active import assert_same_bits

from pecker_fast import ActiveParameters, BlockMask, MaskedAdamW, apply_mask

OPTIMIZERS = {
    "MaskedAdamW": lambda active: MaskedAdamW(active, lr=0.01, weight_decay=0.1, ema_decay=0.9),
    "AdamW": lambda active: torch.optim.AdamW(active.parameters(), lr=0.01, weight_decay=0.1),
    "SGD": lambda active: torch.optim.SGD(active.parameters(), lr=0.01, momentum=0.9),
}
BATCHES = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]


def train(model, optimizer, batches, dtype=torch.float32):
    for x in batches:
        optimizer.zero_grad()
        model(x.to(dtype)).float().square().mean().backward()
        optimizer.step()


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_a_checkpoint_in_mid_training_continues_to_the_bit(optimizer, density):
    make = OPTIMIZERS[optimizer]
    model, active = masked_net(density)
    opt = make(active)
    train(model, opt, BATCHES[:3])
    saved = through_a_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
    train(model, opt, BATCHES[3:])

    torch.manual_seed(123)  # another initialisation: everything comes from the file
    other = conv_net()
    other_active = apply_mask(other, active.mask)
    other_opt = make(other_active)
    other.load_state_dict(saved["model"], strict=True)
    other_opt.load_state_dict(saved["optimizer"])
    train(other, other_opt, BATCHES[3:])
    assert torch.equal(other_active.values, active.values)
    assert_same_bits(dict(model.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_every_weight_of_a_state_dict_has_a_storage_of_its_own(density):
    """Accelerate and safetensors take a shared storage for tied weights, and leave all but one out."""
    model, _ = masked_net(density)
    state = model.state_dict()
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    assert set(storages.values()) == {1}
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_a_deep_copy_continues_as_the_original_does(optimizer, density):
    model, active = masked_net(density)
    train(model, OPTIMIZERS[optimizer](active), BATCHES[:2])
    twin = copy.deepcopy(model)
    store = ActiveParameters.of(twin)
    for net, its in ((model, active), (twin, store)):
        train(net, OPTIMIZERS[optimizer](its), BATCHES[2:])
        its.check()
    assert_same_bits(dict(model.state_dict()), dict(twin.state_dict()))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    start = active.values.clone()
    train(twin, OPTIMIZERS[optimizer](store), BATCHES[:1])
    assert torch.equal(active.values, start) and not torch.equal(store.values, start)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_model_converted_in_mid_training_goes_on(optimizer):
    model, active = masked_net(1.0)
    opt = OPTIMIZERS[optimizer](active)
    train(model, opt, BATCHES[:2])
    model.to(torch.bfloat16)
    masters = active.values.clone()
    train(model, opt, BATCHES[2:4], torch.bfloat16)
    active.check()
    assert not torch.equal(active.values, masters)
    model.to(torch.float32)
    before = active.values.clone()
    train(model, opt, BATCHES[4:])
    active.check()
    assert not torch.equal(active.values, before)
    # Widened weights are bfloat16 values only until the next step writes the float32 masters.
    assert any(not torch.equal(w, w.bfloat16().float()) for w in model.state_dict().values())


def test_a_whole_model_in_a_file_trains_on():
    model, active = masked_net()
    train(model, MaskedAdamW(active, lr=0.01), BATCHES[:1])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    store = ActiveParameters.of(twin)
    for net, its in ((model, active), (twin, store)):
        train(net, MaskedAdamW(its, lr=0.01), BATCHES[1:3])
    store.check()
    assert torch.equal(store.values, active.values)


def test_a_dense_checkpoint_of_mid_training_is_that_of_the_removed_model():
    model, active = masked_net(0.5)
    train(model, MaskedAdamW(active, lr=0.01), BATCHES[:2])
    saved = through_a_file(model.state_dict())
    assert list(saved) == list(conv_net().state_dict())
    assert_same_bits(saved, dict(active.remove().state_dict()))
    loss_of(model)


def test_a_mask_of_another_density_refuses_the_state_and_stays_as_it_was():
    model, active = masked_net(0.3)
    opt = MaskedAdamW(active, lr=0.01)
    train(model, opt, BATCHES[:1])
    saved = through_a_file(opt.state_dict())
    other = conv_net()
    other_opt = MaskedAdamW(apply_mask(other, BlockMask.random(other, 0.6, "row")))
    with pytest.raises(ValueError, match="load the mask it was saved with"):
        other_opt.load_state_dict(saved)
    assert not other_opt.state and other_opt.param_groups[0]["lr"] == 1e-3
