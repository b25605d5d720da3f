"""What one optimizer step costs the host, for as many tensors as a large network has: kernels are nothing here."""

from __future__ import annotations

import copy

import pytest
import torch
from machines import sized
from measure import Figure, Row, race, record
from torch import nn

from pecker_fast import BlockMask, MaskedAdamW, apply_mask

LAYERS, WIDTH, DENSITY = sized(350, 3), 64, 0.5
TENSORS = 2 * LAYERS
ROUNDS = 101


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def steps(machine):
    torch.manual_seed(0)
    with machine.device:
        model = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    dense = {
        f"AdamW({kind}=True)": torch.optim.AdamW(with_gradients(copy.deepcopy(model)).parameters(), **{kind: True}).step
        for kind in ("fused", "foreach")
    }
    active = apply_mask(model, BlockMask.random(model, DENSITY, "row"))
    for parameter in active.parameters():
        parameter.grad = torch.randn_like(parameter)
    return active, dense


def bench_host_time(benchmark, machine, runnable, steps):
    active, dense = steps
    backends = runnable("masked_adamw_")
    ours = {backend: MaskedAdamW(active, backend=backend).step for backend in backends}
    for step in ours.values():  # a step that changes nothing would be quick
        before = active.values.clone()
        step()
        assert not torch.equal(before, active.values)
    seconds = race(dense | ours, rounds=ROUNDS, clock="host")
    benchmark.pedantic(ours[backends[0]], rounds=3)
    launches = {name: machine.launches(step) for name, step in (dense | ours).items()}
    for backend in backends:
        for name in dense:
            what, times = f"host time, {TENSORS} tensors, {backend}", (1e3 * seconds[backend], 1e3 * seconds[name])
            headline = backend == backends[0]
            spreads = {"ours_spread": seconds[backend].spread, "theirs_spread": seconds[name].spread}
            record(Row(what, name, active.mask.density, *times, "-", "-", headline, **spreads))
            kernels = launches[backend], launches[name]
            record(Figure(f"one step, {TENSORS} tensors, {backend}", name, active.mask.density, *kernels, "launches"))
