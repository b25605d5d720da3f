"""The Triton weight gradient, interpreted in float32 where there is no GPU: against the dense gradient in float64."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget
from torch import nn

from pecker_fast import BlockMask, apply_mask
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import (
    accumulate_weight_grad_,
    masked_weight_grad,
    score_weight_grad_,
    tiled_weight_grad,
    triton_kernels,
    use_backend,
)
from pecker_fast.ops.problem import problem

pytestmark = pytest.mark.skipif(triton_kernels.why_not() is not None, reason=str(triton_kernels.why_not()))

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
"""Interpreted, products of bfloat16 are wrong."""
BLOCKS = ["row", (16, 16), (64, 64), (24, 40), (5, 7), (128, 128)]
CASES = {
    "3x3": ((72, 24, 3, 3), {"padding": (1, 1)}),
    "3x3 stride 2": ((33, 17, 3, 3), {"padding": (1, 1), "stride": (2, 2)}),
    "3x3 no padding": ((20, 16, 3, 3), {}),
    "1x1": ((80, 66, 1, 1), {}),
    "1x1 stride 2": ((20, 70, 1, 1), {"stride": (2, 2)}),
    "1x1 padded": ((20, 18, 1, 1), {"padding": (1, 1)}),
    "linear": ((100, 70), {}),
}

WAYS = [(0.0, 1, True), (0.1, 3, False), (0.5, 1, True), (1.0, 2, True)]
"""Density, splits, channels last."""
PAIRS = [
    (case, block, way)
    for row, case in enumerate(CASES)
    for column, block in enumerate(BLOCKS)
    for way in range(len(WAYS))
    if DEVICE == "cuda" or (row + column + way) % 2 == 0
]
"""All of them on a GPU; interpreted half, in which every two of case, block and way still meet."""


def random_mask(shape, block, density):
    grid = BlockGrid.of(shape, block)
    count = max(round(density * grid.num_blocks), int(density > 0))
    return ParameterMask(grid, torch.randperm(grid.num_blocks)[:count].sort().values)


def operands(shape, settings, dtype=DTYPE):
    if len(shape) == 2:
        sizes = (3, 7, shape[1]), (3, 7, shape[0])
    else:
        stride, padding = settings.get("stride", (1, 1)), settings.get("padding", (0, 0))
        out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip((5, 4), padding, shape[2:], stride, strict=True)]
        sizes = (2, shape[1], 5, 4), (2, shape[0], *out)
    x, grad_output = (torch.randn(size, device=DEVICE).to(dtype) for size in sizes)
    return grad_output, x


def split_in(monkeypatch, splits):
    monkeypatch.setattr(tiled_weight_grad, "choose_splits", lambda **_: splits)
    if DEVICE == "cpu":  # fewer programs, which cost most where they are interpreted
        monkeypatch.setattr(triton_kernels.load("masked_weight_grad"), "REDUCED_ROWS", 32)


def truth_and_plain(grad_output, x, mask, **settings):
    truth = masked_weight_grad(grad_output.double(), x.double(), mask, backend="reference", **settings)
    return truth, masked_weight_grad(grad_output, x, mask, backend="reference", **settings)


@pytest.mark.parametrize(("case", "block", "way"), PAIRS, ids=str)
def test_gradient(monkeypatch, case, block, way):
    density, splits, channels_last = WAYS[way]
    split_in(monkeypatch, splits)
    shape, settings = CASES[case]
    mask, (grad_output, x) = random_mask(shape, block, density), operands(shape, settings)
    settings = settings | {"channels_last": channels_last}
    got = masked_weight_grad(grad_output, x, mask, backend="triton", **settings)
    truth, plain = truth_and_plain(grad_output, x, mask, **settings)
    assert got.shape == mask.compact_shape and got.dtype == torch.float32
    layout = torch.channels_last if channels_last and got.dim() == 4 else torch.contiguous_format
    assert got.is_contiguous(memory_format=layout)
    assert_within_budget(got, truth, plain)


@pytest.mark.parametrize("case", ["3x3", "linear"])
@pytest.mark.parametrize("block", ["row", (24, 40), (128, 128)], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_accumulated_gradient(monkeypatch, case, block, splits):
    split_in(monkeypatch, splits)
    shape, settings = CASES[case]
    mask, (grad_output, x) = random_mask(shape, block, 0.5), operands(shape, settings)
    settings = settings | {"channels_last": True}
    truth, plain = truth_and_plain(grad_output, x, mask, **settings)
    start = torch.randn_like(plain)
    total = start.clone()
    assert accumulate_weight_grad_(total, grad_output, x, mask, backend="triton", **settings) is total
    assert_within_budget(total, start + truth, start + plain)


@pytest.mark.parametrize(("kind", "density", "splits"), [("abs", 0.4, 1), ("square", 1.0, 3)])
@pytest.mark.parametrize("case", ["3x3", "linear"])
@pytest.mark.parametrize("block", ["row", (24, 40), (128, 128)], ids=str)
def test_scores_of_blocks(monkeypatch, kind, density, splits, case, block):
    split_in(monkeypatch, splits)
    shape, settings = CASES[case]
    mask, (grad_output, x) = random_mask(shape, block, density), operands(shape, settings)
    start = torch.rand(mask.grid.num_blocks, device=DEVICE)
    dense = ParameterMask.full(mask.grid)
    truth = masked_weight_grad(grad_output.double(), x.double(), dense, backend="reference", **settings)
    truth = mask.grid.block_sums(truth.abs() if kind == "abs" else truth.square())
    truth = start + torch.where(mask.flags().to(DEVICE), truth, 0.0)
    sums, plain = start.clone(), start.clone()
    score_weight_grad_(sums, grad_output, x, mask, kind, backend="triton", **settings)
    score_weight_grad_(plain, grad_output, x, mask, kind, backend="reference", **settings)
    assert_within_budget(sums, truth, plain)
    inactive = ~mask.flags().to(DEVICE)
    assert torch.equal(sums[inactive], start[inactive])  # blocks that are not scored are not touched


@pytest.mark.parametrize("splits", [1, 4])
def test_every_weight_is_written_and_nothing_else(monkeypatch, splits):
    """Into a buffer full of NaN, with a margin on both sides that must stay as it is."""
    split_in(monkeypatch, splits)
    mask = random_mask((40, 24, 3, 3), (16, 16), 0.5)
    grad_output, x = operands((40, 24, 3, 3), {"padding": (1, 1)})
    buffer = torch.full((mask.numel + 128,), torch.nan, device=DEVICE)
    given = problem(grad_output, x, mask, (1, 1), (1, 1), (1, 1), 1, False)
    tiled_weight_grad._compute(given, False, buffer[64:-64], "store")
    assert buffer[:64].isnan().all() and buffer[-64:].isnan().all() and buffer[64:-64].isfinite().all()


def test_the_same_input_gives_the_same_bits(monkeypatch):
    split_in(monkeypatch, 3)
    mask, (grad_output, x) = random_mask((40, 24, 3, 3), (16, 16), 0.5), operands((40, 24, 3, 3), {"padding": (1, 1)})
    runs = [masked_weight_grad(grad_output, x, mask, padding=(1, 1), backend="triton") for _ in range(2)]
    assert torch.equal(*runs)


def test_views_and_other_memory_orders():
    shape = (40, 24, 3, 3)
    mask = random_mask(shape, (16, 16), 0.5)
    grad_output, x = operands(shape, {"padding": (1, 1)})
    expected = masked_weight_grad(grad_output, x, mask, padding=(1, 1), backend="triton")
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (grad_output, x)]
    assert torch.equal(masked_weight_grad(*last, mask, padding=(1, 1), backend="triton"), expected)
    shifted = torch.empty(x.numel() + 1, device=DEVICE, dtype=DTYPE)[1:].view(2, 5, 4, 24)  # not aligned to 16 bytes
    shifted.copy_(x.permute(0, 2, 3, 1))
    got = masked_weight_grad(grad_output, shifted.permute(0, 3, 1, 2), mask, padding=(1, 1), backend="triton")
    assert torch.equal(got, expected)


GEOMETRY = (1, 1), (0, 0), (1, 1), 1
REFUSED = {
    "float64": (torch.float64, (20, 16, 3, 3), (16, 16), {}, "bfloat16, float16 or float32"),
    "a kernel of 5x5": (torch.float32, (20, 16, 5, 5), (16, 16), {}, "kernels 1x1 and 3x3"),
    "dilation": (torch.float32, (20, 16, 3, 3), (16, 16), {"dilation": (2, 2)}, "no dilation"),
    "stride of 3": (torch.float32, (20, 16, 3, 3), (16, 16), {"stride": (3, 3)}, "stride 1 or 2"),
    "other padding": (torch.float32, (20, 16, 3, 3), (16, 16), {"padding": (1, 0)}, "padding alike"),
    "single weights": (torch.float32, (20, 16, 3, 3), "element", {}, "rows and tiles"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_kernel_does_not_take_is_refused_if_it_is_asked_for_and_the_librarys_if_not(what):
    dtype, shape, block, settings, message = REFUSED[what]
    mask = random_mask(shape, block, 0.5)
    x = torch.randn(2, shape[1], 9, 9, dtype=dtype, device=DEVICE)
    conv = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} | settings
    weight = torch.zeros(shape, dtype=dtype, device=DEVICE)
    grad_output = torch.randn_like(torch.nn.functional.conv2d(x, weight, None, **conv))
    with pytest.raises(ValueError, match=f"masked_weight_grad: backend 'triton' takes .*{message}"):
        masked_weight_grad(grad_output, x, mask, backend="triton", **conv)
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        masked_weight_grad(grad_output, x, mask, **conv)
    assert masked_weight_grad(grad_output, x, mask, **conv).shape == mask.compact_shape


@pytest.fixture
def tf32():
    """torch's permissions, as they were afterwards."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    yield backends
    for backend, name in zip(backends, before, strict=True):
        backend.fp32_precision = name


