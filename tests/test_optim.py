"""MaskedAdamW is an ordinary optimizer to everything around it."""

import copy
import io

import pytest
import torch
from models import conv_net

from pecker_fast import BlockMask, MaskedAdamW, apply_mask, change_mask
from pecker_fast.ops import accumulate_saliency_


def masked(density=0.3, **settings):
    torch.manual_seed(0)
    model = conv_net()
    active = apply_mask(model, BlockMask.random(model, density, "row"))
    return model, active, MaskedAdamW(active, **({"lr": 0.01} | settings))


def train(model, opt, batches):
    for x in batches:
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()


BATCHES = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]


@pytest.mark.parametrize("settings", [{}, {"betas": (0.0, 0.99), "ema_decay": 0.9}, {"clip_value": 1e-3}])
def test_a_saved_state_continues_to_the_bit(settings):
    model, active, opt = masked(**settings)
    train(model, opt, BATCHES)
    half, half_active, half_opt = masked(**settings)
    train(half, half_opt, BATCHES[:3])
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": half_opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_active, other_opt = masked(**settings)
    other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["optimizer"])
    train(other, other_opt, BATCHES[3:])
    assert torch.equal(other_active.values, active.values)
    assert (active.ema is None) == ("ema_decay" not in settings)
    assert active.ema is None or torch.equal(other_active.ema, active.ema)


def test_masked_steps_equal_dense_adam_with_masked_gradients():
    model, active, opt = masked(weight_decay=0.0)
    torch.manual_seed(0)
    dense = conv_net()
    expected = torch.optim.Adam(dense.parameters(), lr=0.01)
    for x in BATCHES:
        train(model, opt, [x])
        expected.zero_grad()
        dense(x).square().mean().backward()
        for name, weight in dense.named_parameters():
            weight.grad *= active.mask.to_dense(name)
        expected.step()
    for name, weight in dense.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-4, atol=1e-5)


def test_without_a_first_moment_there_is_no_buffer_for_it():
    model, active, opt = masked(betas=(0.0, 0.999))
    train(model, opt, BATCHES[:1])
    (state,) = opt.state.values()
    assert set(state) == {"step", "exp_avg_sq"} and state["exp_avg_sq"].numel() == active.numel


def test_schedulers_scalers_and_clipping():
    model, active, opt = masked()
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for x in BATCHES[:3]:
        opt.zero_grad(set_to_none=True)
        scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(active.parameters(), 1e-3)
        assert float(norm) > 1e-3
        active.bind_()
        assert float(active.grads.norm()) == pytest.approx(1e-3, rel=1e-3)
        scaler.step(opt)
        scaler.update()
        schedule.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01)
    before = active.values.clone()
    active.grads.fill_(torch.inf)
    scaler.unscale_(opt)
    scaler.step(opt)  # skipped: the gradients are infinite
    assert torch.equal(active.values, before)


@pytest.mark.parametrize(
    "settings", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"ema_decay": 1.0}, {"weight_decay": float("nan")}]
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="MaskedAdamW: "):
        masked(**settings)


def test_plain_parameters_are_refused():
    with pytest.raises(TypeError, match="for plain parameters use torch.optim.AdamW"):
        MaskedAdamW(conv_net().parameters())


def test_a_state_of_another_mask_is_refused():
    model, _, opt = masked()
    train(model, opt, BATCHES[:1])
    state = copy.deepcopy(opt.state_dict())
    _, _, other = masked(density=0.6)
    with pytest.raises(ValueError, match="load the mask it was saved with"):
        other.load_state_dict(state)


def capturable_pair(**settings):
    return masked(**settings), masked(**settings, capturable=True)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("settings", [{}, {"betas": (0.0, 0.99), "ema_decay": 0.9}, {"saliency": "abs"}])
def test_capturable_counts_in_a_tensor_and_makes_the_same_steps(settings, backend):
    (model, active, opt), (other_model, other_active, other) = capturable_pair(**settings, backend=backend)
    train(model, opt, BATCHES)
    train(other_model, other, BATCHES[:1])
    (state,) = other.state.values()
    step = state["step"]
    train(other_model, other, BATCHES[1:])
    assert state["step"] is step and step.dtype == torch.float32 and step.shape == () and float(step) == len(BATCHES)
    assert torch.equal(active.values, other_active.values)


