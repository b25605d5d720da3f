"""select_threshold keeps exactly k values, the largest, ties by position."""

import pytest
import torch

from pecker_fast.ops import select_threshold


def kept(tensors, k):
    threshold, ties = select_threshold(tensors, k)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    equal = (flat == threshold).nonzero().flatten()[: int(ties)]
    return set((flat > threshold).nonzero().flatten().tolist()) | set(equal.tolist())


@pytest.mark.parametrize("sizes", [(1,), (1000,), (3, 1, 96), (0, 50)])
@pytest.mark.parametrize("values", ["normal", "many ties", "constant", "infinite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_a_stable_sort(sizes, values, dtype):
    tensors = [torch.randn(n).to(dtype) for n in sizes]
    if values == "many ties":
        tensors = [(tensor * 2).round() for tensor in tensors]
    elif values == "constant":
        tensors = [torch.full_like(tensor, 0.5) for tensor in tensors]
    elif values == "infinite":
        tensors[-1][:1] = torch.inf
    flat = torch.cat(tensors)
    order = flat.argsort(descending=True, stable=True)
    for k in {1, max(1, len(flat) // 3), len(flat)}:
        assert kept(tensors, k) == set(order[:k].tolist())


def test_nan_is_smallest():
    assert kept([torch.tensor([torch.nan, -5.0, 1.0])], 2) == {1, 2}


def test_bad_arguments():
    for tensors, k in (([], 1), ([torch.ones(3)], 0), ([torch.ones(3)], 4), ([torch.ones(3).int()], 1)):
        with pytest.raises(ValueError, match="select_threshold"):
            select_threshold(tensors, k)
    with pytest.raises(ValueError, match="tensor 1"):
        select_threshold([torch.ones(3), torch.ones(3).double()], 1)


def test_opcheck():
    torch.library.opcheck(torch.ops.pecker_fast.select_threshold, ([torch.randn(9)], 3, None))
