"""masked_adamw_ for the 859 million weights of Stable Diffusion's UNet against what people use today."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from machines import sized
from measure import Row, race, record
from stable_diffusion import few_layers, layers, on_device
from torch import nn

from pecker_fast import ActiveParameters, BlockMask, MaskedAdamW, apply_mask
from pecker_fast.ops import accumulate_saliency_, costs

TILE = sized((64, 64), (16, 16))
CASES = [(0.1, TILE), (0.25, TILE), (0.5, TILE), (1.0, "all"), (0.1, "row"), (0.5, "row")]
SETTINGS = {"lr": 1e-3, "weight_decay": 0.01}
EMA_DECAY, EMA_BYTES, SHADOW_BYTES = 0.999, 12, 6
"""Of a weight, in a pass of its own: average read and written and weight read; weight read, bfloat16 copy written."""
ROUNDS = 15


@pytest.fixture(scope="module")
def dense(machine) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    model = on_device(sized(layers, few_layers)(), machine.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    yield model


def copy_of(dense: nn.Module) -> nn.Module:
    """The same weights, and gradients that are shared where nobody changes them."""
    model = copy.deepcopy(dense)
    for parameter, original in zip(model.parameters(), dense.parameters(), strict=True):
        parameter.grad = original.grad
    return model


@pytest.fixture(scope="module")
def adamw(dense) -> Iterator[dict[str, Callable[[], object]]]:
    """Dense AdamW as torch has it: one kernel for many weights, and list operations, which are its default."""
    fused, foreach = (copy_of(dense).parameters() for _ in range(2))
    yield {
        "AdamW(fused=True)": torch.optim.AdamW(fused, fused=True, **SETTINGS).step,
        "AdamW(foreach=True)": torch.optim.AdamW(foreach, foreach=True, **SETTINGS).step,
    }


def masked(dense: nn.Module, density: float, block: object, dtype: torch.dtype = torch.float32) -> ActiveParameters:
    model = copy.deepcopy(dense).to(dtype)
    mask = BlockMask.dense(model) if block == "all" else BlockMask.random(model, density, block)
    active = apply_mask(model, mask)
    for parameter in active.parameters():
        parameter.grad = torch.randn_like(parameter)
    active.bind_()
    return active


def optimizer(active: ActiveParameters, backend: str, **settings: object) -> MaskedAdamW:
    return MaskedAdamW(active, backend=backend, **SETTINGS, **settings)


def check(active: ActiveParameters, backend: str, **settings: object) -> None:
    """Two steps are AdamW's on the active weights; dense weights hold them afterwards, the others keep every bit."""
    before, weights = active.values.clone(), {name: w.clone() for name, w in active.model.state_dict().items()}
    expected = nn.Parameter(before.clone())
    expected.grad = active.grads.clone()
    betas = settings.get("betas", (0.9, 0.999))
    adam = torch.optim.AdamW([expected], betas=betas, fused=True, **SETTINGS)
    ours = optimizer(active, backend, **settings)
    for _ in range(2):
        ours.step()
        adam.step()
    torch.testing.assert_close(active.values, expected.data, rtol=1e-5, atol=1e-6)
    active.check()
    assert not torch.equal(active.values, before)
    active.values.copy_(before)
    active.scatter_()
    assert all(torch.equal(weights[name], w) for name, w in active.model.state_dict().items())


def published_step(dense: nn.Module, active: ActiveParameters) -> Callable[[], object]:
    """What released code does in each step: multiply every gradient by an int64 mask, then a dense Adam."""
    model = copy.deepcopy(dense)
    for parameter, original in zip(model.parameters(), dense.parameters(), strict=True):
        parameter.grad = original.grad.clone(memory_format=torch.preserve_format)
    ones = torch.ones_like(active.values)
    masks = {name: active.to_dense(ones, name).long() for name in active.names}
    pairs = []
    for name, parameter in model.named_parameters():
        keep = torch.zeros_like(parameter, dtype=torch.long)  # in the weight's own memory order
        pairs.append((parameter, keep.copy_(masks[name]) if name in masks else keep))
    del masks
    adam = torch.optim.Adam(model.parameters(), lr=SETTINGS["lr"])

    def step() -> None:
        for parameter, keep in pairs:
            parameter.grad *= keep
        adam.step()

    return step


def name_of(block: object) -> str:
    return block if isinstance(block, str) else "x".join(map(str, block))


def add_row(what, against, density, seconds, ours, theirs, cost, cost_theirs, limits, headline=False):
    times = 1e3 * seconds[ours], 1e3 * seconds[theirs]
    work = f"{cost.bytes / 1e6:.0f} : {cost_theirs.bytes / 1e6:.0f} MB"
    share = limits.share(cost, seconds[ours])
    spreads = {"ours_spread": seconds[ours].spread, "theirs_spread": seconds[theirs].spread}
    record(Row(what, against, density, *times, work, share, headline, **spreads))


