"""apply_mask and remove, and a change of the mask, of the DDPM UNet at its published width: what a user waits for."""

from __future__ import annotations

import pytest
import torch
from measure import ROWS, Row, race

from pecker_fast import BlockMask, MaskedAdamW, apply_mask, change_mask
from pecker_fast.models import DDPMUNet


@pytest.mark.parametrize("block", ["row", (64, 64), "element"], ids=["row", "64x64", "element"])
def bench_apply_and_remove(benchmark, device, block):
    torch.manual_seed(0)
    model = DDPMUNet.cifar10().to(device)
    first, second = (BlockMask.random(model, 0.1, block, seed=seed) for seed in (0, 1))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def there_and_back() -> None:
        apply_mask(model, first).remove()

    there_and_back()
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    active = apply_mask(model, first)
    optimizer = MaskedAdamW(active)
    for parameter in active.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def change() -> None:
        change_mask(active, second if active.mask is first else first, optimizer)

    changing = race({"change": change}, rounds=5)["change"]
    active.remove()
    seconds = race({"copy": lambda: [w.clone() for w in before.values()], "there and back": there_and_back}, rounds=5)
    benchmark.pedantic(there_and_back, rounds=3)

    ours = seconds["there and back"]
    work = f"{first.numel:,} of {first.total:,} weights"
    share = f"a copy of the model takes {1e3 * seconds['copy']:.0f} ms"
    headline = block == "row"
    ROWS.append(Row(f"apply_mask + remove, UNet, {block}", "one second", 0.1, 1e3 * ours, 1e3, work, share, headline))
    ROWS.append(Row(f"change_mask, UNet, {block}", "one second", 0.1, 1e3 * changing, 1e3, work, share))
    benchmark.extra_info.update({"seconds": ours, "change_seconds": changing})
