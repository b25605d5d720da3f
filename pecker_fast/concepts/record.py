"""What an erasure leaves behind for those that come later: its prompts, and which delta they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pecker_fast.checkpoint import read_json, write_json
from pecker_fast.concepts.plan import PromptPlan
from pecker_fast.concepts.prompts import check_without
from pecker_fast.concepts.request import Erasure
from pecker_fast.delta import Delta, Ledger
from pecker_fast.errors import FileFormatError
from pecker_fast.foreign_weights import check_finite
from pecker_fast.prompt_text import normal, unique

NAME = "prompts.json"


def mark_of(delta: Delta) -> str:
    """What tells one delta from others."""
    return f"{delta.fingerprints.before:016x} {delta.fingerprints.after:016x}"


def write_record(folder: Path, plan: PromptPlan, erasure: Erasure, delta: Delta, values: Mapping[str, Any]) -> None:
    """Write ``prompts.json``: texts by label, what each is for, the concepts, the delta's mark, and ``values``.

    Raises:
        FileFormatError: It cannot be written.
    """
    own = {"concepts": list(erasure.concepts), "delta": mark_of(delta)}
    write_json(folder / NAME, {**plan.to_dict(), **own, **values})


@dataclass(frozen=True)
class EarlierErasure:
    """An erasure of the same base that was done before.

    Attributes:
        folder: Where it lies.
        delta: What it changed.
        plan: Its prompts.
        one_step: Whether it made a one-step generator.
        concepts: What was erased, in words.
    """

    folder: Path
    delta: Delta
    plan: PromptPlan
    one_step: bool
    concepts: tuple[str, ...] = ()

    @property
    def t_init(self) -> int | None:
        """Timestep at which its one-step generator starts; None of an ordinary UNet.

        Raises:
            FileFormatError: Its delta does not say.
        """
        if not self.one_step:
            return None
        t_init = self.delta.metadata.get("t_init")
        if type(t_init) is not int:
            raise FileFormatError(f"{self.folder / 'delta'}: does not say its t_init; ask for the erasure again")
        return t_init

    @classmethod
    def read(cls, folder: Path) -> EarlierErasure:
        """Read what ``pecker-fast unlearn`` left.

        Raises:
            FileFormatError: A file is missing or damaged, or they are of different runs.
        """
        delta, file = Delta.load(folder / "delta"), folder / NAME
        values = read_json(file)
        try:
            plan, one_step = PromptPlan.from_dict(values), bool(values["one_step"])
            concepts = tuple(str(concept) for concept in values["concepts"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FileFormatError(f"{file}: is damaged ({error!r}); ask for the erasure again") from error
        if values.get("delta") != mark_of(delta):
            raise FileFormatError(f"{file}: is of another run than the delta beside it; ask for the erasure again")
        return cls(folder, delta, plan, one_step, concepts)


def apply_earlier(earlier: Sequence[EarlierErasure], tensors: dict[str, Tensor], ledger: Ledger, where: Path) -> None:
    """Apply their deltas in memory, in order; ``ledger`` is kept up to date.

    Raises:
        FileFormatError: One does not fit, or leaves NaN or infinite weights; nothing is to be done with ``tensors``
            then.
    """
    for erasure in earlier:
        both = f"{where} and {erasure.folder / 'delta'}"
        try:
            erasure.delta.apply(tensors, ledger=ledger, progress=False)
        except ValueError as error:
            raise FileFormatError(f"{both}: {error}") from error
        check_finite(both, ((name, tensors[name]) for name in erasure.delta.mask.parameters))


def merged(plan: PromptPlan, erasure: Erasure, earlier: Sequence[EarlierErasure], retain: Sequence[str]) -> PromptPlan:
    """The plan of this erasure, whose true score still knows what was forgotten before: that stays forgotten.

    Raises:
        ValueError: A prompt is forgotten already, is to be retained now, or takes another's place now; one that is
            retained or takes another's place contains a concept of any of the erasures.
    """
    own, override = list(erasure.forget), None if erasure.override is None else list(erasure.override)
    for before in earlier:
        gone = before.plan.named(before.plan.forget) or []
        known = {normal(prompt) for prompt in gone}
        if again := [prompt for prompt in erasure.forget if normal(prompt) in known]:
            raise ValueError(f"prompt {again[0]!r} is forgotten already by {before.folder}")
        targets = before.plan.named(before.plan.override)
        if (targets is None) != (override is None):
            raise ValueError(
                f"--earlier {before.folder}: give overrides for all erasures that add up, or for none of them; "
                f"without one a prompt becomes any retained one by chance"
            )
        own += gone
        if override is not None and targets is not None:
            check_without(f"--earlier {before.folder}: override", targets, erasure.concepts)
            override += targets
    concepts = unique([*erasure.concepts, *(concept for before in earlier for concept in before.concepts)])
    whole = Erasure(tuple(concepts), tuple(own), None if override is None else tuple(override))
    negative = plan.named(plan.negative)
    return PromptPlan.of(whole, retain, negative[0] if negative else None)