@pytest.mark.parametrize("density, block", CASES, ids=lambda value: str(value).replace(" ", ""))
def bench_masked_adamw(benchmark, dense, adamw, limits, runnable, density, block):
    active, backends = masked(dense, density, block), runnable("masked_adamw_")
    contestants = dict(adamw) if density == 0.1 else {"AdamW(fused=True)": adamw["AdamW(fused=True)"]}
    for backend in backends:
        check(active, backend)
        contestants[backend] = optimizer(active, backend).step
    if (density, block) == (0.1, TILE):
        contestants["mask-multiply + Adam"] = published_step(dense, active)
    seconds = race(contestants, rounds=ROUNDS)
    benchmark.pedantic(contestants[backends[0]], rounds=3)

    mask = active.mask
    cost = costs.masked_adamw(mask.numel, scatter=active.scatter_table())
    theirs = {
        "AdamW(fused=True)": costs.dense_adamw(mask.total),
        "AdamW(foreach=True)": costs.dense_adamw(mask.total, "foreach"),
        "mask-multiply + Adam": costs.published_step(mask.total),
    }
    for backend in backends:
        for name in [name for name in contestants if name not in backends]:
            what, first = f"masked AdamW, {name_of(block)}, {backend}", backend == backends[0]
            headline = first and block != "row" and "foreach" not in name
            add_row(what, name, mask.density, seconds, backend, name, cost, theirs[name], limits, headline)


def variants(dense: nn.Module) -> dict[str, tuple[dict[str, object], torch.dtype, int, Callable[[], object]]]:
    """Setting -> settings of ours, dtype of the dense weights, bytes of theirs a weight, and theirs."""
    fused = {}
    for name, betas in {"beta1=0": (0.0, 0.999), "EMA": (0.9, 0.999), "bfloat16 weights": (0.9, 0.999)}.items():
        model = copy_of(dense)
        fused[name] = model, torch.optim.AdamW(model.parameters(), betas=betas, fused=True, **SETTINGS)
    average, shadow = ([p.detach().to(dtype, copy=True) for p in dense.parameters()]
                       for dtype in (torch.float32, torch.bfloat16))  # fmt: skip

    def with_average() -> None:
        model, adam = fused["EMA"]
        adam.step()
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - EMA_DECAY)

    def with_shadow() -> None:
        model, adam = fused["bfloat16 weights"]
        adam.step()
        torch._foreach_copy_(shadow, [p.detach() for p in model.parameters()])

    return {
        "beta1=0": ({"betas": (0.0, 0.999)}, torch.float32, 0, fused["beta1=0"][1].step),
        "EMA": ({"ema_decay": EMA_DECAY}, torch.float32, EMA_BYTES, with_average),
        "bfloat16 weights": ({}, torch.bfloat16, SHADOW_BYTES, with_shadow),
    }


def bench_variants(benchmark, dense, limits, runnable):
    """One setting after the other, each against fused AdamW that does the same."""
    backends = runnable("masked_adamw_")
    for name, (settings, dtype, extra, theirs) in variants(dense).items():
        active = masked(dense, 0.1, TILE, dtype)
        contestants = {"theirs": theirs}
        for backend in backends:
            check(active, backend, **settings)
            contestants[backend] = optimizer(active, backend, **settings).step
        seconds = race(contestants, rounds=ROUNDS)
        mask, ema = active.mask, "ema_decay" in settings
        kept = {"first_moment": name != "beta1=0", "ema": ema}
        cost = costs.masked_adamw(mask.numel, scatter=active.scatter_table(), **kept)
        dense_cost = costs.dense_adamw(mask.total) + costs.Cost(extra * mask.total)
        against = "AdamW(fused=True)" + {"EMA": " + lerp", "bfloat16 weights": " + copy"}.get(name, "")
        for backend in backends:
            what = f"masked AdamW, {name}, {backend}"
            add_row(what, against, mask.density, seconds, backend, "theirs", cost, dense_cost, limits)
    benchmark.pedantic(contestants[backends[0]], rounds=3)


@pytest.mark.parametrize("density", [0.1, 0.25])
def bench_score_and_update(benchmark, dense, limits, runnable, density):
    """The saliency in the optimizer's kernel, against a kernel of its own."""
    active, backends = masked(dense, density, TILE), runnable("masked_adamw_")
    total = torch.zeros_like(active.grads)
    for backend in backends:
        one, two = optimizer(active, backend, saliency="abs"), optimizer(active, backend)

        def both(step=two.step) -> None:
            step()
            accumulate_saliency_(total, active.grads, "abs")

        seconds = race({"one": one.step, "two": both}, rounds=ROUNDS)
        (state,) = one.state.values()
        torch.testing.assert_close(state["saliency"] / state["step"], active.grads.abs(), rtol=1e-4, atol=1e-6)
        numel, table = active.mask.numel, active.scatter_table()
        cost = costs.masked_adamw(numel, saliency=True, scatter=table)
        apart = costs.masked_adamw(numel, scatter=table) + costs.accumulate_saliency(numel)
        what, against = f"score + update in one kernel, {backend}", "step, then accumulate_saliency_"
        headline = backend == backends[0]
        add_row(what, against, active.mask.density, seconds, "one", "two", cost, apart, limits, headline)
    benchmark.pedantic(one.step, rounds=3)