def test_tf32_that_torch_may_not_use_is_not_used(tf32):
    convolutions, products = tf32
    grad_output, x = operands((20, 16, 3, 3), {}, torch.float32)
    given = problem(grad_output, x, random_mask((20, 16, 3, 3), "row", 0.5), *GEOMETRY, False)
    assert tiled_weight_grad.why_not(given) is None
    convolutions.fp32_precision = "ieee"
    assert "torch.backends.cudnn forbids" in tiled_weight_grad.why_not(given)
    linear = problem(*operands((20, 16), {}, torch.float32), random_mask((20, 16), "row", 0.5), *GEOMETRY, False)
    assert tiled_weight_grad.precision(linear) == "tf32x3"
    products.fp32_precision = "tf32"
    assert tiled_weight_grad.precision(linear) == "tf32"


def test_totals_that_do_not_fit_are_refused_and_left_alone():
    mask, (grad_output, x) = random_mask((20, 16), "row", 0.5), operands((20, 16), {})
    good = torch.zeros(mask.compact_shape, device=DEVICE)
    for total in (good.double(), good[:-1], good.t().contiguous().t()):
        before = total.clone()
        with pytest.raises(ValueError, match="accumulate_weight_grad_: expected total"):
            accumulate_weight_grad_(total, grad_output, x, mask)
        assert torch.equal(total, before)
    sums = torch.zeros(20, device=DEVICE)
    for bad, kind in ((sums[1:], "abs"), (sums.half(), "abs"), (sums, "signed_sum")):
        with pytest.raises(ValueError, match="score_weight_grad_"):
            score_weight_grad_(bad, grad_output, x, mask, kind)
        assert not bad.any()


