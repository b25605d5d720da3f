"""One of two processes that distil together: python distill_ranks.py RANK FOLDER (test_distill_ranks.py starts it)."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from processes import join, leave
from ranks import error_of
from test_distiller import SCHEDULE, config, unet

from pecker_fast import BlockMask, MaskedDistiller
from pecker_fast.ops import weight_grad_ways

STEPS = 3
WAYS = ("dense", "slabs")
SETTINGS = {
    "saliency": {"mask": {"kind": "saliency"}, "ema_decay": 0.5, "override": None},
    "random": {"betas": (0.5, 0.9), "warmup_steps": 2, "forget_batch_size": 3},
}


def together(settings, network=None, fake_score=None, **more):
    network = unet(dropout=0.0).double() if network is None else network
    given = {"fake_score": fake_score, "process_group": dist.group.WORLD}
    return MaskedDistiller(network, SCHEDULE, config(**SETTINGS[settings] | more), **given)


def weights(distiller):
    active = distiller.fake_score_optimizer.active
    ema = distiller.active.ema
    return {"generator": distiller.active.values.clone(), "fake_score": active.values.clone(), "ema": ema.clone()}


def trained(rank, folder, settings):
    calls = []
    original, dist.all_reduce = dist.all_reduce, lambda *a, **k: (calls.append(a[0].numel()), original(*a, **k))
    try:
        distiller = together(settings)
        for _ in range(STEPS):
            distiller.step()
    finally:
        dist.all_reduce = original
    stores = (distiller.fake_score_optimizer.active, distiller.active)
    mask, header = distiller.mask.to_tensors()
    found = {"mask": mask, "header": header, "calls": calls, "expected": [s.numel for s in stores] * STEPS}
    distiller.save(folder / settings)
    return found | weights(distiller) | {"written": sorted(p.name for p in (folder / settings).iterdir())}


def resumed(rank, folder):
    """With dropout, and another global seed on each rank."""
    torch.manual_seed(rank)
    half = together("saliency", unet())
    for _ in range(STEPS - 1):
        half.step()
    half.active.use_measured_ways({f"kind{'!' * rank}": WAYS[rank]})  # as if this rank's GPU had measured it
    half.save_checkpoint(folder / "run")
    half.step()
    weight_grad_ways._restored.clear()
    torch.manual_seed(99)
    again = together("saliency", unet())
    again.load_checkpoint("latest", folder / "run")
    again.step()
    same = all(torch.equal(value, weights(again)[name]) for name, value in weights(half).items())
    alone = MaskedDistiller(unet(), SCHEDULE, config(**SETTINGS["saliency"]))
    refused = error_of(lambda: alone.load_checkpoint("latest", folder / "run"))
    ways = again.active.measured_ways()
    return {
        "same": same,
        "refused": refused,
        "ways": ways,
        "folders": sorted(p.name for p in (folder / "run").iterdir()),
    }


def disagreements(rank, folder):
    other = unet().double()
    with torch.no_grad():
        other.conv_in.weight[0, 0, 0, 0] += rank
    masks = [BlockMask.random(unet(), 0.3, "row", seed=seed) for seed in range(2)]
    cases = {
        "true score": (together("random", other), masks[0]),
        "config or schedule": (together("random", generator_lr=1e-3 * (rank + 1)), masks[0]),
        "mask": (together("random"), masks[rank]),
        "fake score": (together("random", fake_score=other), masks[0]),
        "mass": (together("random"), dataclasses.replace(masks[0], mass=0.5 + rank / 4)),
    }
    found = {}
    for name, (distiller, mask) in cases.items():
        found[name] = error_of(lambda d=distiller, m=mask: d.use_mask(m))
        assert distiller.mask is None
    looking = together("random", mask={"kind": "saliency", "saliency": ("noise_prediction", "distillation")[rank]})
    found["saliency"] = error_of(looking.build_mask)  # the first would not wait for the updates of the second
    failing = together("saliency")
    nowhere = folder / f"result{rank}.file"
    nowhere.write_text("in the way")
    found["no batches"] = error_of(lambda: failing.build_mask([]))
    failing.build_mask()
    found["unwritable"] = error_of(lambda: failing.save(nowhere))
    return found


def main(rank: int, folder: Path) -> None:
    join(rank, folder)
    results = {settings: trained(rank, folder, settings) for settings in SETTINGS}
    results["resumed"] = resumed(rank, folder)
    results["disagreements"] = disagreements(rank, folder)
    leave(rank, folder, results)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
