"""masked_adamw_: every backend equals float64 truth within the budget, and the CPU kernel the reference to the bit."""

import math

import pytest
import torch
from budget import assert_within_budget

from pecker_fast import backends
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import accumulate_saliency_, masked_adamw_
from pecker_fast.scatter import ScatterTable, Target

needs_native = pytest.mark.skipif(
    backends()["masked_adamw_"]["cpu"].used != "cpu",
    reason=f"native module: {backends()['masked_adamw_']['cpu'].not_used.get('cpu')}",
)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
SIZES = [0, 1, 15, 17, 1000, 70_001]
SETTINGS = [
    {"beta1": 0.9, "weight_decay": 0.0},
    {"beta1": 0.9, "weight_decay": 0.1, "clip_value": 0.5},
    {"beta1": 0.0, "beta2": 0.99, "clip_value": 1.0, "ema_decay": 0.98},
    {"beta1": 0.0, "weight_decay": 0.01, "eps": 1e-4, "ema_decay": 0.9999},
    {"beta1": 0.9, "clip_value": 0.5, "saliency_kind": "abs"},
    {"beta1": 0.0, "clip_value": 0.5, "saliency_kind": "square"},
    {"beta1": 0.0, "ema_decay": 0.98, "saliency_kind": "signed_sum"},
    {"beta1": 0.9, "ema_decay": 0.98, "saliency_kind": "square"},
]
SALIENCY = {"signed_sum": lambda g: g, "abs": torch.abs, "square": torch.square}


def buffers(n, settings, dtype=torch.float32):
    value = torch.randn(n, dtype=dtype)
    return {
        "value": value,
        "exp_avg": torch.randn(n, dtype=dtype) if settings["beta1"] else None,
        "exp_avg_sq": torch.rand(n, dtype=dtype),
        "ema": value.clone() if "ema_decay" in settings else None,
        "saliency": torch.rand(n, dtype=dtype) if "saliency_kind" in settings else None,
    }


def run(state, grads, settings, backend=None, **extra):
    for step, grad in enumerate(grads, 1):
        masked_adamw_(
            state["value"], grad, state["exp_avg"], state["exp_avg_sq"], ema=state["ema"],
            saliency=state["saliency"], step=step, lr=1e-2, backend=backend, **settings, **extra,
        )  # fmt: skip
    return state


def truth_of(state, grads, settings):
    """The definition in float64, written out once more and independently of the reference."""
    w, m, v, ema, saliency = (None if b is None else b.double().clone() for b in state.values())
    s = {"beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_value": math.inf, "ema_decay": 0.0} | settings
    for step, grad in enumerate(grads, 1):
        if saliency is not None:
            saliency = saliency + SALIENCY[s["saliency_kind"]](grad.double())  # not clipped
        g = grad.double().clamp(-s["clip_value"], s["clip_value"])
        w = w * (1 - 1e-2 * s["weight_decay"])
        m = g if m is None else s["beta1"] * m + (1 - s["beta1"]) * g
        v = s["beta2"] * v + (1 - s["beta2"]) * g * g
        m_hat, v_hat = m / (1 - s["beta1"] ** step), v / (1 - s["beta2"] ** step)
        w = w - 1e-2 * m_hat / (v_hat.sqrt() + s["eps"])
        ema = None if ema is None else s["ema_decay"] * ema + (1 - s["ema_decay"]) * w
        m = None if state["exp_avg"] is None else m
    return {"value": w, "exp_avg": m, "exp_avg_sq": v, "ema": ema, "saliency": saliency}


