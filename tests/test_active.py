"""The nine rules of the flat store (docs/design.md), each with its test, and the promise that they serve."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from models import Zoo, conv_net, loss_of, mask_of, masked_net, zoo_batch
from torch import nn

from pecker_fast import ActiveParameters, BlockMask, MaskedAdamW, apply_mask, step_hooks


def off_mask(model, mask):
    """Every weight outside the mask, as raw bits."""
    kept = {}
    for name, weight in model.named_parameters():
        if name.endswith("_active"):
            continue
        outside = ~mask.to_dense(name) if name in mask.parameters else torch.ones_like(weight, dtype=torch.bool)
        kept[name] = weight.detach()[outside].clone()
    return kept


def assert_same_bits(before, after):
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


OPTIMIZERS = {
    "MaskedAdamW": lambda active: MaskedAdamW(active, lr=0.01, weight_decay=0.1, ema_decay=0.9, clip_value=1.0),
    "AdamW": lambda active: torch.optim.AdamW(active.parameters(), lr=0.01, weight_decay=0.1),
    "SGD momentum decay": lambda active: torch.optim.SGD(active.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1),
    "Adam": lambda active: torch.optim.Adam(active.parameters(), lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("block", ["row", (8, 8), "element", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_mask_weights_are_bit_identical_and_active_ones_move(optimizer, block, dtype):
    model = Zoo().to(dtype)
    mask = BlockMask.random(model, 0.2, block)
    before, start = off_mask(model, mask), copy.deepcopy(model.state_dict())
    active = apply_mask(model, mask)
    opt = OPTIMIZERS[optimizer](active)
    x, c = zoo_batch(dtype)
    for _ in range(5):
        opt.zero_grad()
        model(x, c).square().mean().backward()
        opt.step()
    assert_same_bits(before, off_mask(model, mask))
    active.remove()
    assert_same_bits(before, off_mask(model, mask))
    moved = [n for n in active.names if not torch.equal(model.state_dict()[n], start[n])]
    assert len(moved) > len(active.names) // 2


def test_control_masking_gradients_of_a_dense_model_moves_off_mask_weights():
    model = conv_net()
    mask = BlockMask.random(model, 0.3, "row")
    before = off_mask(model, mask)
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    loss_of(model).backward()
    for name, weight in model.named_parameters():
        weight.grad *= mask.to_dense(name)
    opt.step()
    after = off_mask(model, mask)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_off_mask_weights_survive_a_mask_change():
    model, active = masked_net()
    first = active.mask
    opt = MaskedAdamW(active, lr=0.01)
    loss_of(model).backward()
    opt.step()
    active.remove()
    second = BlockMask.random(model, 0.3, "row", seed=7)
    before = off_mask(model, second)
    opt = MaskedAdamW(apply_mask(model, second), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()
    assert_same_bits(before, off_mask(model, second))
    assert first != second


# -- rule 1: the backward is pure ------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("block", ["row", (8, 8), "element"])
def test_gradients_equal_the_dense_ones_and_accumulate(set_to_none, block):
    model = Zoo()
    dense = copy.deepcopy(model)
    mask = BlockMask.random(model, 0.4, block)
    active = apply_mask(model, mask)
    x, c = zoo_batch()
    for _ in range(2):  # twice: a backward that wrote into .grad itself would count double
        active.zero_grad(set_to_none)
        dense.zero_grad()
        for _ in range(2):
            model(x, c).square().mean().backward()
            dense(x, c).square().mean().backward()
        active.bind_()
        for name, weight in dense.named_parameters():
            if name in active.names:
                expected = weight.grad * mask.to_dense(name)
                torch.testing.assert_close(active.to_dense(active.grads, name), expected, rtol=1e-4, atol=1e-6)


def test_the_forward_is_unchanged_to_the_bit():
    model = Zoo()
    x, c = zoo_batch()
    expected = copy.deepcopy(model)(x, c)
    active = apply_mask(model, BlockMask.random(model, 0.3, "row"))
    assert torch.equal(copy.deepcopy(model)(x, c), expected)
    active.remove()
    assert torch.equal(model(x, c), expected)


# -- rule 2: p.data and p.grad are the truth -------------------------------------------------------


def test_bind_takes_over_what_replaced_a_view():
    model, active = masked_net()
    parameter = active.parameters()[0]
    parameter.data = torch.full_like(parameter, 3.0)
    parameter.grad = torch.full_like(parameter, 4.0)
    active.bind_()
    n = parameter.numel()
    assert torch.equal(active.values[:n], torch.full((n,), 3.0))
    assert torch.equal(active.grads[:n], torch.full((n,), 4.0))
    assert parameter.data_ptr() == active.values.data_ptr() and parameter.grad.data_ptr() == active.grads.data_ptr()
    addresses = [p.data_ptr() for p in active.parameters()]
    active.bind_()
    assert addresses == [p.data_ptr() for p in active.parameters()]


def test_a_deep_copy_has_its_own_store():
    model, active = masked_net()
    other = copy.deepcopy(model)
    store = ActiveParameters.of(other)
    assert store is not active and store.model is other
    before = copy.deepcopy(model.state_dict())
    opt = torch.optim.SGD(store.parameters(), lr=0.1, momentum=0.9)
    loss_of(other).backward()
    opt.step()
    store.check()
    assert all(torch.equal(before[n], w) for n, w in model.state_dict().items())
    assert any(not torch.equal(before[n], w) for n, w in other.state_dict().items())


# -- rule 3: masters follow the device, never the dtype --------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_masters_stay_float32_whatever_the_model_becomes(dtype, density):
    model, active = masked_net(density)
    model.to(dtype)
    assert all(p.dtype == torch.float32 for p in active.parameters())
    assert model[0].weight.dtype == dtype
    opt = MaskedAdamW(active, lr=1e-2)
    model(torch.randn(2, 3, 8, 8, dtype=dtype)).float().square().mean().backward()
    opt.step()
    active.check()
    active.remove()
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_bfloat16_weights_have_float32_masters_that_add_up_small_steps():
    model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    opt = torch.optim.SGD(apply_mask(model, BlockMask.random(model, 0.5, "row")).parameters(), lr=1e-4)
    for _ in range(100):  # each step is lost in bfloat16, a hundred are not
        opt.zero_grad()
        model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
        opt.step()
    values = set(model.weight.flatten().tolist())
    assert values == {1.0, float(torch.tensor(0.99).bfloat16())}


# -- rule 4: state dicts are those of the dense model ----------------------------------------------


def test_state_dict_keys_are_the_dense_ones_and_load_strictly():
    model, active = masked_net()
    plain = conv_net()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
    fresh = conv_net()
    model.load_state_dict(fresh.state_dict(), strict=True)
    active.check()
    active.remove()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_a_checkpoint_with_a_missing_or_reshaped_weight_is_refused():
    model, _ = masked_net(1.0)
    state = conv_net().state_dict()
    del state["3.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"3.weight"') as error:
        model.load_state_dict(state)
    assert "_active" not in str(error.value)
    state = conv_net().state_dict() | {"3.weight": torch.zeros(2, 2)}
    with pytest.raises(RuntimeError, match="size mismatch for 3.weight"):
        model.load_state_dict(state)


# -- rule 5: biases, norms and embeddings keep a dense tensor in the model's dtype -----------------


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias", "batch_norm.weight", "layer_norm.bias", "hidden.bias"])
def test_vectors_are_one_block_and_train_in_the_models_dtype(name):
    model = Zoo().to(torch.bfloat16)
    active = apply_mask(model, mask_of(model, (name,), share=1.0))
    opt = MaskedAdamW(active, lr=0.1)
    x, c = zoo_batch(torch.bfloat16)
    model(x, c).square().mean().backward()
    opt.step()
    assert active.names == (name,) and active.values.dtype == torch.float32
    weight = model.get_parameter(name)
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, active.values.bfloat16())


def test_an_embedding_trains_its_active_rows():
    model = Zoo()
    before = model.classes.weight.detach().clone()
    active = apply_mask(model, mask_of(model, ("classes.weight",), share=3 / 7))
    opt = MaskedAdamW(active, lr=0.1)
    x, c = zoo_batch()
    model(x, c).square().mean().backward()
    opt.step()
    assert torch.equal(model.classes.weight[3:], before[3:])
    assert not torch.equal(model.classes.weight[:3], before[:3])


# -- rule 6: what forward does not reach is refused ------------------------------------------------


def test_unreachable_weights_are_left_out_by_name():
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "attention": nn.MultiheadAttention(8, 2)})
    tied["b"].weight = tied["a"].weight
    mask = BlockMask.random(tied, 1.0, "row")
    assert set(mask.parameters) == {"a.bias", "b.bias"}
    assert mask.density == 8 / sum(p.numel() for p in tied.parameters())
    active = apply_mask(tied, mask)
    assert (
        "attention.out_proj.weight" in active.found.refused
        and "shared by 2 modules" in active.found.refused["a.weight"]
    )
    assert "attention.out_proj.weight" in active.summary()


def test_a_mask_that_activates_an_unreachable_weight_is_refused_by_name():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    saliency = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="attention.in_proj_weight cannot be masked"):
        apply_mask(model, BlockMask.from_saliency(saliency, 1.0))
    assert type(model["out"]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_a_parametrized_weight_is_left_out():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert all(name.startswith("1.") for name in BlockMask.random(model, 1.0).parameters)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_active_weight_that_has_had_no_gradient_is_passed_over_and_warned_of_once(optimizer):
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) @ self.bypassed.weight

    model = Bypass()
    active = apply_mask(model, BlockMask.random(model, 0.7, "row"))
    opt = OPTIMIZERS[optimizer](active)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"no gradient so far and are passed over: bypassed\.weight"):
        model(torch.randn(2, 4)).sum().backward()
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    assert torch.equal(before["bypassed.weight"], model.bypassed.weight)
    assert not torch.equal(before["used.weight"], model.used.weight)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_without_any_gradient_so_far_is_refused(optimizer):
    model, active = masked_net()
    before = active.values.clone()
    with pytest.raises(RuntimeError, match=r"never had a gradient: 0\.weight.* Call backward\(\)"):
        OPTIMIZERS[optimizer](active).step()
    assert torch.equal(active.values, before)


def test_unmaskable_weights_train_dense_on_request():
    model = Zoo()
    before = model.upsample.weight.detach().clone()
    active = apply_mask(model, BlockMask.random(model, 0.1, "row"), unmaskable="dense")
    opt = MaskedAdamW(active, lr=0.01)
    x, c = zoo_batch()
    model(x, c).square().mean().backward()
    opt.step()
    assert "upsample.weight" in active.names and not torch.equal(model.upsample.weight, before)
    active.remove()
    assert model.upsample.weight.requires_grad and type(model.upsample) is nn.ConvTranspose2d


# -- rule 7: foreign optimizers --------------------------------------------------------------------


def test_a_torch_optimizer_scatters_and_a_stale_backward_raises():
    model, active = masked_net()
    opt = torch.optim.SGD(active.parameters(), lr=0.1)
    stale, fresh = loss_of(model), loss_of(model)
    fresh.backward()
    opt.step()
    active.check()  # the dense weights follow
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_a_removed_or_forgotten_store_is_not_visited():
    model, active = masked_net()
    active.remove()
    assert active not in step_hooks.watched()
    model, active = masked_net()
    gone = weakref.ref(active)
    del model, active
    gc.collect()
    assert gone() is None


# -- rule 8: full float32 weights are views --------------------------------------------------------


def test_at_density_one_dense_weights_are_views_and_steps_are_adamws():
    model, reference = conv_net(), conv_net()
    reference.load_state_dict(model.state_dict())
    active = apply_mask(model, BlockMask.dense(model))
    assert model[0].weight.data_ptr() == active.values.data_ptr()
    assert active.scatter_table().is_empty
    opt = MaskedAdamW(active, lr=0.01, weight_decay=0.1)
    expected = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(10):
        x = torch.randn(4, 3, 8, 8)
        for net, o in ((model, opt), (reference, expected)):
            o.zero_grad()
            net(x).square().mean().backward()
            o.step()
    for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert model[0].weight is active.parameters()[0] and len(list(model.parameters())) == len(
        list(reference.parameters())
    )
    active.remove()
    assert model[0].weight.data_ptr() != active.values.data_ptr()


# -- rule 9: compiled models -----------------------------------------------------------------------


@pytest.mark.parametrize("block", ["row", (8, 8)])
def test_a_masked_model_compiles_without_graph_breaks(block):
    model, active = masked_net(0.3, block)
    x = torch.randn(4, 3, 8, 8)
    opt = MaskedAdamW(active, lr=0.01)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for net in (compiled, model):
        opt.zero_grad()
        net(x).square().mean().backward()
        active.bind_()
        grads.append(active.grads.clone())
    torch.testing.assert_close(grads[0], grads[1])
    opt.step()
    torch.testing.assert_close(compiled(x), model(x))


def test_gradient_checkpointing():
    model, active = masked_net()
    x = torch.randn(4, 3, 8, 8)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().mean().backward()
    active.bind_()
    got = active.grads.clone()
    active.zero_grad()
    model(x).square().mean().backward()
    assert torch.equal(got, active.grads)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("block", ["row", (8, 8), "element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_model_moves_to_a_gpu_and_keeps_its_promise(optimizer, block, dtype):
    model = Zoo().to(dtype)
    mask = BlockMask.random(model, 0.2, block)
    before = off_mask(model, mask)
    active = apply_mask(model, mask)
    model.cuda()
    opt = OPTIMIZERS[optimizer](active)
    x, c = (tensor.cuda() for tensor in zoo_batch(dtype))
    for _ in range(5):
        opt.zero_grad()
        model(x, c).square().mean().backward()
        opt.step()
    active.check()
    active.remove()
    assert_same_bits(before, off_mask(model.cpu(), mask))