def test_a_learning_rate_in_a_tensor_is_read_at_every_step():
    (model, active, opt), (other_model, other_active, other) = capturable_pair()
    rate = torch.tensor(0.01, dtype=torch.float64)
    other.param_groups[0]["lr"] = rate
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    other_schedule = torch.optim.lr_scheduler.ExponentialLR(other, 0.5)
    for x in BATCHES:
        train(model, opt, [x])
        train(other_model, other, [x])
        schedule.step()
        other_schedule.step()
    assert other.param_groups[0]["lr"] is rate and float(rate) < 0.001
    assert torch.equal(active.values, other_active.values)


def test_a_capturable_state_continues_to_the_bit():
    (model, active, opt), (other_model, other_active, other) = capturable_pair()
    train(model, opt, BATCHES)
    train(other_model, other, BATCHES[:2])
    file = io.BytesIO()
    torch.save({"model": other_model.state_dict(), "optimizer": other.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for capturable in (True, False):  # as in torch.optim, the saved setting wins
        fresh_model, fresh_active, fresh = masked(capturable=capturable)
        fresh_model.load_state_dict(saved["model"])
        fresh.load_state_dict(copy.deepcopy(saved["optimizer"]))
        assert fresh.param_groups[0]["capturable"]
        train(fresh_model, fresh, BATCHES[2:])
        assert torch.equal(fresh_active.values, active.values)
    twin_model, twin = copy.deepcopy((other_model, other))
    train(twin_model, twin, BATCHES[2:])
    assert torch.equal(twin.active.values, active.values)
    assert not torch.equal(other_active.values, active.values)


def test_a_state_from_before_there_was_the_setting_is_loaded():
    model, active, opt = masked()
    train(model, opt, BATCHES[:2])
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        del group["capturable"]
    other_model, other_active, other = masked()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    train(model, opt, BATCHES[2:])
    train(other_model, other, BATCHES[2:])
    assert torch.equal(other_active.values, active.values)


@pytest.mark.parametrize("before", [False, True])
def test_capturable_may_be_switched_in_mid_training(before):
    model, active, opt = masked()
    train(model, opt, BATCHES)
    other_model, other_active, other = masked(capturable=before)
    train(other_model, other, BATCHES[:3])
    other.param_groups[0]["capturable"] = not before
    train(other_model, other, BATCHES[3:])
    (state,) = other.state.values()
    assert isinstance(state["step"], torch.Tensor) != before
    assert torch.equal(other_active.values, active.values)


def test_a_change_of_the_mask_keeps_the_count():
    model, active, opt = masked(capturable=True)
    train(model, opt, BATCHES[:3])
    change_mask(active, BlockMask.random(model, 0.5, "row"), opt)
    train(model, opt, BATCHES[3:4])
    (state,) = opt.state.values()
    assert float(state["step"]) == 4 and len(state["exp_avg_sq"]) == active.numel


def test_closures():
    model, active, opt = masked(lr=1e-4)

    def closure():
        opt.zero_grad()
        loss = model(BATCHES[0]).square().mean()
        loss.backward()
        return loss

    first = opt.step(closure)
    assert opt.step(closure).item() < first.item()


@pytest.mark.parametrize("kind", ["signed_sum", "abs", "square"])
def test_saliency_is_that_of_the_gradients_before_clipping(kind):
    model, active, opt = masked(saliency=kind, clip_value=1e-3)
    plain, plain_active, plain_opt = masked(clip_value=1e-3)
    expected = {name: torch.zeros_like(parameter) for name, parameter in active.named_parameters()}
    for x in BATCHES[:3]:
        train(model, opt, [x])
        train(plain, plain_opt, [x])
        for name, parameter in active.named_parameters():
            accumulate_saliency_(expected[name], parameter.grad, kind)
    assert torch.equal(active.values, plain_active.values)
    flat = torch.cat([total.flatten() for total in expected.values()])
    saliency = opt.saliency()
    assert set(saliency) == set(active.names)
    for name, dense in saliency.items():
        inside = active.mask.parameters[name].to_dense()
        assert dense.shape == inside.shape and not dense[~inside].any()
        assert torch.equal(dense, active.to_dense(flat, name).abs())
    BlockMask.from_saliency(saliency, 0.1, "row")


def test_saliency_is_part_of_the_state():
    model, active, opt = masked(saliency="abs")
    train(model, opt, BATCHES[:2])
    other_model, _, other = masked(saliency="abs")
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, BATCHES[2:4])
    train(other_model, other, BATCHES[2:4])
    for name, saliency in opt.saliency().items():
        assert torch.equal(other.saliency()[name], saliency)


def test_no_saliency_is_kept_unless_asked_for():
    model, _, opt = masked()
    train(model, opt, BATCHES[:1])
    with pytest.raises(RuntimeError, match="make it with saliency="):
        opt.saliency()
    with pytest.raises(ValueError, match="MaskedAdamW: saliency: expected one of signed_sum"):
        masked(saliency="cube")


# -- on a GPU ------------------------------------------------------------------------------------

GPU_BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])


