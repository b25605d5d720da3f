"""One of two processes that train a masked model: python ranks.py RANK FOLDER (test_distributed.py starts it)."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from models import conv_net
from processes import WORLD_SIZE, join, leave
from torch import nn

from pecker_fast import ActiveParameters, BlockMask, MaskedAdamW, apply_mask, change_mask

STEPS = 4
MASKS = {"row": (0.3, "row"), "odd": (1001 / 13050, "element"), "tile": (0.4, (8, 8))}
SETTINGS = {
    "plain": {"weight_decay": 0.1},
    "ema": {"betas": (0.0, 0.99), "ema_decay": 0.9, "clip_value": 1e-3},
}


def masked(mask="row", seed=0):
    torch.manual_seed(0)
    model = conv_net()
    density, block = MASKS[mask]
    return model, apply_mask(model, BlockMask.random(model, density, block, seed=seed))


def half_batch(step, rank):
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(WORLD_SIZE * step + rank))


def backward(model, step, rank):
    model(half_batch(step, rank)).square().mean().backward()


def state_bytes(optimizer):
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


def together(rank, optimizer, active, model, steps=range(STEPS)):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, rank)
        active.all_reduce_()
        optimizer.step()
    active.check()
    return {"values": active.values.clone(), "bytes": state_bytes(optimizer)}


def all_reduce(rank, folder):
    model, active = masked()
    return together(rank, torch.optim.AdamW(active.parameters(), lr=0.01), active, model)


def one_all_reduce(rank, folder):
    calls = []
    original, dist.all_reduce = dist.all_reduce, lambda *a, **k: (calls.append(a[0].numel()), original(*a, **k))
    try:
        model, active = masked()
        together(rank, MaskedAdamW(active), active, model)
    finally:
        dist.all_reduce = original
    return {"calls": calls, "numel": active.numel}


def ddp(rank, folder):
    model, active = masked()
    active.check_same_mask()
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=25, gradient_as_bucket_view=True)
    optimizer = MaskedAdamW(active, lr=0.01, **SETTINGS["plain"])
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(wrapped, step, rank)
        optimizer.step()
    active.check()
    data = wrapped._get_ddp_logging_data()
    return {"values": active.values.clone(), "buckets": data["bucket_sizes"], "numel": active.numel}


def sharded(rank, folder, mask, settings):
    model, active = masked(mask)
    optimizer = MaskedAdamW(active, lr=0.01, shard_group=dist.group.WORLD, **SETTINGS[settings])
    result = together(rank, optimizer, active, model)
    if active.ema is not None:
        with active.ema_weights():
            active.check()
            result["ema"] = active.values.clone()
        result["after"] = active.values.clone()
        assert torch.equal(ActiveParameters.of(copy.deepcopy(model)).values, active.values)
    return result


def refreshed(rank, folder):
    model, active = masked("row")
    optimizer = MaskedAdamW(active, lr=0.01, shard_group=dist.group.WORLD, **SETTINGS["ema"])
    together(rank, optimizer, active, model, range(2))
    change_mask(active, BlockMask.random(model, 0.2, "row", seed=5), optimizer)
    return together(rank, optimizer, active, model, range(2, STEPS))


def resumed(rank, folder):
    model, active = masked("odd")
    optimizer = MaskedAdamW(active, lr=0.01, shard_group=dist.group.WORLD)
    together(rank, optimizer, active, model, range(2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"shard{rank}.pt")
    dist.barrier()
    own, others = (torch.load(folder / f"shard{r}.pt", weights_only=True) for r in (rank, 1 - rank))

    model, active = masked("odd")
    model.load_state_dict(own["model"])
    optimizer = MaskedAdamW(active, lr=0.5, shard_group=dist.group.WORLD)
    whole = MaskedAdamW(active)
    refused = [
        error_of(lambda: optimizer.load_state_dict(others["optimizer"])),
        error_of(lambda: whole.load_state_dict(own["optimizer"])),
    ]
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.5
    optimizer.load_state_dict(own["optimizer"])
    return together(rank, optimizer, active, model, range(2, STEPS)) | {"refused": refused}


def error_of(call):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def other_masks(rank, folder):
    """Same sizes or not: all ranks refuse, and nothing is mixed."""
    found = {}
    for name, mask, seed in (("blocks", "odd", rank), ("sizes", ("row", "odd")[rank], 0)):
        model, active = masked(mask, seed)
        backward(model, 0, rank)
        active.bind_()
        before = active.values.clone(), active.grads.clone()
        found[name] = [
            error_of(active.all_reduce_),
            error_of(lambda active=active: MaskedAdamW(active, shard_group=dist.group.WORLD)),
        ]
        assert torch.equal(before[0], active.values) and torch.equal(before[1], active.grads)
    return found


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, both):
        h = self.always(x)
        return h + self.sometimes(h) if both else h


def branches(rank, folder):
    """A weight that only rank 1 uses trains on both; one that nobody has used yet is passed over on both."""
    torch.manual_seed(0)
    model = Branches()
    active = apply_mask(model, BlockMask.random(model, 0.5, "row"))
    optimizer = torch.optim.AdamW(active.parameters(), lr=0.01)
    model(torch.ones(2, 4), both=False).sum().backward()
    active.all_reduce_()
    before = model.sometimes.weight.clone()
    optimizer.step()
    passed_over = torch.equal(model.sometimes.weight, before)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        model(x, both=rank == 1 and step < 2).square().sum().backward()
        active.all_reduce_()
        optimizer.step()
    return {"passed_over": passed_over, "values": active.values.clone()}


def main(rank: int, folder: Path) -> None:
    join(rank, folder)
    scenes = (all_reduce, one_all_reduce, ddp, resumed, refreshed, other_masks, branches)
    results = {scene.__name__: scene(rank, folder) for scene in scenes}
    for mask in MASKS:
        for settings in SETTINGS:
            results[f"sharded {mask} {settings}"] = sharded(rank, folder, mask, settings)
    leave(rank, folder, results)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
