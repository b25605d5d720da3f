"""Whether a delta can be applied to given weights, or reverted from them; nothing is changed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pecker_fast.delta.fingerprint import MODULUS, fingerprint_all, fingerprint_blocks
from pecker_fast.delta.ledger import Ledger, Record
from pecker_fast.delta.pack import overlaps


def check_fit(
    delta: Record, rest: int, state: Mapping[str, Tensor], ledger: Ledger, applied: bool, progress: bool
) -> None:
    """Compare fingerprints: of the blocks that the delta touches, and of the rest up to the other deltas.

    Args:
        delta: The delta.
        rest: Fingerprint of its base outside its blocks, without other deltas.
        state: The weights, of the delta's layout.
        ledger: Deltas that the weights are said to carry.
        applied: True before applying it, False before reverting it.
        progress: Whether to show a bar where it takes seconds.

    Raises:
        ValueError: The weights are not those that the delta needs, and why not.
    """
    touched = fingerprint_blocks(state, delta.mask.parameters)
    holding = list(ledger.holding(state))
    others = [record for record in holding if not record.same_as(delta)]
    _check_touched(delta, touched, carried=len(others) < len(holding), others=others, applied=applied)
    apart = [record for record in others if not overlaps(delta.mask.parameters, record.mask.parameters)]
    found = fingerprint_all(state, progress) - touched - sum(record.change for record in apart)
    if found % MODULUS != rest:
        _refuse_overlap(delta, others)
        known = ", ".join(record.label for record in apart) or "none"
        raise ValueError(
            f"the model is not the base of delta {delta.label}: weights outside its blocks differ (deltas that the "
            f"model is known to carry and that were allowed for: {known}); use the model it was made from"
        )


def _check_touched(delta: Record, touched: int, carried: bool, others: Sequence[Record], applied: bool) -> None:
    expected, opposite = (delta.before, delta.after) if applied else (delta.after, delta.before)
    changes_nothing = delta.before == delta.after
    if changes_nothing and touched == expected and carried != applied:
        return
    if touched == opposite:
        said = "is applied already; revert it first" if applied else "is not applied to this model"
        raise ValueError(f"delta {delta.label} {said}")
    if touched != expected:
        _refuse_overlap(delta, others)
        raise ValueError(
            f"the blocks that delta {delta.label} changes hold neither what they had before nor what it leaves there: "
            f"another base, or weights that were changed since"
        )


def _refuse_overlap(delta: Record, others: Sequence[Record]) -> None:
    for record in others:
        names = overlaps(delta.mask.parameters, record.mask.parameters)
        if names:
            raise ValueError(
                f"delta {delta.label} and delta {record.label}, which the model carries, change the same blocks of "
                f"{len(names)} weights (first: {names[0]}); revert {record.label} first"
            )
