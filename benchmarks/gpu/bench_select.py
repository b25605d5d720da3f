"""Saliency, thresholds and the generator's loss: what streams through memory once, against what torch offers."""

from __future__ import annotations

import functools

import pytest
import torch
from machines import sized
from measure import Row, race, record
from torch import Tensor
from weight_grads import Layer, conv, linear

from pecker_fast import ops
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import costs

VALUES = sized(100_000_000, 10_000)
KINDS = {
    "abs(normal)": lambda device: torch.randn(VALUES, device=device).abs_(),
    "half zeros": lambda device: torch.randn(VALUES, device=device).abs_() * torch.randint(2, (VALUES,), device=device),
}
WEIGHT, COUNT = sized((512, 512, 3, 3), (24, 20, 3, 3)), sized(42, 2)
TILE = sized((64, 64), (16, 16))
BATCHES = sized([(128, 3, 32, 32), (8, 4, 64, 64), (16, 3, 256, 256)], [(2, 3, 4, 4)])
SCORED = sized([conv(512, 4, 64), linear(1280, 16384)], [conv(20, 1, 4, out=24)])
CALLS = sized(20, 1)
ALPHA, FUSED_ELEMENTS = 1.2, 16384


def add_row(what, against, share_of_all, seconds, ours, theirs, cost, limits, headline=False, work=None):
    times = 1e3 * seconds[ours], 1e3 * seconds[theirs]
    spreads = {"ours_spread": seconds[ours].spread, "theirs_spread": seconds[theirs].spread}
    work = work or f"{cost.bytes / 1e6:.1f} MB : -"
    record(Row(what, against, share_of_all, *times, work, limits.share(cost, seconds[ours]), headline, **spreads))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.1, 0.5])
def bench_select_threshold(benchmark, machine, limits, runnable, kind, share):
    values = KINDS[kind](machine.device)
    k = round(share * VALUES)
    contestants = {
        "torch.topk": lambda: values.topk(k, sorted=False).values.min(),
        "torch.sort": lambda: values.sort(descending=True).values[k - 1],
    }
    if (share, kind) == (0.1, "abs(normal)"):  # most of a second a call
        contestants["torch.kthvalue"] = lambda: values.kthvalue(VALUES - k + 1).values
    others = list(contestants)
    backends = [name for name in runnable("select_threshold") if name != "triton"]
    truth = contestants["torch.sort"]()
    for name, contestant in contestants.items():
        assert torch.equal(contestant(), truth), name
    for backend in backends:
        contestants[backend] = functools.partial(ops.select_threshold, [values], k, backend=backend)
        threshold, ties = contestants[backend]()
        assert torch.equal(threshold, truth) and int((values > threshold).sum()) + int(ties) == k
    if not backends:
        pytest.skip("select_threshold has no fast backend here")
    seconds = race(contestants)
    benchmark.pedantic(contestants[backends[0]], rounds=1)
    for backend in backends:
        cost = costs.select_threshold(VALUES, backend=machine.native)
        for name in others:
            what, headline = f"threshold of {VALUES / 1e6:.0f}M, {kind}, {backend}", kind == "abs(normal)"
            add_row(what, name, share, seconds, backend, name, cost, limits, headline)


@pytest.mark.parametrize("share", [0.1])
def bench_compact_active(benchmark, machine, limits, runnable, share):
    backends = [name for name in runnable("compact_active") if name != "triton"]
    if not backends:
        pytest.skip("compact_active has no fast backend here")
    values, k = KINDS["abs(normal)"](machine.device), round(share * VALUES)
    threshold, ties = ops.select_threshold([values], k)
    contestants = {"nonzero": lambda: (values >= threshold).nonzero().flatten()}  # right where there are no ties
    for backend in backends:
        contestants[backend] = functools.partial(ops.compact_active, [values], threshold, ties, k, backend=backend)
        index, offsets = contestants[backend]()
        assert len(index) == int(offsets[-1]) == k and bool((values[index] >= threshold).all())
        assert bool((index[1:] > index[:-1]).all())
    seconds = race(contestants)
    benchmark.pedantic(contestants[backends[0]], rounds=1)
    for backend in backends:
        what, cost = f"positions of {VALUES / 1e6:.0f}M, {backend}", costs.compact_active(VALUES, k)
        add_row(what, "torch.nonzero", share, seconds, backend, "nonzero", cost, limits)


