"""A distiller's ``state_dict``: all that its next step depends on, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pecker_fast import distill_parts
from pecker_fast.apply import check_shared_weights
from pecker_fast.mask import BlockMask
from pecker_fast.ops.weight_grad_ways import restore_choices


class Distiller(distill_parts.Distiller, Protocol):
    """What is asked of a ``MaskedDistiller``."""

    fake_score_mask: BlockMask


def state_of(distiller: Distiller) -> dict[str, Any]:
    """See ``MaskedDistiller.state_dict``."""
    if distiller.mask is None:
        raise RuntimeError("no state yet: call build_mask() first")
    (mask, header), (fake_mask, fake_header) = (m.to_tensors() for m in (distiller.mask, distiller.fake_score_mask))
    return {
        "steps_done": distiller.steps_done,
        "mask": mask,
        "mask_header": header,
        "fake_score_mask": fake_mask,
        "fake_score_mask_header": fake_header,
        "generator": distiller.generator.state_dict(),
        "fake_score": distiller.fake_score.state_dict(),
        "generator_optimizer": distiller.generator_optimizer.state_dict(),
        "fake_score_optimizer": distiller.fake_score_optimizer.state_dict(),
        "rng": distiller.draws.rng.get_state(),
        "ways": distill_parts.measured_ways(distiller),
    }


def load_state(distiller: Distiller, state: Mapping[str, Any]) -> None:
    """See ``MaskedDistiller.load_state_dict``."""
    mask, fake_score_mask = (
        BlockMask.from_tensors(state[name], state[f"{name}_header"]) for name in ("mask", "fake_score_mask")
    )
    if distiller.mask is None:
        distiller.use_mask(mask, fake_score_mask)
    elif distiller.mask != mask or distiller.fake_score_mask != fake_score_mask:
        raise ValueError("the state was saved with another mask; load it into a new MaskedDistiller")
    if distiller.config.share_frozen_weights:
        check_shared_weights(distiller.generator, mask, state["generator"])
        check_shared_weights(distiller.fake_score, fake_score_mask, state["fake_score"])
    restore_choices(state.get("ways", {}))  # none in older states
    distiller.generator.load_state_dict(state["generator"])
    distiller.fake_score.load_state_dict(state["fake_score"])
    distiller.generator_optimizer.load_state_dict(state["generator_optimizer"])
    distiller.fake_score_optimizer.load_state_dict(state["fake_score_optimizer"])
    distiller.draws.rng.set_state(state["rng"])
    distiller.steps_done = state["steps_done"]