def on_gpu(backend, **settings):
    torch.manual_seed(0)
    model = conv_net().cuda()
    active = apply_mask(model, BlockMask.random(model, 0.3, "row"))
    return model, active, MaskedAdamW(active, **({"lr": 0.01, "backend": backend} | settings))


@pytest.mark.gpu
@GPU_BACKENDS
@pytest.mark.parametrize("with_backward", [False, True])
def test_a_captured_step_follows_the_count_and_the_learning_rate(backend, with_backward, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the bits of both are compared
    settings = {"betas": (0.9, 0.99), "ema_decay": 0.9, "weight_decay": 0.1, "clip_value": 0.5, "capturable": True}
    x = torch.randn(2, 3, 8, 8, device="cuda")
    captured, eager = (on_gpu(backend, **settings) for _ in range(2))
    for _, active, opt in (captured, eager):
        opt.param_groups[0]["lr"] = torch.full((), 0.01, device="cuda")
        active.zero_grad()
        for parameter in active.parameters():
            parameter.grad = torch.zeros_like(parameter)
        active.bind_()

    def step(model, active, opt):
        if with_backward:
            opt.zero_grad()
            model(x).square().mean().backward()
        opt.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in (captured, eager):
            step(*run)
            step(*run)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured)
    rates = [0.01, 0.003, 0.02, 0.01, 0.005]
    for rate in rates:
        x.copy_(torch.randn_like(x))
        grads = torch.randn_like(captured[1].grads)
        before = captured[1].values.clone()
        for _, active, opt in (captured, eager):
            opt.param_groups[0]["lr"].fill_(rate)
            if not with_backward:
                active.grads.copy_(grads)
        graph.replay()
        step(*eager)
        assert torch.equal(captured[1].values, eager[1].values) and not torch.equal(captured[1].values, before)
        for name, weight in eager[0].named_parameters():
            assert torch.equal(captured[0].get_parameter(name), weight), name
    (state,) = captured[2].state.values()
    assert float(state["step"]) == 2 + len(rates)
    assert torch.equal(captured[1].ema, eager[1].ema)


@pytest.mark.gpu
def test_a_step_that_a_graph_would_freeze_is_refused():
    model, _, opt = on_gpu(None)
    train(model, opt, [BATCHES[0].cuda()])
    with pytest.raises(RuntimeError, match="make it with capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()


@pytest.mark.gpu
def test_a_captured_step_refuses_a_learning_rate_on_the_cpu():
    model, _, opt = on_gpu(None, capturable=True)
    opt.param_groups[0]["lr"] = torch.tensor(0.01)
    with pytest.raises(ValueError, match="lr: expected a number, or a tensor of .* on cuda:0, got .* on cpu"):
        train(model, opt, [BATCHES[0].cuda()])


@pytest.mark.gpu
@GPU_BACKENDS
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_waits_for_nothing(backend, capturable):
    model, _, opt = on_gpu(backend, capturable=capturable, ema_decay=0.9, saliency="abs")
    batches = [x.cuda() for x in BATCHES]
    train(model, opt, batches[:1])
    for x in batches[1:]:
        opt.zero_grad()
        model(x).square().mean().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
