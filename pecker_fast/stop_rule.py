"""Targets of an erasure: what lower bounds must reach, and how many images that takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from pecker_fast.metrics import wilson_interval

_Z = 1.96
_TERM = re.compile(r"\s*(\w+)\s*>=\s*(\S+)\s*")


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Targets that lower bounds must reach: ends of 95 % Wilson intervals, so that luck does not end a run.

    With n images, all of them right, the bound is ``n / (n + 1.96**2)``: a target needs at least
    ``samples_needed(target)`` of them. Of 500, 0.99 allows no error, 0.98 three, 0.97 seven and 0.95 fifteen.

    Attributes:
        ua: Of the unlearning accuracy, the share of images of a forgotten class that the judge takes for no forgotten
            class; of several classes, that of the worst. None asks nothing.
        retain: Of the share of images of retained classes that the judge takes for their class. None asks nothing.

    Raises:
        ValueError: A target outside (0, 1), or none at all.
    """

    ua: float | None = None
    retain: float | None = None

    def __post_init__(self) -> None:
        for name, target in self.targets.items():
            if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < 1:
                raise ValueError(f"StopRule.{name}: expected a share above 0 and below 1, got {target!r}")
        if not self.targets:
            raise ValueError("StopRule: expected a target for ua, for retain, or for both, got none")

    @classmethod
    def parse(cls, text: str) -> StopRule:
        """From text such as "ua>=0.99,retain>=0.97", in any order, one of them or both.

        Raises:
            ValueError: It is something else; what is wrong with it is said.
        """
        names, targets = [field.name for field in fields(cls)], dict[str, float]()
        for term in text.split(","):
            match = _TERM.fullmatch(term)
            if match is None:
                raise ValueError(f"stop rule: expected NAME>=SHARE such as ua>=0.99,retain>=0.97, got {term.strip()!r}")
            name, number = match.groups()
            if name not in names:
                raise ValueError(f"stop rule: unknown name {name!r}; expected {' or '.join(names)}")
            if name in targets:
                raise ValueError(f"stop rule: {name} is named twice in {text!r}")
            try:
                targets[name] = float(number)
            except ValueError:
                raise ValueError(f"stop rule: expected {name}>= a number such as 0.99, got {number!r}") from None
        return cls(**targets)

    @property
    def targets(self) -> dict[str, float]:
        """Name -> target of what is asked."""
        return {field.name: target for field in fields(self) if (target := getattr(self, field.name)) is not None}

    def holds(self, counts: Mapping[str, tuple[int, int]]) -> bool:
        """Whether every target is reached by the lower end of its interval.

        Args:
            counts: "ua" and "retain", as far as they are asked for, each (successes, images).

        Raises:
            ValueError: A count is missing or makes no sense.
        """
        if missing := sorted(self.targets.keys() - counts.keys()):
            raise ValueError(f"counts: expected {', '.join(self.targets)}, missing {missing[0]}")
        return all(lower_bound(*counts[name]) >= target for name, target in self.targets.items())

    def check_samples(self, samples: int) -> None:
        """Refuse so few images a side that a target is out of reach even if all of them are right.

        Raises:
            ValueError: They are; how many are needed is said.
        """
        for name, target in self.targets.items():
            if (needed := samples_needed(target)) > samples:
                raise ValueError(
                    f"{name}>={target:g}: can never hold on {samples} samples, where the lower bound is at most "
                    f"{lower_bound(samples, samples):.4f}; take at least {needed}, and more to allow for an error"
                )

    def __str__(self) -> str:
        return ",".join(f"{name}>={target:g}" for name, target in self.targets.items())


def samples_needed(target: float) -> int:
    """The fewest images whose lower bound reaches ``target`` if all are right: ``1.96**2 target / (1 - target)``."""
    count = max(1, math.floor(_Z * _Z * target / (1 - target)) - 1)
    while lower_bound(count, count) < target:
        count += 1
    return count


def lower_bound(successes: int, count: int) -> float:
    """Lower end of the 95 % Wilson interval of a share."""
    return wilson_interval(successes, count, _Z)[0]
