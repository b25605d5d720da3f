"""masked_adamw_ for a whole model against dense fused AdamW and against the published way, mask-multiply and Adam."""

from __future__ import annotations

import copy

import pytest
import torch
from measure import ROWS, Row, race
from torch import nn

from pecker_fast import BlockMask, MaskedAdamW, apply_mask
from pecker_fast.ops import accumulate_saliency_

LAYERS = 42
CHANNELS = 512
"""42 3x3 convolutions of 512 channels: 99 million weights."""
CASES = [(0.1, "row"), (0.1, (64, 64)), (0.1, "element"), (0.25, "row"), (0.5, "row"), (0.9, "row"), (1.0, "row")]
SALIENCY_BYTES = 8  # read and written; in a pass of its own the gradient is read once more
OURS_BYTES, SCATTER_BYTES = 28, 4  # value, moments: read and written; gradient: read; dense weight: written
FUSED_BYTES, PUBLISHED_BYTES = 28, 72 + 16  # published: foreach Adam, an int64 mask and the gradient it multiplies


@pytest.fixture(scope="module")
def dense(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False) for _ in range(LAYERS))).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def masked_optimizer(dense: nn.Module, mask: BlockMask, **settings: object) -> MaskedAdamW:
    model = copy.deepcopy(dense)
    active = apply_mask(model, mask)
    for (name, parameter), original in zip(active.named_parameters(), dense.parameters(), strict=True):
        parameter.grad = mask.parameters[name].gather(original.grad).clone().view(parameter.shape)
    active.bind_()
    return MaskedAdamW(active, lr=1e-3, weight_decay=0.0, **settings)


def check(dense: nn.Module, mask: BlockMask) -> None:
    """Two steps equal Adam with masked gradients on the active weights, and leave the others alone, to the bit."""
    optimizer = masked_optimizer(dense, mask)
    expected = copy.deepcopy(dense)
    for name, parameter in expected.named_parameters():
        parameter.grad = dense.get_parameter(name).grad * mask.to_dense(name).to(parameter.device)
    adam = torch.optim.Adam(expected.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.step()
        adam.step()
    model = optimizer.active.model
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
        outside = ~mask.to_dense(name).to(parameter.device)
        assert torch.equal(model.get_parameter(name)[outside], dense.get_parameter(name)[outside])


def published_step(dense: nn.Module, mask: BlockMask) -> torch.optim.Optimizer:
    """What released code does in each step: multiply every gradient by an int64 mask, then a dense Adam."""
    model = copy.deepcopy(dense)
    for parameter, original in zip(model.parameters(), dense.parameters(), strict=True):
        parameter.grad = original.grad.clone()
    masks = [mask.to_dense(name).long().to(p.device) for name, p in model.named_parameters()]
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        for parameter, keep in zip(model.parameters(), masks, strict=True):
            parameter.grad *= keep
        adam.step()

    return step  # type: ignore[return-value]


@pytest.mark.parametrize("density, block", CASES, ids=lambda value: str(value).replace(" ", ""))
def bench_masked_adamw(benchmark, dense, copy_bandwidth, density, block):
    mask = BlockMask.random(dense, density, block)
    check(dense, mask)
    ours = masked_optimizer(dense, mask)
    fused_model = copy.deepcopy(dense)
    for parameter, original in zip(fused_model.parameters(), dense.parameters(), strict=True):
        parameter.grad = original.grad.clone()
    contestants = {
        "ours": ours.step,
        "AdamW(fused=True)": torch.optim.AdamW(fused_model.parameters(), lr=1e-3, fused=True).step,
    }
    if block == "row" and density == 0.1:
        contestants["mask-multiply + Adam"] = published_step(dense, mask)
    seconds = race(contestants)
    benchmark.pedantic(ours.step, rounds=3)

    moved = mask.numel * (OURS_BYTES + (0 if mask.density == 1 else SCATTER_BYTES))
    share = f"{moved / seconds['ours'] / copy_bandwidth:.0%} of copy bandwidth {copy_bandwidth / 1e9:.1f} GB/s"
    for name, theirs in seconds.items():
        if name == "ours":
            continue
        bytes_theirs = mask.total * (FUSED_BYTES if "fused" in name else PUBLISHED_BYTES)
        work = f"{moved / 1e6:.0f} : {bytes_theirs / 1e6:.0f} MB"
        row = Row(f"masked AdamW, {block}", name, mask.density, 1e3 * seconds["ours"], 1e3 * theirs, work, share)
        row.headline = density in (0.1, 1.0)
        ROWS.append(row)
        benchmark.extra_info[name] = {"ratio": row.ratio, "work": work, "share": share}


@pytest.mark.parametrize("density", [0.1, 1.0])
def bench_score_and_update(benchmark, dense, copy_bandwidth, density):
    mask = BlockMask.random(dense, density, "row")
    ours, theirs = masked_optimizer(dense, mask, saliency="abs"), masked_optimizer(dense, mask)
    total = torch.zeros_like(theirs.active.grads)

    def step_then_score() -> None:
        theirs.step()
        accumulate_saliency_(total, theirs.active.grads, "abs")

    ours.step()
    step_then_score()
    assert torch.equal(ours.active.values, theirs.active.values)
    (state,) = ours.state.values()
    assert torch.equal(state["saliency"], total)
    seconds = race({"ours": ours.step, "theirs": step_then_score}, rounds=9)
    benchmark.pedantic(ours.step, rounds=3)

    moved = mask.numel * (OURS_BYTES + SALIENCY_BYTES + (0 if mask.density == 1 else SCATTER_BYTES))
    share = f"{moved / seconds['ours'] / copy_bandwidth:.0%} of copy bandwidth {copy_bandwidth / 1e9:.1f} GB/s"
    work = f"{moved / 1e6:.0f} : {(moved + 4 * mask.numel) / 1e6:.0f} MB"
    times = 1e3 * seconds["ours"], 1e3 * seconds["theirs"]
    row = Row(
        "score + update in one op, row", "step, then accumulate_saliency_", mask.density, *times, work, share, True
    )
    ROWS.append(row)
    benchmark.extra_info.update({"ratio": row.ratio, "work": work, "share": share})
