"""select_threshold keeps exactly k values, the largest, ties by position, in every backend."""

import pytest
import torch

from pecker_fast import backends
from pecker_fast.ops import select_threshold

needs_native = pytest.mark.skipif(
    backends()["select_threshold"]["cpu"].used != "cpu",
    reason=f"native module: {backends()['select_threshold']['cpu'].not_used.get('cpu')}",
)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
INF, NAN = torch.inf, torch.nan


def kept(tensors, k, backend):
    threshold, ties = select_threshold(tensors, k, backend=backend)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    equal = (flat == threshold).nonzero().flatten()[: int(ties)]
    return set((flat > threshold).nonzero().flatten().tolist()) | set(equal.tolist())


def values_of(kind, sizes, dtype):
    tensors = [torch.randn(n).to(dtype) for n in sizes]
    if kind == "many ties":
        tensors = [(tensor * 2).round() for tensor in tensors]
    elif kind == "constant":
        tensors = [torch.full_like(tensor, 0.5) for tensor in tensors]
    elif kind == "infinite":
        tensors[-1][:1] = INF
    elif kind == "all magnitudes":
        tensors = [tensor * 10.0 ** torch.randint(-44, 38, tensor.shape) for tensor in tensors]
    elif kind == "half zeros":
        tensors = [tensor.abs() * (torch.rand(tensor.shape) < 0.5) for tensor in tensors]
    return tensors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1,), (1000,), (3, 1, 96), (0, 50), (70_000, 1, 230_003)])
@pytest.mark.parametrize("kind", ["normal", "many ties", "constant", "infinite", "all magnitudes", "half zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_a_stable_sort(backend, sizes, kind, dtype):
    tensors = values_of(kind, sizes, dtype)
    flat = torch.cat(tensors)
    order = flat.argsort(descending=True, stable=True)
    for k in {1, max(1, len(flat) // 3), len(flat)}:
        assert kept(tensors, k, backend) == set(order[:k].tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("repeats", [1, 30_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(backend, repeats, dtype):
    values = torch.tensor([0.0, -INF, NAN, -0.0, 1.0, -NAN, INF, -1e-45, 1e-45, -2.0], dtype=dtype)
    ranked = [INF, 1.0, 1e-45, 0.0, 0.0, -1e-45, -2.0, -INF, -INF, -INF]  # NaN as -inf
    for rank, expected in enumerate(torch.tensor(ranked, dtype=dtype).tolist()):
        k = rank * repeats + 1
        threshold, ties = select_threshold([values.repeat(repeats)], k, backend=backend)
        assert threshold.dtype == dtype and ties.dtype == torch.int64
        assert float(threshold) == expected and str(float(threshold)) != "-0.0"
        assert int(ties) == k - ranked.index(ranked[rank]) * repeats


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_kept_last(backend):
    assert kept([torch.tensor([NAN, -5.0, 1.0])], 2, backend) == {1, 2}
    assert kept([torch.tensor([NAN, -INF, 1.0])], 2, backend) == {1, 2}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 100, 840])
def test_any_layout(backend, k):
    dense = torch.randn(4, 5, 6, 7)
    expected = select_threshold([dense], k, backend="reference")
    gaps = torch.full((4, 5, 6, 14), INF)
    gaps[..., ::2] = dense
    repeated = dense[:, :1].expand(4, 5, 6, 7)
    for tensor in (dense.to(memory_format=torch.channels_last), dense.transpose(0, 3), gaps[..., ::2]):
        assert select_threshold([tensor.requires_grad_()], k, backend=backend) == expected
    want = select_threshold([repeated.contiguous()], k, backend="reference")
    assert select_threshold([repeated], k, backend=backend) == want
    negative = torch.complex(dense, -dense).conj().imag  # stored with the other sign
    assert negative.is_neg() and select_threshold([negative], k, backend=backend) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_not_changed(backend):
    values = torch.randn(1000)
    before = values.clone()
    select_threshold([values], 10, backend=backend)
    assert torch.equal(values, before)


def test_bad_arguments():
    for tensors, k in (([], 1), ([torch.ones(3)], 0), ([torch.ones(3)], 4), ([torch.ones(3).int()], 1)):
        with pytest.raises(ValueError, match="select_threshold"):
            select_threshold(tensors, k)
    with pytest.raises(ValueError, match="tensor 1"):
        select_threshold([torch.ones(3), torch.ones(3).double()], 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    torch.library.opcheck(torch.ops.pecker_fast.select_threshold, ([torch.randn(9)], 3, backend))
