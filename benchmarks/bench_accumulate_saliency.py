"""accumulate_saliency_ against plain torch, and one saliency pass of the DDPM UNet against the published loop."""

from __future__ import annotations

import copy

import pytest
import torch
from measure import ROWS, Row, race
from torch import Tensor, nn

from pecker_fast import compute_saliency
from pecker_fast.blocks import BlockGrid
from pecker_fast.models import DDPMUNet
from pecker_fast.ops import accumulate_saliency_

SHAPE = (512, 512, 3, 3)
COUNT = 10
"""Ten 3x3 convolutions of 512 channels: 23.6 million weights."""
PUBLISHED = {
    "signed_sum": lambda total, grad: total.add_(grad),
    "abs": lambda total, grad: total.add_(grad.abs()),
    "square": lambda total, grad: total.add_(grad.square()),
}
ELEMENT_BYTES, PUBLISHED_BYTES = 12, {"signed_sum": 12, "abs": 20, "square": 20}
BATCH = 8
BATCHES = 2


def row_of(what: str, against: str, seconds: dict[str, float], work: str, share: str) -> Row:
    row = Row(what, against, 1.0, 1e3 * seconds["ours"], 1e3 * seconds["theirs"], work, share)
    ROWS.append(row)
    return row


@pytest.mark.parametrize("block", [None, "row", (64, 64)], ids=["element", "row", "64x64"])
@pytest.mark.parametrize("kind", PUBLISHED)
def bench_accumulate_saliency(benchmark, device, copy_bandwidth, kind, block):
    torch.manual_seed(0)
    grads = [torch.randn(SHAPE, device=device) for _ in range(COUNT)]
    grid = None if block is None else BlockGrid.of(SHAPE, block)
    size = SHAPE if grid is None else (grid.num_blocks,)
    ours, theirs = ([torch.zeros(size, device=device) for _ in grads] for _ in range(2))

    def add_ours() -> None:
        for total, grad in zip(ours, grads, strict=True):
            accumulate_saliency_(total, grad, kind, grid=grid)

    def add_theirs() -> None:
        for total, grad in zip(theirs, grads, strict=True):
            if grid is None:
                PUBLISHED[kind](total, grad)
            else:
                accumulate_saliency_(total, grad, kind, grid=grid, backend="reference")

    add_ours()
    add_theirs()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if grid is None else 1e-4, atol=0 if grid is None else 1e-2)
    seconds = race({"ours": add_ours, "theirs": add_theirs}, rounds=9)
    benchmark.pedantic(add_ours, rounds=3)

    numel = COUNT * grads[0].numel()
    moved = numel * (ELEMENT_BYTES if grid is None else 4)
    share = f"{moved / seconds['ours'] / copy_bandwidth:.0%} of copy bandwidth {copy_bandwidth / 1e9:.1f} GB/s"
    work = f"{moved / 1e6:.0f} : {numel * PUBLISHED_BYTES[kind] / 1e6:.0f} MB" if grid is None else "-"
    against = "published way" if grid is None else "reference"
    row = row_of(f"saliency {kind}, {block or 'element'}", against, seconds, work, share)
    benchmark.extra_info.update({"ratio": row.ratio, "share": share})


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return model(*batch).square().mean()


def published_pass(model: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """What released SalUn code does: every gradient of every batch goes to the CPU and is added there."""
    totals: dict[str, Tensor] = {}
    model.eval()
    for batch in batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.cpu()
                totals[name] = totals[name].add_(gradient) if name in totals else gradient.clone()
    return {name: total.abs() for name, total in totals.items()}


def bench_saliency_pass(benchmark, device, matmul_rate):
    torch.manual_seed(0)
    model = DDPMUNet.cifar10().to(device)
    other = copy.deepcopy(model)
    batches = [
        (
            torch.randn(BATCH, 3, 32, 32, device=device),
            torch.randint(1000, (BATCH,), device=device),
            torch.randint(10, (BATCH,), device=device),
        )
        for _ in range(BATCHES)
    ]
    ours, theirs = compute_saliency(model, loss_of, batches), published_pass(other, batches)
    for name, saliency in ours.items():
        torch.testing.assert_close(saliency.cpu(), theirs[name], rtol=1e-3, atol=1e-6)
    contestants = {
        "ours": lambda: compute_saliency(model, loss_of, batches),
        "theirs": lambda: published_pass(other, batches),
    }
    seconds = race(contestants, rounds=5)
    benchmark.pedantic(contestants["ours"], rounds=1)
    row = row_of("saliency pass, UNet", f"published loop, batch {BATCH}", seconds, f"{BATCHES} batches", "-")
    benchmark.extra_info.update({"ratio": row.ratio})
