"""One training step of the DDPM UNet at its published width: dense against masked, FLOPs and wall-clock."""

from __future__ import annotations

import copy

import pytest
import torch
from measure import ROWS, Row, race
from torch import Tensor, nn

from pecker_fast import BlockMask, MaskedAdamW, ParameterMask, apply_mask
from pecker_fast.flops import count_flops
from pecker_fast.models import DDPMUNet

BATCH = 8
DENSITY = 0.1
DECODER = ("up.", "norm_out.", "conv_out.")
FLOPS_AT_MOST = {"row": 0.72, "row, decoder": 0.61}
"""Arithmetic, not time. Forward and input gradients stay (2 of 3 parts), a tenth of the weight gradient does; with
the way down frozen also its input gradients go, and those of the skips."""


@pytest.fixture(scope="module")
def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return DDPMUNet.cifar10().to(device, memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def batch(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    return x, torch.randint(1000, (BATCH,), device=device), torch.randint(10, (BATCH,), device=device)


def random_rows(network: nn.Module, where: str) -> BlockMask:
    """Random rows of the whole network, or of the decoder only."""
    if where == "row":
        return BlockMask.random(network, DENSITY, "row")
    every_row = BlockMask.dense(network).parameters
    nothing = torch.zeros(0, dtype=torch.int64)
    frozen = {name: ParameterMask(p.grid, nothing) if name.startswith(DECODER) else p for name, p in every_row.items()}
    total = sum(parameter.numel() for parameter in network.parameters())
    return BlockMask.random(network, DENSITY, "row", exclude=[BlockMask(frozen, total, 1.0)])


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor]):
    x, t, c = batch

    def step() -> None:
        optimizer.zero_grad()
        model(x, t, c).square().mean().backward()
        optimizer.step()

    return step


def check(network: nn.Module, mask: BlockMask, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """The masked gradients are the dense ones at the active blocks."""
    x, t, c = batch
    dense, masked = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    active = apply_mask(masked, mask)
    for model in (dense, masked):
        model(x[:1], t[:1], c[:1]).square().mean().backward()
    active.bind_()
    for name in active.names:
        expected = dense.get_parameter(name).grad * mask.to_dense(name).to(x.device)
        torch.testing.assert_close(active.to_dense(active.grads, name), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("where", FLOPS_AT_MOST)
def bench_step(benchmark, network, batch, matmul_rate, where):
    mask = random_rows(network, where)
    check(network, mask, batch)
    dense, masked = copy.deepcopy(network), copy.deepcopy(network)
    steps = {
        "dense": step_of(dense, torch.optim.AdamW(dense.parameters(), lr=1e-4, fused=True), batch),
        "masked": step_of(masked, MaskedAdamW(apply_mask(masked, mask), lr=1e-4), batch),
    }
    flops = {}
    for name, step in steps.items():
        with count_flops() as counted:
            step()
        flops[name] = counted.total
    seconds = race(steps, rounds=9)
    benchmark.pedantic(steps["masked"], rounds=1)

    saved = flops["masked"] / flops["dense"]
    work = f"{flops['masked'] / 1e9:.0f} : {flops['dense'] / 1e9:.0f} GFLOP ({saved:.3f})"
    share = f"{flops['masked'] / seconds['masked'] / matmul_rate:.0%} of matmul {matmul_rate / 1e9:.0f} GFLOP/s"
    ours, theirs = 1e3 * seconds["masked"], 1e3 * seconds["dense"]
    row = Row(
        f"UNet step, {where}", f"dense, AdamW fused, batch {BATCH}", mask.density, ours, theirs, work, share, True
    )
    ROWS.append(row)
    benchmark.extra_info.update({"ratio": row.ratio, "work": work, "share": share})
    assert saved <= FLOPS_AT_MOST[where]
