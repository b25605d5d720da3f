"""A baseline's ``state_dict``: all that its next step depends on, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pecker_fast.apply import check_shared_weights
from pecker_fast.mask import BlockMask
from pecker_fast.ops.weight_grad_ways import restore_choices

if TYPE_CHECKING:
    from pecker_fast.baselines.trainer import Baseline


def state_of(baseline: Baseline) -> dict[str, Any]:
    """See ``Baseline.state_dict``; what ``prepare`` computes follows from the original and the seed."""
    if baseline.mask is None:
        raise RuntimeError("no state yet: call build_mask() first")
    mask, header = baseline.mask.to_tensors()
    return {
        "config": baseline.config.to_dict(),
        "steps_done": baseline.steps_done,
        "mask": mask,
        "mask_header": header,
        "network": baseline.network.state_dict(),
        "optimizer": baseline.optimizer.state_dict(),
        "rng": baseline.draws.rng.get_state(),
        "ways": baseline.active.measured_ways(),
    }


def load_state(baseline: Baseline, saved: Mapping[str, Any]) -> None:
    """See ``Baseline.load_state_dict``."""
    own = baseline.config.to_dict()
    if different := [name for name, value in own.items() if saved["config"].get(name) != value]:
        raise ValueError(f"the state was saved with another {different[0]}: {saved['config'].get(different[0])!r}")
    mask = BlockMask.from_tensors(saved["mask"], saved["mask_header"])
    if baseline.mask is None:
        baseline.use_mask(mask)
    elif baseline.mask != mask:
        raise ValueError("the state was saved with another mask; load it into a new Baseline")
    baseline.prepare()  # Selective Amnesia remembers where the weights began, not where they are now
    if baseline.config.share_frozen_weights:
        check_shared_weights(baseline.network, mask, saved["network"])
    restore_choices(saved.get("ways", {}))  # none in older states
    baseline.network.load_state_dict(saved["network"])
    baseline.optimizer.load_state_dict(saved["optimizer"])
    baseline.draws.rng.set_state(saved["rng"])
    baseline.steps_done = saved["steps_done"]