def clone(state):
    return {name: None if b is None else b.clone() for name, b in state.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_against_float64(backend, n, settings):
    state = buffers(n, settings)
    grads = [torch.randn(n) for _ in range(3)]
    truth = truth_of(state, grads, settings)
    plain = run(clone(state), grads, settings, "reference")
    got = run(clone(state), grads, settings, backend)
    for name, expected in truth.items():
        if expected is None:
            assert got[name] is None
        else:
            assert_within_budget(got[name], expected, plain[name])


@pytest.mark.parametrize("settings", SETTINGS)
def test_float64_is_exact_by_the_reference(settings):
    state = buffers(100, settings, torch.float64)
    grads = [torch.randn(100, dtype=torch.float64) for _ in range(3)]
    truth, got = truth_of(state, grads, settings), run(clone(state), grads, settings)
    for name, expected in truth.items():
        assert expected is None or torch.allclose(got[name], expected, rtol=1e-12, atol=1e-14), name


@needs_native
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_cpu_kernel_has_the_reference_bits(n, settings):
    state = buffers(n, settings)
    grads = [torch.randn(n) * 10 ** torch.randint(-12, 3, (n,)).float() for _ in range(3)]
    a, b = run(clone(state), grads, settings, "reference"), run(clone(state), grads, settings, "cpu")
    for name in a:
        assert a[name] is None or torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", ["row", (4, 3), "element"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scatter_writes_active_weights_and_nothing_else(backend, dtype, block, layout):
    shapes = [(10, 7, 3, 3), (5, 9, 1, 1), (8, 6, 3, 3)]
    dense = [torch.randn(shape).to(dtype).to(memory_format=layout) for shape in shapes]
    before = [d.clone() for d in dense]
    masks = []
    for shape in shapes:
        grid = BlockGrid.of(shape, block)
        masks.append(ParameterMask(grid, torch.randperm(grid.num_blocks)[: grid.num_blocks // 3].sort().values))
    last = layout == torch.channels_last
    table = ScatterTable([Target(m, d, last) for m, d in zip(masks, dense, strict=True)], torch.device("cpu"))
    n = table.numel
    value = torch.randn(n)
    masked_adamw_(value, torch.randn(n), None, torch.rand(n), step=1, lr=0.1, beta1=0, scatter=table, backend=backend)
    stretches = value.split([mask.numel for mask in masks])
    for d, old, mask, stretch in zip(dense, before, masks, stretches, strict=True):
        assert torch.equal(d.flatten()[mask.index(last)], stretch.to(dtype))
        assert torch.equal(d[~mask.to_dense()], old[~mask.to_dense()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_gradients_stay_visible(backend):
    state = buffers(40, {"beta1": 0.0})
    grad = torch.ones(40)
    grad[7] = torch.nan
    run(state, [grad], {"beta1": 0.0, "clip_value": 1.0}, backend)
    assert state["value"].isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SALIENCY)
def test_saliency_is_that_of_accumulate_saliency_and_changes_no_step(backend, kind):
    settings = {"beta1": 0.9, "clip_value": 0.5}
    state, grads = buffers(5000, settings), [torch.randn(5000) for _ in range(3)]
    grads[1][:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    alone = run(clone(state), grads, settings, backend)
    total = torch.zeros(5000)
    got = run(clone(state) | {"saliency": total}, grads, settings | {"saliency_kind": kind}, backend)
    for name in ("value", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(got[name], alone[name], rtol=0, atol=0, equal_nan=True)
    expected = torch.zeros(5000)
    for grad in grads:
        accumulate_saliency_(expected, grad, kind)
    torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)


def test_bad_arguments_change_nothing():
    value, grad, square = torch.ones(8), torch.ones(8), torch.ones(8)
    good = {"step": 1, "lr": 0.1}
    for arguments, extra in (
        ((value, grad[:5], None, square), {"beta1": 0.0}),
        ((value, grad.double(), None, square), {"beta1": 0.0}),
        ((value, torch.ones(16)[::2], None, square), {"beta1": 0.0}),
        ((value, grad, None, square), {"beta1": 0.9}),
        ((value, grad, None, square), {"beta1": 0.0, "step": 0}),
        ((value, grad, None, square), {"beta1": 0.0, "backend": "opencl"}),
        ((value, grad, None, square), {"beta1": 0.0, "saliency": torch.zeros(7)}),
        ((value, grad, None, square), {"beta1": 0.0, "saliency": torch.zeros(8).bfloat16()}),
        ((value, grad, None, square), {"beta1": 0.0, "saliency": torch.zeros(16)[::2]}),
        ((value, grad, None, square), {"beta1": 0.0, "saliency": torch.zeros(8), "saliency_kind": "cube"}),
    ):
        with pytest.raises(ValueError):
            masked_adamw_(*arguments, **(good | extra))
    with pytest.raises(RuntimeError, match="cuda"):
        masked_adamw_(value, grad, None, square, beta1=0.0, backend="cuda", **good)
    assert torch.equal(value, torch.ones(8)) and torch.equal(square, torch.ones(8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    hyper = (1, 0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, 0.0, "abs")
    state = (torch.randn(9), torch.randn(9), torch.randn(9), torch.rand(9), torch.randn(9), torch.zeros(9))
    arguments = (*state, [], *hyper, backend)
    torch.library.opcheck(torch.ops.pecker_fast.masked_adamw_, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "cuda"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("n", SIZES)
def test_on_a_gpu(backend, settings, n):
    state = buffers(n, settings)
    grads = [torch.randn(n) for _ in range(3)]
    truth = truth_of(state, grads, settings)
    plain = run(clone(state), grads, settings, "reference")
    moved = {name: None if b is None else b.cuda() for name, b in clone(state).items()}
    got = run(moved, [grad.cuda() for grad in grads], settings, backend)
    for name, expected in truth.items():
        if expected is not None:
            assert_within_budget(got[name].cpu(), expected, plain[name])
