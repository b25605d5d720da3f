"""What others write into weights between steps takes effect, whether into active parameters or into dense weights."""

import copy

import pytest
import torch
from models import Zoo, zoo_batch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pecker_fast import ActiveParameters, BlockMask, Delta, MaskedAdamW, apply_mask, change_mask
from pecker_fast.delta.state import tensors_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def net(dtype=torch.float32):
    """Rows in part, a norm and biases that train as a whole, and a layer that is frozen."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 16), nn.Linear(16, 4)).to(dtype)


def mask_for(model, block="row", density=0.5):
    return BlockMask.random(model, density, block)


def masked(dtype=torch.float32, block="row"):
    model = net(dtype)
    return model, apply_mask(model, mask_for(model, block))


def x_for(dtype=torch.float32):
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def x_like(model):
    return x_for(model[0].weight.dtype)


def a_step(model, active, dtype=torch.float32, optimizer=torch.optim.SGD):
    opt = optimizer(active.parameters(), lr=0.05)
    model(x_for(dtype)).float().square().mean().backward()
    opt.step()
    opt.zero_grad()
    return opt


# -- written into the active parameters ------------------------------------------------------------


def ema_copy_to(active):
    ema = pytest.importorskip("diffusers.training_utils").EMAModel(active.parameters(), decay=0.5)
    for shadow in ema.shadow_params:
        shadow.mul_(0.5)
    ema.copy_to(active.parameters())


def lookahead(active):
    for p in active.parameters():
        slow = torch.zeros_like(p)
        p.data.copy_(slow + 0.5 * (p.data - slow))


def sam_climb(active):
    with torch.no_grad():
        for p in active.parameters():
            p.add_(0.5)


def replaced_data(active):
    for p in active.parameters():
        p.data = p.data * 2


def in_inference_mode(active):
    with torch.inference_mode():
        for p in active.parameters():
            p.data.mul_(3)


WRITES = {
    "EMA's copy_to": ema_copy_to,
    "vector_to_parameters": lambda a: vector_to_parameters(parameters_to_vector(a.parameters()) * 2, a.parameters()),
    "Lookahead": lookahead,
    "SAM's climb": sam_climb,
    "p.data = ...": replaced_data,
    "foreach": lambda a: torch._foreach_mul_([p.data for p in a.parameters()], 0.25),
    "swa": lambda a: [p.detach().copy_(torch.full_like(p, 0.1)) for p in a.parameters()],
    "inference mode": in_inference_mode,
    "nn.init": lambda a: [nn.init.normal_(p) for p in a.parameters()],
}


def reference(model, active):
    """The same model without a mask, its weights put together by hand from the active parameters."""
    values = {name: p.detach().clone() for name, p in active.named_parameters()}
    plain = net(next(model.parameters()).dtype)
    state = {name: w.clone() for name, w in torch.nn.Module.state_dict(plain).items()}
    held = dict(model.named_parameters())
    for name in state:
        state[name].copy_(held[name].detach())
        if name in values:
            mask = active.mask.parameters[name]
            state[name].view(-1)[mask.index()] = values[name].flatten().to(state[name].dtype)
    plain.load_state_dict(state)
    return plain


READERS = {
    "forward": lambda model, plain: (model(x_like(model)), plain(x_like(model))),
    "a part's forward": lambda model, plain: (model[0](x_like(model)), plain[0](x_like(model))),
    "forward() itself": lambda model, plain: (model.forward(x_like(model)), plain(x_like(model))),
    "state_dict": lambda model, plain: (list(model.state_dict().values()), list(plain.state_dict().values())),
    "a part's state_dict": lambda model, plain: (model[3].state_dict()["weight"], plain[3].state_dict()["weight"]),
    "deepcopy": lambda model, plain: (copy.deepcopy(model)(x_like(model)), plain(x_like(model))),
    "a delta's weights": lambda model, plain: (list(tensors_of(model).values()), list(plain.state_dict().values())),
    "remove": lambda model, plain: (
        list(ActiveParameters.of(model).remove().state_dict().values()), list(plain.state_dict().values())),
}  # fmt: skip


@pytest.mark.parametrize("block", ["row", (4, 4), "element"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", WRITES)
def test_a_forward_follows_what_was_written_into_active_parameters(write, dtype, block):
    model, active = masked(dtype, block)
    a_step(model, active, dtype)
    before = model(x_for(dtype))
    WRITES[write](active)
    expected = reference(model, active)(x_for(dtype))
    assert torch.equal(model(x_for(dtype)), expected) and not torch.equal(before, expected)
    active.check()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("write", ["EMA's copy_to", "SAM's climb", "p.data = ..."])
def test_every_reader_follows_what_was_written_into_active_parameters(write, reader):
    model, active = masked()
    a_step(model, active)
    WRITES[write](active)
    found, expected = READERS[reader](model, reference(model, active))
    for one, other in zip(found, expected, strict=True) if isinstance(found, list) else [(found, expected)]:
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [lambda m: torch.compile(m, backend="eager", fullgraph=True), "in place"])
def test_compiled_models_follow_too(make):
    torch._dynamo.reset()
    model, active = masked()
    compiled = model if make == "in place" else make(model)
    if make == "in place":
        model.compile(backend="eager", fullgraph=True)
    a_step(compiled, active)
    WRITES["EMA's copy_to"](active)
    expected = reference(model, active)(x_for())
    assert torch.equal(compiled(x_for()), expected)


def test_two_forwards_before_one_backward_are_no_stale_ones():
    model, active = masked()
    a_step(model, active)
    loss = model(x_for()).sum() + model(2 * x_for()).sum()
    model.state_dict()
    loss.backward()


def test_an_average_is_swapped_in_for_validation_and_out_again():
    model, active = masked(torch.bfloat16)
    ema = pytest.importorskip("diffusers.training_utils").EMAModel(active.parameters(), decay=0.5)
    for _ in range(3):
        a_step(model, active, torch.bfloat16)
        ema.step(active.parameters())
    trained, seen = active.values.clone(), model(x_for(torch.bfloat16))
    ema.store(active.parameters())
    ema.copy_to(active.parameters())
    assert not torch.equal(model(x_for(torch.bfloat16)), seen)
    ema.restore(active.parameters())
    assert torch.equal(model(x_for(torch.bfloat16)), seen) and torch.equal(active.values, trained)


# -- written into the dense weights ----------------------------------------------------------------


def dense_weights(model):
    return [p for name, p in model.named_parameters() if not name.endswith("_active")]


def set_module_tensor(model):
    put = pytest.importorskip("accelerate.utils").set_module_tensor_to_device
    for name in ("0.weight", "1.bias", "3.weight"):
        put(model, name, "cpu", value=torch.full_like(model.get_parameter(name), 0.25))


def new_parameter(model):
    model[3].weight = nn.Parameter(model[3].weight.detach() * 2, requires_grad=False)
    model[1].weight = nn.Parameter(model[1].weight.detach() * 2)


def named(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("weight"):
                p.copy_(p + 0.125)


DENSE_WRITES = {
    "p.data.add_": lambda model: [p.data.add_(0.5) for p in dense_weights(model)],
    "p.data = ...": lambda model: [setattr(p, "data", p.data * 2) for p in dense_weights(model)],
    "set_module_tensor_to_device": set_module_tensor,
    "a new parameter": new_parameter,
    "named_parameters": named,
    "nn.init": lambda model: nn.init.zeros_(model[3].weight),
    "load_state_dict": lambda model: model.load_state_dict({n: w + 1 for n, w in model.state_dict().items()}),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(
        {n: w + 1 for n, w in model.state_dict().items()}, assign=True),
    "halved, each once": lambda model: [p.data.mul_(0.5) for p in model.parameters()],
    "a single weight": lambda model: model[3].weight.data[:, 3].fill_(7.0),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["MaskedAdamW", "SGD"])
@pytest.mark.parametrize("when", ["before forward", "after backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", DENSE_WRITES)
def test_what_was_written_into_dense_weights_is_taken_over(write, dtype, when, optimizer):
    model, active = masked(dtype)
    a_step(model, active, dtype)
    opt = MaskedAdamW(active, lr=0.0) if optimizer == "MaskedAdamW" else torch.optim.SGD(active.parameters(), lr=0.0)
    plain = net(dtype)
    plain.load_state_dict(model.state_dict())
    if when == "before forward":
        DENSE_WRITES[write](model)
        model(x_for(dtype)).float().sum().backward()
    else:
        model(x_for(dtype)).float().sum().backward()
        DENSE_WRITES[write](model)
    DENSE_WRITES[write](plain)
    opt.step()  # a learning rate of zero: nothing may change
    expected = plain.state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in model.state_dict().items())
    assert all(torch.equal(w, expected[n]) for n, w in active.remove().state_dict().items())


def test_training_goes_on_from_what_was_written():
    model, active = masked()
    opt = torch.optim.SGD(active.parameters(), lr=0.1)
    model(x_for()).square().mean().backward()
    opt.step()
    model[3].weight.data.fill_(0.25)
    before = model[3].weight.detach().clone()
    opt.zero_grad()
    model(x_for()).square().mean().backward()
    active.bind_()
    grad = active.to_dense(active.grads, "3.weight")
    opt.step()
    assert grad.any()
    torch.testing.assert_close(model[3].weight, before - 0.1 * grad)


def test_a_lora_that_is_fused_stays_fused():
    unet = small_unet()
    active = apply_mask(unet, BlockMask.random(unet, 0.2, "row"))
    peft = pytest.importorskip("peft")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    active.requires_grad_(True)
    opt = torch.optim.SGD(active.parameters(), lr=0.0)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 5, 32)
    plain = unet(*inputs).sample.detach()
    unet.fuse_lora()
    unet.unload_lora()
    fused = unet(*inputs).sample.detach()
    assert not torch.allclose(plain, fused)
    unet(*inputs).sample.sum().backward()
    opt.step()
    assert torch.equal(unet(*inputs).sample, fused)
    assert torch.equal(active.remove()(*inputs).sample, fused)


def test_digits_below_the_dense_dtype_outlive_what_is_written_beside_them():
    model, active = masked(torch.bfloat16)
    with torch.no_grad():
        active.values.add_(1e-5)  # bfloat16 has none of it
    active.scatter_()
    held = active.values.clone()
    weight, mask = model[3].weight, active.mask.parameters["3.weight"]
    row = int(mask.active[0])
    weight.data[row, 0] = 5.0
    active.sync_()
    entry = next(e for e in active.entries if e.name == "3.weight")
    assert active.values[entry.offset] == 5.0
    held[entry.offset] = 5.0
    assert torch.equal(active.values, held)


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_a_change_of_dtype_is_no_write(there, density):
    model = net()
    active = apply_mask(model, BlockMask.random(model, density, "row"))
    a_step(model, active)
    held = active.values.clone()
    model.to(there)
    model(x_for(there))
    model.to(torch.float32)
    model(x_for())
    assert torch.equal(active.values, held)
    active.check()
    whole = [name for name, dense, p in active.pairs() if dense is p]
    assert set(whole) == {e.name for e in active.entries if e.mask.is_full}


@pytest.mark.parametrize("shape", [(8, 16), (16, 4), (32, 8)])
def test_a_weight_of_another_shape_is_refused(shape):
    model, active = masked()
    a_step(model, active)
    values = active.values.clone()
    model[0].weight.data = torch.zeros(shape)
    for call in (lambda: model(x_for()), active.sync_, active.remove):
        with pytest.raises(RuntimeError, match=r"0\.weight was replaced after apply_mask: expected \(16, 8\)"):
            call()
    assert torch.equal(active.values, values)


@pytest.mark.parametrize(
    "make",
    [lambda w: torch.randn(16, 20)[:, :8], lambda w: torch.ones(16, 1).expand(16, 8), lambda w: w.t().clone().t()],
)
def test_a_weight_whose_memory_is_not_its_own_is_taken_over(make):
    model, active = masked()
    a_step(model, active)
    new = make(model[0].weight.detach())
    model[0].weight.data = new
    model(x_for())
    active.check()
    assert torch.equal(model[0].weight, new)
    a_step(model, active)
    outside = ~active.mask.to_dense("0.weight")
    assert torch.equal(model[0].weight[outside], new[outside])


def test_a_model_goes_through_a_file_with_its_mask(tmp_path):
    model, active = masked()
    a_step(model, active)
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    store = ActiveParameters.of(other)
    WRITES["SAM's climb"](store)
    assert not torch.equal(other(x_for()), model(x_for()))
    store.check()
    active.check()


def test_a_schedule_free_optimizer_trains_and_evaluates_as_on_a_dense_model():
    schedulefree = pytest.importorskip("schedulefree")

    def run(with_mask):
        model = net()
        mask = mask_for(model)
        parameters = apply_mask(model, mask).parameters() if with_mask else list(model.parameters())
        if not with_mask:
            for name, p in model.named_parameters():
                on = mask.to_dense(name)
                p.register_hook(lambda g, on=on: g * on)
        opt = schedulefree.AdamWScheduleFree(parameters, lr=0.05)
        seen = []
        for _ in range(4):
            opt.train()
            for _ in range(3):
                opt.zero_grad()
                model(x_for()).square().mean().backward()
                opt.step()
            opt.eval()
            seen += [model(x_for()).detach(), *(w.clone() for w in model.state_dict().values())]
        return seen

    for one, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_weights_lent_by_functional_call_are_not_taken_over():
    model, active = masked()
    a_step(model, active)
    held = {name: w.clone() for name, w in model.state_dict().items()}
    lent = {name: torch.zeros_like(w) for name, w in held.items()}
    assert not torch.func.functional_call(model, lent, x_for()).any()
    assert all(torch.equal(w, held[name]) for name, w in model.state_dict().items())


def test_a_mask_that_changes_takes_over_first():
    model, active = masked()
    a_step(model, active)
    model[3].weight.data.fill_(0.5)
    change_mask(active, BlockMask.random(model, 0.3, "row", seed=3))
    assert bool((model[3].weight == 0.5).all())


def test_extracted_deltas_hold_what_was_written(tmp_path):
    model, before = net(), net()
    active = apply_mask(model, mask_for(model))
    a_step(model, active)
    ema_copy_to(active)
    Delta.extract(before, model, active.mask).save(tmp_path / "delta")
    Delta.load(tmp_path / "delta").apply(before, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), model.state_dict().values(), strict=True)
    )


def small_unet():
    torch.manual_seed(0)
    return pytest.importorskip("diffusers").UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def test_saved_pretrained_weights_follow(tmp_path):
    unet = small_unet()
    active = apply_mask(unet, BlockMask.random(unet, 0.2, "row"))
    for p in active.parameters():
        p.data.add_(1.0)
    unet.save_pretrained(tmp_path)
    saved = type(unet).from_pretrained(tmp_path).state_dict()
    active.sync_()
    assert all(torch.equal(saved[name], w) for name, w in unet.state_dict().items())


def test_all_kinds_of_layers_follow():
    model = Zoo().eval()
    active = apply_mask(model, BlockMask.random(model, 0.5, "row"))
    batch = zoo_batch()
    for p in active.parameters():
        p.data.mul_(0.5)
    found = model(*batch)
    active.scatter_()
    assert torch.equal(found, model(*batch))
