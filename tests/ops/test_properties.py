"""Ten thousand random cases an op against float64: every size, ragged edges, strides, special values, all densities."""

import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pecker_fast import backends
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import accumulate_saliency_, masked_adamw_, masked_weight_grad, select_threshold, sid_loss
from pecker_fast.scatter import ScatterTable, Target

CASES = 10_000
SAMPLES = 5
SPECIAL = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, -1e-40, 3e38])
SIZES = (*range(71),) * 58 + (*range(4097),)
"""As often small as not."""
SCALES = (1e-42, 1e-20, 1.0, 1.0, 1.0, 1e15)
DENSITIES = (0.0, 0.05, 0.3, 0.5, 0.9, 1.0)
BLOCKS = ("row", "element", (4, 3), (8, 8), (64, 64), "auto")
SHARES = (*(step / 997 for step in range(998)), 1e-9, 1 - 1e-9)
BOTH = (False, True)


def checked(cases):
    """As many cases as promised, the same in every run."""
    checks = [HealthCheck.too_slow, HealthCheck.differing_executors]
    return settings(max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


def many(cases=CASES, **choices):
    """A test of a seed and one of each of these choices.

    Hypothesis draws one case of five, with its eye for edges, and takes longer over it than most of these tests; the
    other four are drawn at random.
    """

    def decorate(test):
        @checked(cases // SAMPLES)
        @given(st.integers(0, 2**31), st.fixed_dictionaries({name: st.sampled_from(c) for name, c in choices.items()}))
        def run(seed, first):
            test(seed=seed, **first)
            others = random.Random(seed)
            for nth in range(1, SAMPLES):
                test(seed=seed + nth, **{name: others.choice(values) for name, values in choices.items()})

        run.__doc__ = test.__doc__
        return run

    return decorate


HALF = CASES // 2
"""For an op that has two tests."""


@functools.cache
def fast(op: str) -> str:
    """The backend that is used here, against which the reference is the plain one."""
    return backends()[op]["cpu"].used


def draw(generator: torch.Generator, n: int, scale: float, special: bool, dtype=torch.float32) -> torch.Tensor:
    values = torch.randn(n, generator=generator) * scale
    if special and n:
        at = torch.randint(n, (min(4, n),), generator=generator)
        values[at] = SPECIAL[torch.randint(len(SPECIAL), (len(at),), generator=generator)]
    return values.to(dtype)


def assert_like_truth(got: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> None:
    """NaN and infinity where plain torch has them, and finite values within the budget.

    Where sums of plain torch overflow on the way, so that infinities of both signs meet, the truth will do as well.
    """
    got, truth, plain = got.flatten(), truth.flatten(), plain.flatten()
    odd = ~plain.isfinite()
    same = [got[odd].nan_to_num(7.0) == other[odd].to(got.dtype).nan_to_num(7.0) for other in (plain, truth)]
    assert bool((same[0] | same[1]).all())
    fine = ~odd & truth.isfinite()
    assert_within_budget(got[fine], truth[fine], plain[fine])


def random_mask(shape, block, density, generator) -> ParameterMask:
    grid = BlockGrid.of(shape, block)
    order = torch.randperm(grid.num_blocks, generator=generator)
    return ParameterMask(grid, order[: round(density * grid.num_blocks)].sort().values)


# -- masked_adamw_ ---------------------------------------------------------------------------------


@many(HALF, n=SIZES, scale=SCALES, special=BOTH, switches=range(16), step=(1, 2, 1000))
def test_masked_adamw(seed, n, scale, special, switches, step):
    generator = torch.Generator().manual_seed(seed)
    first, ema, clip, decay = (bool(switches >> bit & 1) for bit in range(4))
    start = {
        "value": draw(generator, n, 1.0, False),
        "exp_avg": draw(generator, n, scale, False) if first else None,
        "exp_avg_sq": draw(generator, n, scale, False).square(),
        "ema": draw(generator, n, 1.0, False) if ema else None,
    }
    grad = draw(generator, n, scale, special)
    hyper = {
        "step": step, "lr": 1e-2, "beta1": 0.9 if first else 0.0, "beta2": 0.99, "eps": 1e-8,
        "weight_decay": 0.1 * decay, "clip_value": 0.7 if clip else math.inf, "ema_decay": 0.9 * ema,
    }  # fmt: skip
    results = []
    for backend, dtype in ((fast("masked_adamw_"), None), ("reference", None), ("reference", torch.float64)):
        state = {name: None if b is None else b.clone().to(dtype or b.dtype) for name, b in start.items()}
        buffers = (state["value"], grad.to(dtype or grad.dtype), state["exp_avg"], state["exp_avg_sq"])
        masked_adamw_(*buffers, ema=state["ema"], backend=backend, **hyper)
        results.append(state)
    got, plain, truth = results
    for name in start:
        if start[name] is not None:
            assert_like_truth(got[name], truth[name], plain[name])


@many(
    HALF, out=range(1, 13), in_=range(1, 10), kernel=(1, 2, 3), density=DENSITIES, block=BLOCKS, kind=range(8)
)  # fmt: skip
def test_scatter_writes_the_active_weights_and_no_other_bit(seed, out, in_, kernel, density, block, kind):
    generator = torch.Generator().manual_seed(seed)
    dtype = [torch.float32, torch.bfloat16, torch.float16, torch.float64][kind % 4]
    shape = (out, in_, kernel, kernel)
    layout = torch.channels_last if kind > 3 else torch.contiguous_format
    dense = torch.randn(shape, generator=generator).to(dtype).to(memory_format=layout)
    before, mask = dense.clone(), random_mask(shape, block, density, generator)
    table = ScatterTable([Target(mask, dense, kind > 3)], torch.device("cpu"))
    values = torch.randn(mask.numel, generator=generator)
    table.scatter_(values)
    on = mask.to_dense()
    assert torch.equal(dense[~on], before[~on])
    assert torch.equal(mask.gather(dense, kind > 3).flatten(), _in_order(values, mask, kind > 3).to(dtype))


def _in_order(values: torch.Tensor, mask: ParameterMask, channels_last: bool) -> torch.Tensor:
    """A stretch in the order that ``gather`` has: rows come back in the weight's own order, not in memory's."""
    dense = torch.zeros(mask.grid.numel)
    dense[mask.index(channels_last)] = values
    return mask.gather(dense.view(mask.grid.shape), channels_last).flatten()


# -- accumulate_saliency_ --------------------------------------------------------------------------


@many(out=range(41), in_=range(1, 35), kernel=(1, 3), scale=SCALES, block=BLOCKS, kind=range(48))
def test_accumulate_saliency(seed, out, in_, kernel, scale, block, kind):
    generator = torch.Generator().manual_seed(seed)
    accumulate = ("signed_sum", "abs", "square")[kind % 3]
    dtype = (torch.float32, torch.bfloat16)[kind // 3 % 2]
    layout, blocks, special = kind // 6 % 2, kind // 12 % 2, kind // 24 % 2
    shape = (out, in_, kernel, kernel)
    grad = draw(generator, math.prod(shape), scale, bool(special), dtype).view(shape)
    if layout:
        grad = grad.to(memory_format=torch.channels_last)
    grid = BlockGrid.of(shape, block) if blocks else None
    start = torch.rand(grid.num_blocks if grid else shape, generator=generator)
    results = []
    for backend, total in ((fast("accumulate_saliency_"), start), ("reference", start), ("reference", start.double())):
        results.append(accumulate_saliency_(total.clone(), grad, accumulate, grid=grid, backend=backend))
    got, plain, truth = results
    assert_like_truth(got, truth, plain)


# -- select_threshold ------------------------------------------------------------------------------


@many(count=range(1, 5), a=SIZES, b=SIZES, c=SIZES, d=SIZES, share=SHARES, scale=SCALES, kind=range(8))
def test_select_threshold(seed, count, a, b, c, d, share, scale, kind):
    generator, sizes = torch.Generator().manual_seed(seed), (a, b, c, d)[:count]
    dtype = torch.float64 if kind & 1 else torch.float32
    tensors = [draw(generator, n, scale, bool(kind & 2), dtype) for n in sizes]
    if kind & 4:  # many ties
        tensors = [tensor.sign() * (tensor.abs() / scale).round() for tensor in tensors]
    total = sum(sizes)
    if not total:
        with pytest.raises(ValueError, match="k must be"):
            select_threshold(tensors, 1)
        return
    k = max(1, round(share * total))
    ordered = torch.cat(tensors).nan_to_num(-math.inf, math.inf, -math.inf).sort(descending=True).values
    expected = ordered[k - 1]
    for backend in {fast("select_threshold"), "reference"}:
        threshold, ties = select_threshold(tensors, k, backend=backend)
        assert torch.equal(threshold, expected) and threshold.dtype == dtype
        assert int(ties) == k - int((ordered > expected).sum())


# -- masked_weight_grad ----------------------------------------------------------------------------


@many(
    HALF, out=range(1, 21), in_=range(1, 14), batch=range(1, 6), size=range(1, 7), density=DENSITIES, block=BLOCKS,
    kind=range(128),
)  # fmt: skip
def test_masked_weight_grad_of_convolutions(seed, out, in_, batch, size, density, block, kind):
    generator = torch.Generator().manual_seed(seed)
    height, width = 1 + kind % 2 * 2, 1 + kind // 2 % 2 * 2
    geometry = {"stride": (1 + kind // 4 % 2,) * 2, "padding": (kind // 8 % 3 % height, kind // 8 % 3 % width)}
    last = bool(kind // 64)
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (out, in_, height, width)
    scale = 1e-20 if kind % 16 == 3 else 1.0
    x = (torch.randn(batch, in_, size + 2, size + 3, generator=generator) * scale).to(memory_format=layout)
    grad_shape = F.conv2d(x, torch.zeros(shape), **geometry).shape
    grad_output = torch.randn(grad_shape, generator=generator).to(memory_format=layout)
    mask = random_mask(shape, block, density, generator)
    got = masked_weight_grad(grad_output, x, mask, channels_last=last, **geometry)
    plain, truth = (conv_gradient(x.to(d), grad_output.to(d), shape, geometry) for d in (x.dtype, torch.float64))
    assert got.shape == mask.compact_shape
    assert_within_budget(got, mask.gather(truth, last), mask.gather(plain, last))


def conv_gradient(x, grad_output, shape, geometry):
    weight = torch.zeros(shape, dtype=x.dtype)
    return torch.ops.aten.convolution_backward(
        grad_output, x, weight, None, geometry["stride"], geometry["padding"], [1, 1], False, [0, 0], 1,
        [False, True, False],
    )[1]  # fmt: skip


@many(
    HALF, out=range(1, 61), in_=range(1, 61), samples=range(41), density=DENSITIES, block=BLOCKS, scale=SCALES,
    strided=BOTH,
)  # fmt: skip
def test_masked_weight_grad_of_linear_layers(seed, out, in_, samples, density, block, scale, strided):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, in_ * (1 + strided), generator=generator)[:, :: 1 + strided] * scale
    grad_output = torch.randn(samples, out, generator=generator)
    mask = random_mask((out, in_), block, density, generator)
    got = masked_weight_grad(grad_output, x, mask)
    truth, plain = grad_output.double().t() @ x.double(), grad_output.t() @ x
    assert_within_budget(got, mask.gather(truth), mask.gather(plain))


# -- sid_loss --------------------------------------------------------------------------------------


@checked(CASES // SAMPLES)
@given(st.integers(0, 2**31), st.integers(8, 300), st.floats(0.01, 100), st.floats(0.5, 2), st.sampled_from([1, 1e-9]))
def test_sid_loss(seed, features, sigma, alpha, closeness):
    """Samples do not know of one another: each is a case of its own."""
    generator, batch = torch.Generator().manual_seed(seed), SAMPLES
    epsilon, true, fake = (torch.randn(batch, features, generator=generator) for _ in range(3))
    true = epsilon + closeness * true  # at the smallest, the clamp of omega acts
    noise = torch.rand(batch, generator=generator) * sigma + 0.01
    results = []
    for dtype in (torch.float32, torch.float64):
        p, s = true.to(dtype).requires_grad_(), fake.to(dtype).requires_grad_()
        e, b = epsilon.to(dtype), noise.to(dtype)
        d, r = s - p, e - p
        omega = (b * r.abs().mean(1)).clamp(min=1e-5).detach()
        plain = b**2 * (d * (r - alpha * d)).sum(1) / omega
        ours = sid_loss(e, p, s, b, alpha)
        results.append([x.detach() for loss in (ours, plain) for x in (loss, *torch.autograd.grad(loss.sum(), (p, s)))])
    (*got, loss, p, s), (*_, true_loss, true_p, true_s) = results
    true, fake = true.detach(), fake.detach()
    terms = (noise**2 / (noise * (epsilon - true).abs().mean(1)).clamp(min=1e-5))[:, None] * (1 + alpha)
    sums = terms * ((fake - true).abs() + (epsilon - true).abs())  # what the gradients are differences of
    scales = [float((sums * (fake - true).abs()).sum(1).max()), float(sums.max()), float(sums.max())]
    for ours, truth, plain, scale in zip(got, (true_loss, true_p, true_s), (loss, p, s), scales, strict=True):
        assert_within_budget(ours, truth, plain, scale)
