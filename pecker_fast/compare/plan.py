"""Which runs a comparison makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pecker_fast.compare.methods import REFERENCE, Method
from pecker_fast.compare.store import Line

Phase = Literal["tuning", "reported"]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        phase: What it is for.
        method: Its name.
        factor: Of the learning rate.
        forget: Classes.
        seed: Of every draw.
    """

    phase: Phase
    method: str
    factor: float
    forget: tuple[int, ...]
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from others, JSON values."""
        return {**vars(self), "forget": list(self.forget)}


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        methods: Names, in the order of the table.
        forget: Classes that the reported runs forget, all at once.
        seeds: Of the reported runs.
        tuning_forget: Classes that learning rates are tuned on.
        tuning_seeds: Seeds that they are tuned with, none of them reported.
        factors: The grid of learning rates, the same for every method.
        steps: Steps of the reference, and of the comparison at equal steps.
        samples: Images of every class that are judged.

    Raises:
        ValueError: Something is missing or out of range, or a seed or class is both tuned on and reported.
    """

    methods: tuple[str, ...]
    forget: tuple[int, ...]
    seeds: tuple[int, ...]
    tuning_forget: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    factors: tuple[float, ...]
    steps: int
    samples: int

    def __post_init__(self) -> None:
        for name in ("methods", "forget", "seeds", "tuning_forget", "tuning_seeds", "factors"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: expected at least one, and none twice, got {list(values)}")
        if both := set(self.forget) & set(self.tuning_forget):
            raise ValueError(f"tuning_class: {min(both)} is reported too; tune on other classes than those reported")
        if both := set(self.seeds) & set(self.tuning_seeds):
            raise ValueError(f"tuning_seeds: {min(both)} is reported too; tune on other seeds than those reported")
        if self.steps < 1 or self.samples < 2:
            raise ValueError(f"expected at least 1 step and 2 samples, got {self.steps} and {self.samples}")

    def check_classes(self, num_classes: int) -> None:
        """Refuse classes that the task does not have.

        Raises:
            ValueError: There is one, or nothing is retained.
        """
        for name, labels in (("forget_class", self.forget), ("tuning_class", self.tuning_forget)):
            for label in labels:
                if not 0 <= label < num_classes:
                    raise ValueError(f"--{name}: unknown class {label}; the task has classes 0 to {num_classes - 1}")
            if len(labels) == num_classes:
                raise ValueError(f"--{name}: every class is forgotten; at least one must be retained")

    def tuning(self, known: Mapping[str, Method]) -> list[Job]:
        """Runs that learning rates are chosen by; none where there is nothing to choose from."""
        if len(self.factors) == 1:
            return []
        tuned = dict.fromkeys(known[name].tuned_as or name for name in self.methods if not known[name].own_length)
        return [
            Job("tuning", name, factor, self.tuning_forget, seed)
            for seed in self.tuning_seeds
            for name in tuned
            for factor in self.factors
        ]

    def reported(self, known: Mapping[str, Method], factors: Mapping[str, float]) -> list[Job]:
        """Runs of the table, seed by seed, so that what is cut short is even."""
        return [
            Job(
                "reported",
                name,
                1.0 if known[name].own_length else factors[known[name].tuned_as or name],
                self.forget,
                seed,
            )
            for seed in self.seeds
            for name in self.methods
        ]


def missing(jobs: Sequence[Job], lines: Sequence[Line]) -> list[Job]:
    """Jobs without a line."""
    names = Job.__dataclass_fields__
    done = [{name: line.get(name) for name in names} for line in lines]
    return [job for job in jobs if job.key not in done]


def marks(steps: int, reference: Line, own: Line) -> dict[str, int]:
    """Steps at which a method is judged: as many as the reference, and as many as its seconds are good for.

    What is done before the first step (saliency, Fisher information, replay) is in the seconds; where it takes all of
    them, there is no second mark.

    Args:
        steps: Of the reference.
        reference: Its timing, with "step_seconds" and "setup_seconds".
        own: The method's.
    """
    budget = reference["setup_seconds"] + steps * reference["step_seconds"]
    affordable = int((budget - own["setup_seconds"]) / own["step_seconds"])
    if own["method"] == REFERENCE:
        return {"equal_steps": steps, "equal_seconds": steps}
    return {"equal_steps": steps, **({"equal_seconds": affordable} if affordable > 0 else {})}
