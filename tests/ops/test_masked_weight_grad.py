"""masked_weight_grad against the dense gradient in float64, on ragged shapes and every density."""

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget

from pecker_fast import native
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import masked_weight_grad, slabs
from pecker_fast.ops.slabs import shifted_rows_cpu, shifted_rows_reference

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
DENSITIES = [0.0, 0.1, 0.5, 1.0]
BLOCKS = ["row", (4, 3), (16, 16), (64, 64), "element"]
CONVS = [
    ((20, 12, 3, 3), {"padding": (1, 1)}),
    ((33, 17, 3, 3), {"stride": (2, 2), "padding": (0, 1)}),
    ((16, 9, 3, 2), {"dilation": (2, 1), "padding": (2, 0)}),
    ((70, 66, 1, 1), {}),
    ((12, 3, 3, 3), {"groups": 4, "padding": (1, 1)}),
]


def random_mask(shape, block, density):
    grid = BlockGrid.of(shape, block)
    count = round(density * grid.num_blocks)
    return ParameterMask(grid, torch.randperm(grid.num_blocks)[:count].sort().values)


def dense_gradient(forward, shape, dtype, grad_output):
    weight = torch.zeros(shape, dtype=dtype, requires_grad=True)
    return torch.autograd.grad(forward(weight), weight, grad_output)[0]


@pytest.mark.parametrize("shape, settings", CONVS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_conv2d(shape, settings, block, density, channels_last, backend):
    mask = random_mask(shape, block, density)
    x = torch.randn(3, shape[1] * settings.get("groups", 1), 9, 8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = F.conv2d(x, torch.zeros(shape), **settings)
    grad_output = torch.randn_like(y)
    plain = dense_gradient(lambda w: F.conv2d(x, w, **settings), shape, torch.float32, grad_output)
    truth = dense_gradient(lambda w: F.conv2d(x.double(), w, **settings), shape, torch.float64, grad_output.double())
    got = masked_weight_grad(grad_output, x, mask, channels_last=channels_last, backend=backend, **settings)
    assert got.shape == mask.compact_shape and got.dtype == torch.float32
    assert_within_budget(got, mask.gather(truth, channels_last), mask.gather(plain, channels_last))


@pytest.mark.parametrize("shape", [(1, 1), (130, 65), (64, 64), (7, 200)])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear(shape, block, density, dtype):
    mask = random_mask(shape, block, density)
    x, grad_output = torch.randn(2, 5, shape[1]).to(dtype), torch.randn(2, 5, shape[0]).to(dtype)
    plain = dense_gradient(lambda w: F.linear(x, w), shape, dtype, grad_output)
    truth = dense_gradient(lambda w: F.linear(x.double(), w), shape, torch.float64, grad_output.double())
    got = masked_weight_grad(grad_output, x, mask)
    assert got.shape == mask.compact_shape
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within_budget(got, mask.gather(truth), mask.gather(plain))


def test_wrong_channels_are_refused():
    mask = random_mask((8, 4), "row", 0.5)
    with pytest.raises(ValueError, match="masked_weight_grad: weight \\(8, 4\\)"):
        masked_weight_grad(torch.randn(5, 8), torch.randn(5, 3), mask)


def test_only_active_blocks_are_counted_and_computed():
    from pecker_fast.flops import count_flops

    mask = random_mask((64, 64, 3, 3), (16, 16), 0.25)
    x, grad_output = torch.randn(2, 64, 8, 8), torch.randn(2, 64, 8, 8)
    with count_flops() as counted:
        masked_weight_grad(grad_output, x, mask, padding=(1, 1))
    assert counted.total == 2 * mask.numel * (2 * 8 * 8)  # 2 a multiply-add, one for each weight and output position


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(channels_last, stride):
    mask = random_mask((8, 4, 3, 3), "row", 0.5)
    size = 5 if stride == 1 else 3
    arguments = (
        torch.randn(2, 8, size, size), torch.randn(2, 4, 5, 5), mask.active, [4, 4, 3, 3], [8, 4, 3, 3], [8, 4, 9],
        [1, 4], [stride, stride], [1, 1], [1, 1], 1, channels_last, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.pecker_fast.masked_weight_grad, arguments)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kernel, padding", [((3, 3), (1, 1)), ((1, 1), (0, 0)), ((3, 2), (0, 1)), ((5, 1), (4, 0))])
@pytest.mark.parametrize("rows", [1, 3, 13])
@pytest.mark.parametrize("threads", [1, 3])
def test_shifted_rows_are_those_of_the_reference(dtype, kernel, padding, rows, threads):
    torch.set_num_threads(threads)
    grad = torch.randn(3, 20, 40, 33).to(dtype).to(memory_format=torch.channels_last)
    picked = torch.randperm(20)[:rows].sort().values
    around = tuple(size - 1 - pad for size, pad in zip(kernel, padding, strict=True))
    got = shifted_rows_cpu(grad, picked, kernel, around)
    assert torch.equal(got, shifted_rows_reference(grad, picked, kernel, around))


@pytest.mark.parametrize("rows, samples_at_once", [(1, 1), (13, 1), (13, 2), (20, 100)])
def test_one_product_equals_slabs_however_it_is_cut(monkeypatch, rows, samples_at_once):
    """The path for few rows, whatever the measured rule says about this shape."""
    x = torch.randn(5, 7, 9, 8).to(memory_format=torch.channels_last)
    grad_output = torch.randn(5, 20, 9, 8).to(memory_format=torch.channels_last)
    mask = ParameterMask(BlockGrid.of((20, 7, 3, 3), "row"), torch.randperm(20)[:rows].sort().values)
    monkeypatch.setattr(slabs, "SHIFTS_BYTES", samples_at_once * 9 * 8 * 9 * rows * 4)
    results = []
    for pays in (True, False):
        monkeypatch.setattr(slabs, "_unfolding_pays", lambda *_, pays=pays: pays)
        results.append(masked_weight_grad(grad_output, x, mask, padding=(1, 1)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
