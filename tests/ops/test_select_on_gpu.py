"""What only a GPU shows of select_threshold, compact_active and the selection of masks."""

from contextlib import contextmanager

import pytest
import torch

from pecker_fast import BlockMask
from pecker_fast.ops import compact_active, select_threshold

pytestmark = pytest.mark.gpu
INF, NAN = torch.inf, torch.nan


@contextmanager
def no_host_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def both(tensors, k):
    threshold, ties = select_threshold(tensors, k, backend="cuda")
    return threshold, ties, *compact_active(tensors, threshold, ties, k, backend="cuda")


def check(tensors, k):
    """Both ops against torch.sort, on the GPU."""
    threshold, ties, index, offsets = both(tensors, k)
    assert all(x.device.type == "cuda" for x in (threshold, ties, index, offsets))
    flat = torch.cat([t.reshape(-1) for t in tensors])
    flat = torch.where(flat.isnan(), -INF, flat)
    expected = flat.sort(descending=True).values[k - 1] + 0.0
    above, equal = flat > expected, (flat == expected).nonzero().flatten()
    assert threshold == expected and int(ties) == k - int(above.sum())
    above[equal[: int(ties)]] = True
    starts = torch.tensor([0, *(t.numel() for t in tensors)]).cumsum(0).tolist()
    got = [piece + start for piece, start in zip(index.split(offsets.diff().tolist()), starts, strict=False)]
    assert torch.equal(torch.cat(got), above.nonzero().flatten())


def values_of(kind, numel, dtype):
    values = torch.randn(numel, dtype=dtype, device="cuda")
    if kind == "zeros":
        return torch.zeros_like(values)
    if kind == "half zeros":
        return values.abs() * (torch.rand(numel, device="cuda") < 0.5)
    if kind == "few values":
        return (values * 2).round()
    if kind == "special":
        values[::3], values[1::7], values[2::11], values[3::13], values[4::17] = 0.0, -0.0, NAN, INF, -INF
    if kind == "skewed":
        return values.exp().pow(8)
    return values


@pytest.mark.parametrize("kind", ["normal", "zeros", "half zeros", "few values", "special", "skewed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [1, 100, 8193, 3_000_001])
def test_against_a_sort(kind, dtype, numel):
    values = values_of(kind, numel, dtype)
    for k in {1, max(1, numel // 10), max(1, numel // 2), numel}:
        check([values], k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_ragged_tensors_and_slices_that_begin_anywhere(dtype):
    sizes = torch.randint(0, 20_000, (700,)).tolist()
    check([torch.randn(n, dtype=dtype, device="cuda") for n in sizes], sum(sizes) // 7)
    whole = torch.full((100_000,), INF, dtype=dtype, device="cuda")
    for begin in range(5):
        values = whole[begin : begin + 50_000 + begin]
        values.normal_()
        check([values], 20_000)
        values.fill_(INF)


def test_layouts():
    values = torch.randn(64, 32, 3, 3, device="cuda")
    k = 5000
    expected = both([values], k)
    for tensor in (values.to(memory_format=torch.channels_last), values.transpose(0, 1).contiguous().transpose(0, 1)):
        assert all(torch.equal(a, b) for a, b in zip(both([tensor], k), expected, strict=True))


def test_ten_runs_give_the_same_bits():
    tensors = [values_of("few values", n, torch.float32) for n in (1_000_003, 5, 2_000_000)]
    first = both(tensors, 1_234_567)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(both(tensors, 1_234_567), first, strict=True))


def test_no_host_sync():
    tensors = [torch.randn(n, device="cuda") for n in (100_000, 7, 50_001)]
    expected = both(tensors, 1000)
    with no_host_sync():
        got = both(tensors, 1000)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_cuda_graph_replays_with_new_values():
    tensors = [torch.randn(n, device="cuda") for n in (100_000, 7, 50_001)]
    both(tensors, 1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(tensors, 1000)
    for _ in range(3):
        for tensor in tensors:
            tensor.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, both(tensors, 1000), strict=True))


def test_on_another_stream():
    values = torch.randn(1_000_000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        values.neg_()
        got = both([values], 1000)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, both([values], 1000), strict=True))


def test_more_than_two_to_the_31_values_in_one_tensor():
    numel = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 5 * numel:
        pytest.skip("needs 11 GB of GPU memory")
    values = torch.zeros(numel, device="cuda")
    planted = torch.tensor([3, 2**31 - 1, 2**31, numel - 1], device="cuda")
    values[planted] = torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda")
    threshold, ties, index, offsets = both([values], 3)
    assert float(threshold) == 2.0 and int(ties) == 1 and offsets.tolist() == [0, 3]
    assert index.tolist() == planted[1:].tolist()
    threshold, ties = select_threshold([values], 2**31, backend="cuda")
    assert float(threshold) == 0.0 and int(ties) == 2**31 - 4


def test_bad_input():
    values = torch.ones(3, device="cuda")
    for bad in (
        lambda: select_threshold([values, torch.ones(3)], 1),
        lambda: select_threshold([values.half()], 1),
        lambda: select_threshold([values], 0),
        lambda: select_threshold([values], 4),
        lambda: compact_active([values], torch.tensor(1.0), torch.tensor(1), 1),
    ):
        with pytest.raises(ValueError):
            bad()


@pytest.mark.parametrize("block", ["element", "row", (64, 64), "auto"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_mask_selected_on_the_gpu_is_that_of_the_cpu(block, scope, layout):
    shapes = {"a.weight": (130, 70, 3, 3), "a.bias": (130,), "b.weight": (200, 150), "c.weight": (1, 1)}
    # Small integers, whose sums over blocks are exact in any order, with many ties.
    cpu = {name: torch.randint(0, 5, shape).float() for name, shape in shapes.items()}
    cpu["a.weight"] = cpu["a.weight"].to(memory_format=layout)
    gpu = {name: value.cuda() for name, value in cpu.items()}
    for exclude in ((), (BlockMask.from_saliency(cpu, 0.05, block),)):
        expected = BlockMask.from_saliency(cpu, 0.1, block, scope, exclude=exclude)
        assert BlockMask.from_saliency(gpu, 0.1, block, scope, exclude=exclude).parameters == expected.parameters
