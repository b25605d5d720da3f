"""accumulate_saliency_ against its definition in float64, in every backend and layout."""

import pytest
import torch
from budget import assert_within_budget

from pecker_fast import backends
from pecker_fast.blocks import BlockGrid
from pecker_fast.ops import accumulate_saliency_

needs_native = pytest.mark.skipif(
    backends()["accumulate_saliency_"]["cpu"].used != "cpu",
    reason=f"native module: {backends()['accumulate_saliency_']['cpu'].not_used.get('cpu')}",
)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (0,), (1,), (37,), (5, 7), (130, 65), (6, 10, 3, 3), (7, 70, 3, 3), (300, 700)]
BLOCKS = ["row", (4, 3), (64, 64), "element"]
DEFINITION = {"signed_sum": lambda g: g, "abs": torch.abs, "square": torch.square}


def sums_over_blocks(values, grid):
    out, in_, taps = grid.view
    row, column = torch.arange(out) // grid.block[0], torch.arange(in_) // grid.block[1]
    block_of = (row[:, None] * grid.size[1] + column)[..., None].expand(grid.view)
    return values.new_zeros(grid.num_blocks).index_add_(0, block_of.flatten(), values.flatten())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accumulate", DEFINITION)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_per_weight(backend, accumulate, shape, dtype, wide):
    grads = [torch.randn(shape).to(dtype) for _ in range(3)]
    total = torch.zeros(shape, dtype=wide)
    for grad in grads:
        assert accumulate_saliency_(total, grad, accumulate, backend=backend) is total
    truth = sum(DEFINITION[accumulate](grad.double()) for grad in grads)
    plain = sum(DEFINITION[accumulate](grad.to(wide)) for grad in grads)
    assert_within_budget(total, truth, plain)


@needs_native
@pytest.mark.parametrize("accumulate", DEFINITION)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_per_weight_the_cpu_kernel_has_the_reference_bits(accumulate, dtype, wide):
    if dtype.itemsize == 2:
        grad = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)  # every value there is
    else:
        grad = torch.randn(200_003, dtype=dtype) * 10.0 ** torch.randint(-44, 38, (200_003,))
    grad[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    start = torch.randn(grad.shape, dtype=wide)
    expected, got = (
        accumulate_saliency_(start.clone(), grad, accumulate, backend=name) for name in ("reference", "cpu")
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accumulate", DEFINITION)
@pytest.mark.parametrize(
    "shape, layout",
    [(s, torch.contiguous_format) for s in SHAPES if len(s) > 1]
    + [(s, torch.channels_last) for s in SHAPES if len(s) == 4],
)
@pytest.mark.parametrize("block", BLOCKS)
def test_per_block_is_the_sum_over_each_block(backend, accumulate, shape, layout, block):
    grid = BlockGrid.of(shape, block)
    grad = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
    start = torch.randn(grid.num_blocks, dtype=torch.float64)
    total = accumulate_saliency_(start.clone(), grad, accumulate, grid=grid, backend=backend)
    expected = start + sums_over_blocks(DEFINITION[accumulate](grad), grid)
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accumulate", DEFINITION)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_per_block_within_budget(backend, accumulate, dtype, block):
    grid = BlockGrid.of((130, 65), block)
    grads = [torch.randn(grid.shape).to(dtype) for _ in range(3)]
    total = torch.zeros(grid.num_blocks)
    for grad in grads:
        accumulate_saliency_(total, grad, accumulate, grid=grid, backend=backend)
    truth = sum(sums_over_blocks(DEFINITION[accumulate](grad.double()), grid) for grad in grads)
    plain = sum(sums_over_blocks(DEFINITION[accumulate](grad.float()), grid) for grad in grads)
    assert_within_budget(total, truth, plain)


def layouts_of(x):
    """The same values, laid out in every way that a kernel could get wrong."""
    gaps = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    gaps[..., ::2] = x
    turned = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return [x, x.to(memory_format=torch.channels_last), turned, gaps[..., ::2], torch.complex(x, -x).conj().imag]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [None, *BLOCKS])
def test_any_layout(backend, block):
    grad, start = torch.randn(6, 10, 3, 5), torch.randn(6, 10, 3, 5)
    grid = None if block is None else BlockGrid.of(tuple(grad.shape), block)
    if grid is None:
        expected = start + grad.abs()
        totals = layouts_of(start)[:-1]  # torch itself refuses to write to one stored with the other sign
    else:
        start = torch.randn(grid.num_blocks)
        expected = start + sums_over_blocks(grad.abs(), grid)
        totals = [start, start.repeat_interleave(2)[::2]]
    for total in totals:
        for laid_out in layouts_of(grad):
            got = total.clone(memory_format=torch.preserve_format)
            if not total.is_contiguous() and not total.is_contiguous(memory_format=torch.channels_last):
                got = total  # a clone would close the gaps
                got.copy_(start)
            accumulate_saliency_(got, laid_out, "abs", grid=grid, backend=backend)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_need_a_gradient_are_taken(backend):
    total = torch.zeros(5, requires_grad=True)
    accumulate_saliency_(total, torch.ones(5, requires_grad=True), backend=backend)
    assert torch.equal(total, torch.ones(5)) and total.grad_fn is None


def test_wrong_arguments_change_nothing():
    total = torch.ones(3)
    for bad in (
        lambda: accumulate_saliency_(total, torch.ones(4)),
        lambda: accumulate_saliency_(total, torch.ones(3), "cube"),
        lambda: accumulate_saliency_(total.bfloat16(), torch.ones(3)),
        lambda: accumulate_saliency_(total, torch.ones(3).long()),
        lambda: accumulate_saliency_(total, torch.ones(3, device="meta")),
        lambda: accumulate_saliency_(total, torch.ones(4), grid=BlockGrid.of((4,), "element")),
        lambda: accumulate_saliency_(total, torch.ones(4, 3), grid=BlockGrid.of((4, 3), "row")),
    ):
        with pytest.raises(ValueError, match="accumulate_saliency_"):
            bad()
    assert torch.equal(total, torch.ones(3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [None, BlockGrid.of((4, 6), "row")])
def test_opcheck(backend, grid):
    view, block, size = (None, None, (4, 6)) if grid is None else (list(grid.view), list(grid.block), (4,))
    arguments = (torch.zeros(size), torch.randn(4, 6), "abs", view, block, backend)
    torch.library.opcheck(torch.ops.pecker_fast.accumulate_saliency_, arguments)
