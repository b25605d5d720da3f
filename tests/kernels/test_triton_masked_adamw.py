"""The Triton masked_adamw_ in triton's interpreter (on a GPU where there is one): the reference's bits."""

from __future__ import annotations

import importlib

import pytest
import torch
from adamw import DTYPES, SETTINGS, Model, assert_same_bits, buffers, clone, gradients, run, truth_of
from budget import assert_within_budget

from pecker_fast.ops import masked_adamw_
from pecker_fast.ops.triton_kernels import DEVICES, INTERPRETED

pytest.importorskip("triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(DEVICE not in DEVICES, reason="neither a GPU nor triton's interpreter")
SIZES = [0, 1, 1023, 1024, 1025, 5000]
MASKS = ["row", (4, 3), "element"]


def check(settings, n, grads=None, model=None, **extra):
    """Three steps by the kernel and by the reference on the CPU, from one state."""
    state = buffers(n, settings)
    grads = gradients(n) if grads is None else grads
    scatter = {} if model is None else {"scatter": model.table}
    expected = run(clone(state), grads, settings, "reference")
    got = run(clone(state, DEVICE), [g.to(DEVICE) for g in grads], settings, "triton", **scatter, **extra)
    assert_same_bits(got, expected)
    if model is not None:
        model.check(got["value"])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("n", SIZES)
def test_the_bits_of_the_reference(settings, n):
    check(settings, n)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_bits_of_the_reference_with_numbers_in_tensors(settings):
    check(settings, 1025, on_device=True)


@pytest.mark.parametrize("settings", SETTINGS)
def test_against_float64(settings):
    state, grads = buffers(2000, settings), [torch.randn(2000) for _ in range(3)]
    plain, truth = run(clone(state), grads, settings, "reference"), truth_of(state, grads, settings)
    got = run(clone(state, DEVICE), [g.to(DEVICE) for g in grads], settings, "triton")
    for name, expected in truth.items():
        if expected is not None:
            assert_within_budget(got[name].cpu(), expected, plain[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", MASKS)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.4, 0.9, 1.0])
def test_the_scatter_writes_the_active_weights_and_no_other_bit(dtype, block, density):
    model = Model([(40, 30), (7, 9), (64, 40)], block, density, [dtype], DEVICE)
    check({"beta1": 0.0}, model.numel, model=model)


@pytest.mark.parametrize("block", MASKS)
def test_a_model_of_all_dtypes(block):
    model = Model([(30, 31), (20, 5, 3, 3), (17,), (45, 44)], block, 0.5, DTYPES, DEVICE)
    check({"beta1": 0.9, "ema_decay": 0.9}, model.numel, model=model)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_many_random_cases():
    generator = torch.Generator().manual_seed(0)

    def pick(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for _ in range(150):
        shapes = [(pick(range(1, 40)), pick(range(1, 60))) for _ in range(pick([1, 2, 5]))]
        model = Model(shapes, pick(MASKS), pick([0.05, 0.1, 0.5, 0.97]), [pick(DTYPES), pick(DTYPES)], DEVICE)
        grads = gradients(model.numel, 1)
        grads[0][::5] = pick([torch.nan, torch.inf, 0.0, 1e-30])
        check(pick(SETTINGS), model.numel, grads, model)


def test_nan_gradients_stay_visible():
    model = Model([(30, 40), (9, 9)], "element", 0.5, [torch.bfloat16, torch.float16], DEVICE)
    n = model.numel
    grad = torch.ones(n, device=DEVICE)
    grad[7] = torch.nan
    value, square = torch.zeros(n, device=DEVICE), torch.ones(n, device=DEVICE)
    masked_adamw_(
        value, grad, None, square, step=1, lr=1e-2, beta1=0.0, clip_value=1.0, scatter=model.table, backend="triton"
    )
    assert value.isnan().nonzero().flatten().tolist() == [7]
    assert sum(int(d.isnan().sum()) for d in model.dense) == 1


@pytest.mark.parametrize("on_device", [False, True])
def test_opcheck(on_device):
    tensors = (torch.ones((), device=DEVICE), torch.ones((), device=DEVICE)) if on_device else (None, None)
    state = [torch.rand(9, device=DEVICE) for _ in range(6)]
    hyper = (1, 0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, 0.0, "abs")
    torch.library.opcheck(torch.ops.pecker_fast.masked_adamw_, (*state, [], 0, *tensors, *hyper, "triton"))


def test_more_tiles_than_a_grid_has_are_refused():
    kernels = importlib.import_module("pecker_fast.kernels.masked_adamw")
    huge = torch.empty((kernels.MAX_PROGRAMS + 1) * 1024, device="meta")
    with pytest.raises(ValueError, match="at most 2147483647 tiles"):
        kernels.masked_adamw_(
            huge, huge, None, huge, None, None, [], table_dtypes=0, of_this_step=(1.0, 1.0, 1.0), beta1=0.0, beta2=0.9,
            eps=1e-8, clip_value=1.0, ema_decay=0.0, saliency_kind="abs",
        )  # fmt: skip