@pytest.mark.parametrize("block", [None, TILE, "row"], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def bench_accumulate_saliency(benchmark, machine, limits, runnable, block, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grads = [torch.randn(WEIGHT, device=machine.device).to(memory_format=layout) for _ in range(COUNT)]
    grid = None if block is None else BlockGrid.of(WEIGHT, block)
    zeros = functools.partial(torch.zeros_like, grads[0]) if grid is None else (
        lambda: torch.zeros(grid.num_blocks, device=machine.device))  # fmt: skip
    backends = runnable("accumulate_saliency_")

    def all_by(backend: str) -> tuple[list[Tensor], object]:
        totals = [zeros() for _ in grads]

        def add() -> None:
            for total, grad in zip(totals, grads, strict=True):
                ops.accumulate_saliency_(total, grad, "abs", grid=grid, backend=backend)

        return totals, add

    expected, theirs = all_by("reference")
    theirs()
    contestants = {"theirs": machine.burst([theirs])}
    for backend in backends:
        totals, ours = all_by(backend)
        ours()
        for got, want in zip(totals, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6 if grid is None else 1e-4, atol=1e-6)
        contestants[backend] = machine.burst([ours])
    seconds = race(contestants, rounds=11)
    benchmark.pedantic(contestants["theirs"], rounds=1)
    numel = COUNT * grads[0].numel()
    cost = costs.accumulate_saliency(numel, blocks=None if grid is None else COUNT * grid.num_blocks)
    for backend in backends:
        name = "element" if block is None else block if isinstance(block, str) else "x".join(map(str, block))
        what = f"saliency abs, {name}, {'channels-last' if channels_last else 'contiguous'}, {backend}"
        against = "total.add_(grad.abs())" if grid is None else "the same in plain torch"
        add_row(what, against, 1.0, seconds, backend, "theirs", cost, limits, headline=block == TILE and channels_last)


def published_loss(epsilon: Tensor, true: Tensor, fake: Tensor, sigma: Tensor) -> Tensor:
    """The loss as it is published, in x0 = x_t - sigma * eps (up to a scale that cancels), by autograd."""
    shape = (-1, *[1] * (epsilon.dim() - 1))
    x0, x0_true, x0_fake = (-sigma.view(shape) * eps for eps in (epsilon, true, fake))
    omega = (x0_true - x0).abs().flatten(1).mean(1).clamp(min=1e-5).detach()
    d = x0_true - x0_fake
    return (d * ((x0_true - x0) - ALPHA * d)).flatten(1).sum(1) / omega


@pytest.mark.parametrize("shape", BATCHES, ids=str)
def bench_sid_loss(benchmark, machine, limits, runnable, shape):
    """Loss and both gradients; inputs are where the networks have just left them, in the cache if they fit."""
    epsilon, true, fake = (torch.randn(shape, device=machine.device) for _ in range(3))
    sigma = torch.rand(shape[0], device=machine.device) + 0.5
    inputs = true.requires_grad_(), fake.requires_grad_()

    def run(loss) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(epsilon, *inputs, sigma).sum(), inputs)

    ways = {"autograd of the published form": functools.partial(run, published_loss)}
    backends = runnable("sid_loss")
    for name in ("reference", *(backend for backend in backends if backend != "reference")):
        if name == "reference" or name == "triton":
            ways[name] = functools.partial(run, functools.partial(ops.sid_loss, alpha=ALPHA, backend=name))
    expected = ways["autograd of the published form"]()
    for way in ways.values():
        for got, want in zip(way(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    seconds = race({name: machine.burst([way] * CALLS) for name, way in ways.items()}, rounds=11)
    benchmark.pedantic(ways["reference"], rounds=1)
    numel = expected[0][0].numel()
    cost = costs.sid_loss(shape[0], numel, reads=1 if numel <= FUSED_ELEMENTS else 2)
    ours = "triton" if "triton" in ways else "reference"
    for name in ways:
        if name != ours:
            what, size = f"SiD loss and gradients, {ours}", "x".join(map(str, shape))
            add_row(f"{what}, {size}", name, 1.0, seconds, ours, name, cost, limits, headline=shape == BATCHES[0])


@pytest.mark.parametrize("layer", SCORED, ids=str)
def bench_score_weight_grad(benchmark, machine, limits, layer: Layer):
    """Saliency of every block from the registers of the weight gradient, against a gradient that is written."""
    mask = ParameterMask.full(BlockGrid.of(layer.shape, TILE))
    sets = layer.sets()
    settings = {} if layer.is_linear else {"padding": [layer.padding] * 2, "stride": [layer.stride] * 2}
    sums = torch.zeros(mask.grid.num_blocks, device=machine.device)

    def ours(operands) -> None:
        ops.score_weight_grad_(sums, *operands, mask, "abs", backend="triton", **settings)

    def theirs(dense) -> None:
        ops.accumulate_saliency_(sums, dense(), "abs", grid=mask.grid)

    dense = [layer.dense(*operands) for operands in sets]
    ours(sets[0])
    got = sums.clone()
    theirs(dense[0])
    torch.testing.assert_close(got, sums - got, rtol=1e-2, atol=1e-2)
    bursts = {
        "ours": machine.burst([functools.partial(ours, operands) for operands in sets]),
        "theirs": machine.burst([functools.partial(theirs, one) for one in dense]),
    }
    seconds = race(bursts, rounds=11)
    benchmark.pedantic(bursts["ours"], rounds=1)
    problem = layer.problem(sets[0], mask)
    flops = costs.masked_weight_grad(problem).flops
    cost = costs.Cost(sum(operand.nbytes for operand in sets[0]), flops)
    against = f"{layer.library} dense + accumulate_saliency_"
    work = f"{flops / 1e9:.2f} GFLOP both"
    add_row(f"scores of all blocks, {layer}", against, 1.0, seconds, "ours", "theirs", cost, limits, True, work)
