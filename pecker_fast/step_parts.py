"""The stretches of a flat buffer whose parameters have had equally many steps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from pecker_fast.layout import Entry


@dataclass(frozen=True)
class StepPart:
    """A stretch that one call of the optimizer's op updates.

    Attributes:
        there: Where it lies in the buffer.
        here: Where it lies in the state, of which a shard has a part.
        missed: Steps that its parameters did not take so far.
        skipped: Whether this step is one of them.
    """

    there: slice
    here: slice
    missed: int = 0
    skipped: bool = False

    def within(self, there: slice, here: slice) -> StepPart | None:
        """What lies in one stretch of a shard (in the buffer, in the shard), or None."""
        start, stop = max(self.there.start, there.start), min(self.there.stop, there.stop)
        moved = here.start - there.start
        return (
            replace(self, there=slice(start, stop), here=slice(start + moved, stop + moved)) if start < stop else None
        )


def step_parts(entries: Iterable[Entry], missed: Mapping[str, int], skipped: Collection[str]) -> list[StepPart]:
    """Neighbours with equal counts together, in the buffer's order.

    Args:
        entries: How the buffer is laid out.
        missed: Steps that parameters did not take, by the name of their dense weight; this one included.
        skipped: Those without a gradient in this step.
    """
    parts: list[StepPart] = []
    for entry in entries:
        end = entry.offset + entry.mask.numel
        kind = missed.get(entry.name, 0), entry.name in skipped
        begin = entry.offset
        if parts and (parts[-1].missed, parts[-1].skipped) == kind:
            begin = parts.pop().there.start
        parts.append(StepPart(slice(begin, end), slice(begin, end), *kind))
    return parts