def test_a_compiled_model_has_no_graph_break_and_the_same_gradients(monkeypatch):
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(64 * 16, 48))
    model = model.to(DEVICE, DTYPE)
    active = apply_mask(model, BlockMask.random(model, 0.2, (16, 16), seed=1))
    assert {"0.weight", "3.weight"} <= set(active.names)
    x = torch.randn(2, 32, 4, 4, device=DEVICE, dtype=DTYPE)
    made, best = [], tiled_weight_grad.best_tiles
    monkeypatch.setattr(tiled_weight_grad, "best_tiles", lambda *a: made.append(a) or best(*a))
    grads = []
    for net in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for _ in range(2):
            with use_backend("triton"):
                active.zero_grad()
                net(x).float().square().mean().backward()
        active.bind_()
        grads.append(active.grads.clone())
    assert bool(grads[0].any())
    torch.testing.assert_close(*grads)
    assert len(made) == 2  # once a layer, compiled or not


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck(backend):
    shape = (20, 18)
    mask, (grad_output, x) = random_mask(shape, (16, 16), 0.5), operands(shape, {})
    given = problem(grad_output, x, mask, (1, 1), (0, 0), (1, 1), 1, False)
    ops = torch.ops.pecker_fast
    torch.library.opcheck(ops.masked_weight_grad, (*given.arguments(), backend))
    total = torch.zeros(mask.compact_shape, device=DEVICE)
    torch.library.opcheck(ops.accumulate_weight_grad_, (total, *given.arguments(), backend))
    sums = torch.zeros(mask.grid.num_blocks, device=DEVICE)
    torch.library.opcheck(ops.score_weight_grad_, (sums, *given.arguments(), "abs", backend))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 1e-3), (torch.float32, 2e-3)])
@pytest.mark.parametrize("shape", [(256, 192, 3, 3), (320, 128, 1, 1), (640, 320)])
@pytest.mark.parametrize("block", ["row", (64, 64), (128, 128), (32, 16)], ids=str)
def test_large_problems_on_a_gpu(dtype, tolerance, shape, block):
    """Relative to the norm of each block's gradient: what a wrong tile would not survive. TF32 is what sets 2e-3."""
    mask = random_mask(shape, block, 0.3)
    size = (4096,) if len(shape) == 2 else (8,)
    image = () if len(shape) == 2 else (32, 32)
    x, grad_output = (torch.randn(*size, c, *image, device="cuda").to(dtype) for c in (shape[1], shape[0]))
    padding = (1, 1) if shape[2:] == (3, 3) else (0, 0)
    got = masked_weight_grad(grad_output, x, mask, padding=padding, backend="triton")
    truth = masked_weight_grad(grad_output.double(), x.double(), mask, padding=padding, backend="reference")
    error = (got - truth).norm() / truth.norm()
    assert error < tolerance
    again = masked_weight_grad(grad_output, x, mask, padding=padding, backend="triton")
    assert torch.equal(got, again)


@pytest.mark.gpu
def test_float32_without_tf32_is_as_good_as_float32():
    mask = random_mask((640, 320), (64, 64), 0.3)
    x, grad_output = torch.randn(4096, 320, device="cuda"), torch.randn(4096, 640, device="cuda")
    assert torch.get_float32_matmul_precision() == "highest"
    got = masked_weight_grad(grad_output, x, mask, backend="triton")
    truth = masked_weight_grad(grad_output.double(), x.double(), mask, backend="reference")
    assert (got - truth).norm() / truth.norm() < 2e-6
