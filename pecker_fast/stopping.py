"""When an erasure is done: lower bounds on how well it forgets and retains, on images that nothing has seen before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pecker_fast.config import DistillConfig
from pecker_fast.distill_ranks import Ranks
from pecker_fast.errors import NonFiniteError
from pecker_fast.stop_rule import StopRule, lower_bound

MIN_SAMPLES = 500
"""Images of a side below which a bound says too little."""
_BATCH = 256

Judge = Callable[[Tensor], Tensor]
"""Images (n, C, H, W), clamped to [-1, 1], on the distiller's device -> logits (n, classes)."""


class Distiller(Protocol):
    """What is asked of a ``MaskedDistiller``."""

    config: DistillConfig
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks

    def sample(self, condition: Tensor, *, noise: Tensor) -> Tensor:
        """Images of the averaged generator."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What one check found.

    Attributes:
        stop: The rule held in this check and in the one before.
        holds: The rule held in this check.
        counts: "ua" (of the worst forgotten class) and "retain", each (successes, images).
    """

    stop: bool
    holds: bool
    counts: Mapping[str, tuple[int, int]]

    def values(self) -> dict[str, float]:
        """Shares and their lower bounds: "ua", "ua_lower", "retain", "retain_lower"."""
        values: dict[str, float] = {}
        for name, (hits, count) in self.counts.items():
            values |= {name: hits / count, f"{name}_lower": lower_bound(hits, count)}
        return values


class StopCheck:
    """Asks whether an erasure is done: call it with the distiller every few steps, and stop when it says so.

    Each call draws new images of the averaged generator, ``samples`` of every forgotten class and as many of all that
    the distiller's config retains together, and says stop when the rule holds twice in a row. It draws nothing from
    the distiller's random states or torch's, and changes nothing: a run with checks is the run without, to the bit::

        check = StopCheck(StopRule(ua=0.99, retain=0.97), judge, forget=(3,))
        for metrics in distiller.run(500):
            if metrics["step"] % 10 == 0 and check(distiller).stop:
                break

    Where several processes train together, every rank calls it, each draws its share, and all get the same verdict.

    Args:
        rule: What must hold.
        judge: Images (n, C, H, W), clamped to [-1, 1], on the distiller's device -> logits (n, num_classes); a module
            must be in eval mode and on that device.
        forget: Forgotten classes, some of those of the distiller's config or all of them.
        samples: Images of each forgotten class, and of the retained classes together, at least 500.
        seed: Of the images.

    Raises:
        ValueError: Too few samples for the rule, no class to forget, or a judge in training mode.
    """

    def __init__(
        self, rule: StopRule, judge: Judge, forget: Sequence[int], *, samples: int = MIN_SAMPLES, seed: int = 0
    ) -> None:
        if samples < MIN_SAMPLES:
            raise ValueError(f"samples: expected at least {MIN_SAMPLES} of a side, got {samples}")
        rule.check_samples(samples)
        if not forget:
            raise ValueError("forget: expected the classes that are forgotten, got none")
        if isinstance(judge, nn.Module) and judge.training:
            raise ValueError(f"judge: {type(judge).__name__} is in training mode; call judge.eval() first")
        self.rule, self.judge, self.forget = rule, judge, tuple(forget)
        self.samples, self.seed = samples, seed
        self.checks, self.held = 0, 0

    @torch.no_grad()
    def __call__(self, distiller: Distiller) -> Verdict:
        """Draw, judge, count, and compare with the rule.

        Raises:
            NonFiniteError: The judge's logits are NaN or infinite.
            ValueError: The distiller has no such classes, or the judge gives logits of another shape.
        """
        ranks = distiller.ranks
        sides = self._sides(distiller.config)
        rng = torch.Generator(distiller.device).manual_seed(fresh_seed("stop", self.seed, self.checks, ranks.rank))
        share = -(-self.samples // ranks.world_size)
        hits = torch.tensor([self._hits(distiller, classes, share, rng) for classes in sides], device="cpu")
        hits = ranks.gather(hits.to(distiller.device)).sum(0)
        count = share * ranks.world_size
        counts = {"ua": (int(hits[:-1].min()), count), "retain": (int(hits[-1]), count)}
        holds = self.rule.holds(counts)
        self.checks, self.held = self.checks + 1, self.held + 1 if holds else 0
        return Verdict(self.held >= 2, holds, counts)

    def state_dict(self) -> dict[str, int]:
        """How many checks there were, and in how many of the last the rule held: JSON values."""
        return {"checks": self.checks, "held": self.held}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state_dict`` was taken, with the images that would have come."""
        self.checks, self.held = int(state["checks"]), int(state["held"])

    def _sides(self, config: DistillConfig) -> list[tuple[int, ...]]:
        """Each forgotten class by itself, then those that the config retains together."""
        if not all(0 <= label < config.num_classes for label in self.forget):
            raise ValueError(f"forget: expected some of the classes 0 to {config.num_classes - 1}, got {self.forget}")
        if both := sorted(set(self.forget) & set(config.retained)):
            raise ValueError(f"forget: class {both[0]} is retained by the distiller's config, got {self.forget}")
        return [*((label,) for label in self.forget), config.retained]

    def _hits(self, distiller: Distiller, classes: tuple[int, ...], count: int, rng: torch.Generator) -> int:
        """How many of ``count`` images are as they should be."""
        table, device = torch.tensor(classes, device=distiller.device), distiller.device
        forgotten = torch.tensor(self.forget, device=device)
        hits = torch.zeros((), dtype=torch.int64, device=device)
        for start in range(0, count, _BATCH):
            size = min(_BATCH, count - start)
            labels = table[torch.randint(len(table), (size,), generator=rng, device=device)]
            shape = (size, *distiller.config.sample_shape)
            noise = torch.randn(shape, generator=rng, device=device).to(distiller.dtype)
            seen = self._judged(distiller.sample(labels, noise=noise).clamp(-1, 1), distiller)
            hits += (~torch.isin(seen, forgotten) if classes[0] in self.forget else seen == labels).sum()
        return int(hits)

    def _judged(self, images: Tensor, distiller: Distiller) -> Tensor:
        """Classes that the judge sees, (n,), whatever it draws."""
        device, expected = distiller.device, (len(images), distiller.config.num_classes)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            logits: Any = self.judge(images)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"judge: expected logits of shape {expected}, got {got}")
        if not bool(logits.isfinite().all()):
            raise NonFiniteError("the judge's logits hold NaN or infinite values; is the generator damaged?")
        return logits.argmax(1)


def fresh_seed(*parts: object) -> int:
    """A seed that depends on all of ``parts``, and that no run takes for its own draws but by chance."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")
