"""The Triton kernels of accumulate_saliency_, interpreted where there is no GPU."""

from functools import partial

import pytest
import torch
from budget import assert_within_budget

from pecker_fast.blocks import BlockGrid
from pecker_fast.ops import accumulate_saliency_

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEFINITION = {"signed_sum": lambda g: g, "abs": torch.abs, "square": torch.square}
accumulate_ = partial(accumulate_saliency_, backend="triton")


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def sums_over_blocks(values, grid):
    out, in_, taps = grid.view
    row, column = torch.arange(out) // grid.block[0], torch.arange(in_) // grid.block[1]
    block_of = (row[:, None] * grid.size[1] + column)[..., None].expand(grid.view)
    return values.new_zeros(grid.num_blocks).index_add_(0, block_of.flatten().to(DEVICE), values.flatten())


def layouts_of(x):
    """The same values, laid out in every way that a kernel could get wrong."""
    gaps = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype, device=x.device)
    gaps[..., ::2] = x
    turned = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return [x, x.to(memory_format=torch.channels_last), turned, gaps[..., ::2]]


@pytest.mark.parametrize("accumulate", DEFINITION)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [0, 1, 16, 1023, 1024, 1025, 3072, 5000])
def test_per_weight_has_the_bits_of_the_reference(accumulate, dtype, wide, numel):
    grad, start = randn(numel, dtype=dtype) * 1e3, randn(numel, dtype=wide)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-30])[:numel]
    grad[: len(special)] = special.to(grad)
    expected = accumulate_saliency_(start.clone(), grad, accumulate, backend="reference")
    got = accumulate_(start.clone(), grad, accumulate)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_per_weight_writes_nothing_beyond_its_end():
    buffer = torch.zeros(3000, device=DEVICE)
    accumulate_(buffer[:1500], randn(1500), "abs")
    assert buffer[:1500].all() and not buffer[1500:].any()


@pytest.mark.parametrize("block", ["row", (4, 3), (64, 64), (3, 200), "element"])
@pytest.mark.parametrize(
    "shape, layout",
    [(shape, torch.contiguous_format) for shape in [(5, 7), (6, 10, 3, 3), (2, 2100), (1, 1), (0, 4), (33,)]]
    + [((6, 10, 3, 3), torch.channels_last), ((5, 7, 1, 1), torch.channels_last)],
)
def test_blocks_are_summed_to_their_edges(shape, layout, block):
    if shape == (2, 2100) and block == (4, 3):
        shape = (2, 70)  # 700 programs take the interpreter seconds
    grid = BlockGrid.of(shape, block)
    grad = randn(*shape, dtype=torch.float64).to(memory_format=layout)
    start = randn(grid.num_blocks, dtype=torch.float64)
    for accumulate, definition in DEFINITION.items():
        total = accumulate_(start.clone(), grad, accumulate, grid=grid)
        torch.testing.assert_close(total, start + sums_over_blocks(definition(grad), grid), rtol=1e-13, atol=1e-10)


@pytest.mark.parametrize("accumulate", DEFINITION)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, block", [((5, 300), "row"), ((66, 65), (64, 64)), ((7, 8), (4, 3))])
def test_blocks_within_budget(accumulate, dtype, shape, block):
    grid = BlockGrid.of(shape, block)
    grads = [randn(*grid.shape, dtype=dtype) for _ in range(3)]
    total = torch.zeros(grid.num_blocks, device=DEVICE)
    for grad in grads:
        accumulate_(total, grad, accumulate, grid=grid)
    truth = sum(sums_over_blocks(DEFINITION[accumulate](grad.double()), grid) for grad in grads)
    plain = sum(sums_over_blocks(DEFINITION[accumulate](grad.float()), grid) for grad in grads)
    scale = float(sum(sums_over_blocks(DEFINITION[accumulate](grad.double()).abs(), grid) for grad in grads).max())
    assert_within_budget(total, truth, plain, scale)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_block(bad):
    grad = torch.ones(6, 40, device=DEVICE)
    grad[2, 30] = bad
    total = accumulate_(torch.zeros(6, device=DEVICE), grad, "abs", grid=BlockGrid.of((6, 40), "row"))
    assert total.isfinite().tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("block", [None, "row", (4, 3), "element"])
def test_any_layout(block):
    grad, start = randn(6, 10, 3, 5), randn(6, 10, 3, 5)
    grid = None if block is None else BlockGrid.of(tuple(grad.shape), block)
    if grid is None:
        expected, totals = start + grad.abs(), layouts_of(start)
    else:
        start = randn(grid.num_blocks)
        expected, totals = start + sums_over_blocks(grad.abs(), grid), [start, start.repeat_interleave(2)[::2]]
    before = start.clone()
    for total in totals:
        for laid_out in layouts_of(grad):
            total.copy_(before)
            accumulate_(total, laid_out, "abs", grid=grid)
            torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [None, "row", (64, 64)])
def test_on_a_gpu_it_is_preferred_repeatable_and_never_waits(block):
    grad = randn(1280, 640, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    grid = None if block is None else BlockGrid.of(tuple(grad.shape), block)
    total = torch.zeros(grad.shape if grid is None else (grid.num_blocks,), device="cuda")
    total = total.to(memory_format=torch.channels_last) if grid is None else total
    expected = accumulate_saliency_(total.clone(), grad, "square", grid=grid, backend="reference")
    first = accumulate_(total.clone(), grad, "square", grid=grid)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [accumulate_saliency_(total.clone(), grad, "square", grid=grid) for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(result, first) for result in results)


@pytest.mark.gpu
def test_more_than_two_to_the_31_weights():
    numel = 2**31 + 1024 + 3
    if torch.cuda.mem_get_info()[0] < 9 * numel:
        pytest.skip("needs 19 GB of GPU memory")
    grad, total = torch.ones(numel, dtype=torch.bfloat16, device="cuda"), torch.zeros(numel, device="cuda")
    grad[-1] = -3.0
    accumulate_(total, grad, "abs")
    assert float(total[:-1].min()) == float(total[:-1].max()) == 1.0 and float(total[-1]) == 3.0
