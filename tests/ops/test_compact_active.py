"""compact_active lists the positions of the k largest values in order, ties by position, in every backend."""

import pytest
import torch

from pecker_fast.ops import compact_active, select_threshold

INF, NAN = torch.inf, torch.nan


def lists(tensors, k, **arguments):
    threshold, ties = select_threshold(tensors, k)
    index, offsets = compact_active(tensors, threshold, ties, k, **arguments)
    assert index.dtype == offsets.dtype == torch.int64 and len(index) == k
    return [piece.tolist() for piece in index.split(offsets.diff().tolist())]


def expected_lists(tensors, k):
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    active = torch.zeros(len(flat), dtype=torch.bool)
    active[torch.where(flat.isnan(), -INF, flat).argsort(descending=True, stable=True)[:k]] = True
    return [piece.nonzero().flatten().tolist() for piece in active.split([t.numel() for t in tensors])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1,), (1000,), (3, 1, 96), (0, 50, 0, 0, 20, 0), (70_000, 1, 3003)])
@pytest.mark.parametrize("decimals", [6, 0])
def test_against_a_stable_sort(dtype, sizes, decimals):
    tensors = [torch.randn(n, dtype=dtype).round(decimals=decimals) for n in sizes]
    total = sum(sizes)
    for k in {1, max(1, total // 3), total}:
        assert lists(tensors, k) == expected_lists(tensors, k)


def test_nan_counts_as_minus_infinity_and_minus_zero_as_zero():
    tensors = [torch.tensor([NAN, 0.0, -INF]), torch.tensor([-0.0, NAN, 2.0, INF])]
    for k in range(1, 8):
        assert lists(tensors, k) == expected_lists(tensors, k)


def test_positions_are_those_of_the_flattened_tensor_in_any_layout():
    values = torch.randn(4, 5, 6, 7)
    expected = expected_lists([values], 100)
    for tensor in (values.to(memory_format=torch.channels_last), values.transpose(0, 3).contiguous().transpose(0, 3)):
        assert lists([tensor.requires_grad_()], 100) == expected


def test_a_threshold_of_another_k():
    tensors = [torch.randn(40), torch.randn(60)]
    threshold, ties = select_threshold(tensors, 50)
    index, offsets = compact_active(tensors, threshold, ties, 50)
    short, short_offsets = compact_active(tensors, threshold, ties, 10)
    long, long_offsets = compact_active(tensors, threshold, ties, 70)
    assert torch.equal(short, index[:10]) and torch.equal(long, torch.cat([index, torch.full((20,), -1)]))
    assert torch.equal(short_offsets, offsets) and torch.equal(long_offsets, offsets)


def test_bad_arguments():
    values, threshold, ties = torch.ones(3), torch.tensor(1.0), torch.tensor(1)
    for bad in (
        lambda: compact_active([], threshold, ties, 1),
        lambda: compact_active([values], threshold, ties, 0),
        lambda: compact_active([values], threshold, ties, 4),
        lambda: compact_active([values.int()], threshold, ties, 1),
        lambda: compact_active([values, values.double()], threshold, ties, 1),
        lambda: compact_active([values], threshold.double(), ties, 1),
        lambda: compact_active([values], threshold.view(1), ties, 1),
        lambda: compact_active([values], threshold, ties.int(), 1),
        lambda: compact_active([values], threshold, ties.to("meta"), 1),
    ):
        with pytest.raises(ValueError, match="compact_active"):
            bad()


def test_opcheck():
    arguments = ([torch.randn(9), torch.randn(2, 3)], torch.tensor(0.1), torch.tensor(1), 4, None)
    torch.library.opcheck(torch.ops.pecker_fast.compact_active, arguments)
