"""Another mask in mid-training: blocks enter and leave, and the state of those that stay is carried over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pecker_fast.active import ActiveParameters
from pecker_fast.apply import check_mask, layers_to_swap
from pecker_fast.block_scores import BlockScores, ScoreKind
from pecker_fast.layout import Entry
from pecker_fast.mask import BlockMask
from pecker_fast.optim import MaskedAdamW
from pecker_fast.scoring import score_blocks
from pecker_fast.selection import Scope
from pecker_fast.settings import check_density

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"})
"""State that divides the step, by the names of torch.optim. In weights that enter it starts at its mean, not at zero:
bias correction counts the steps of the whole parameter, and a zero would make their first steps far too long."""

Trained: TypeAlias = dict[str, tuple[Entry, nn.Parameter]]
"""Active parameters by the name of their dense weight, and how they lie in the buffer."""


def change_mask(active: ActiveParameters, mask: BlockMask, *optimizers: torch.optim.Optimizer) -> None:
    """Go on training under another mask.

    Weights that leave keep the value they have and never change again; weights that enter start from theirs. The
    state of those that stay is carried over; first moments of those that enter start at zero, second moments at the
    mean of their parameter's (of the whole store's where the parameter had no active block), running averages at the
    weight. Gradients are dropped. The active parameters are new objects: take ``active.parameters()`` anew.

    Args:
        active: The store; it stays the same object.
        mask: The new mask, of the same model; its blocks may be cut in another way.
        optimizers: Every optimizer that holds active parameters, ``MaskedAdamW`` or any other. Parameters without an
            active block so far join the first group of the first one.

    Raises:
        ValueError: The mask does not fit the model, or an active parameter is in none of ``optimizers``.
        RuntimeError: A module has lost one of its weights. Nothing is changed in either case.
    """
    check_mask(active.model, mask, active.found, [entry.name for entry in active.entries if entry.adopted])
    active.bind_()
    before = _trained(active)
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missed = [name for name, (_, parameter) in before.items() if id(parameter) not in held]
    if optimizers and missed:
        raise ValueError(
            f"change_mask: {len(missed)} active parameters ({', '.join(missed[:3])}) are in no optimizer that was "
            f"given; give every optimizer that holds some"
        )
    active.replace_mask(mask, layers_to_swap(active.modules, mask, active.found))
    after = _trained(active)
    newcomers = [name for name in after if name not in before]
    for optimizer in optimizers:
        if isinstance(optimizer, MaskedAdamW):
            optimizer.follow_mask(lambda name, flat: _carried_flat(name, flat, active, before, after))
        else:
            _follow(optimizer, before, after, newcomers)
            newcomers = []


class MaskRefresher:
    """Every K steps: score all blocks in the training step itself, and go on with the best ones.

    ::

        refresher = MaskRefresher(active, optimizer, every=100, density=linear_density(0.3, 0.1, steps=1000))
        for batch in batches:
            optimizer.zero_grad()
            with refresher.scoring():  # costs nothing but in every 100th step
                loss_fn(model, batch).backward()
            optimizer.step()
            refresher.step()

    Args:
        active: The store.
        optimizers: The optimizer that holds its parameters, or several.
        every: Steps between changes.
        density: Share of all weights, or the share as a function of the step.
        kind: What blocks are ranked by: mean "abs" or "square" of the gradient.
        scope: As ``BlockMask.from_block_scores``.
        exclude: Masks whose weights are left alone.

    Attributes:
        steps: Steps so far.

    Raises:
        ValueError: ``every`` or ``density`` out of range.
    """

    def __init__(
        self,
        active: ActiveParameters,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        every: int,
        density: float | Callable[[int], float],
        *,
        kind: ScoreKind = "abs",
        scope: Scope = "global",
        exclude: Iterable[BlockMask] = (),
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"MaskRefresher: every: expected an integer >= 1, got {every!r}")
        if not callable(density):
            check_density(density)
        self.active = active
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self.every, self.kind, self.scope, self.exclude = every, kind, scope, list(exclude)
        self.density = density if callable(density) else lambda step: float(density)
        self.steps = 0
        self._scores: BlockScores | None = None

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Around forward and backward of one step; does something in every K-th only."""
        if (self.steps + 1) % self.every:
            yield
            return
        with score_blocks(self.active.model, kind=self.kind) as scores:
            yield
        self._scores = scores

    def step(self) -> bool:
        """After the optimizer's step; returns whether the mask was changed.

        Raises:
            RuntimeError: It is time for another mask, and no scores were taken.
            NonFiniteError: The scores are not finite; the mask stays.
        """
        self.steps += 1
        if self.steps % self.every:
            return False
        if self._scores is None:
            raise RuntimeError("MaskRefresher: no scores to choose from; run forward and backward within scoring()")
        scores, self._scores = self._scores, None
        mask = BlockMask.from_block_scores(scores, self.density(self.steps), self.scope, self.exclude)
        change_mask(self.active, mask, *self.optimizers)
        return True


def linear_density(start: float, end: float, steps: int) -> Callable[[int], float]:
    """A density that goes from ``start`` to ``end`` in ``steps`` steps and stays there.

    Raises:
        ValueError: A density outside (0, 1], or ``steps`` < 1.
    """
    check_density(start)
    check_density(end)
    if steps < 1:
        raise ValueError(f"linear_density: steps: expected at least 1, got {steps}")
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def _trained(active: ActiveParameters) -> Trained:
    parameters = active.parameters()
    return {entry.name: (entry, p) for entry, p in zip(active.entries, parameters, strict=True)}


def _carry(old: Entry, stretch: Tensor, new: Entry, fill: float) -> Tensor:
    """State of the weights of ``new``: what ``stretch`` has for those that were active, ``fill`` for the others."""
    if old.mask == new.mask and old.channels_last == new.channels_last:
        return stretch.clone()
    return new.of_dense(old.to_dense(stretch, fill))


def _carried_flat(name: str, flat: Tensor, active: ActiveParameters, before: Trained, after: Trained) -> Tensor:
    """A flat buffer of ``MaskedAdamW`` laid out for the new mask."""
    if name == "ema":  # starts at the weight itself
        carried = active.values.clone()
        for own in after.keys() & before.keys():
            (old, _), (new, _) = before[own], after[own]
            kept = _carry(old, old.stretch(flat), new, math.nan)
            new.stretch(carried).copy_(torch.where(kept.isnan(), new.stretch(carried), kept))
        return carried
    carried = torch.zeros_like(active.values, dtype=flat.dtype)
    if name in SECOND_MOMENTS:
        carried.fill_(_mean(flat))
    for own in after.keys() & before.keys():
        old, new = before[own][0], after[own][0]
        stretch = old.stretch(flat)
        new.stretch(carried).copy_(_carry(old, stretch, new, _mean(stretch) if name in SECOND_MOMENTS else 0.0))
    return carried


def _follow(optimizer: torch.optim.Optimizer, before: Trained, after: Trained, newcomers: list[str]) -> None:
    """Give any torch optimizer the new parameters in the groups of the old ones, and their state."""
    names = {id(parameter): name for name, (_, parameter) in before.items()}
    for number, group in enumerate(optimizer.param_groups):
        others = [p for p in group["params"] if id(p) not in names]
        stay = [names[id(p)] for p in group["params"] if names.get(id(p)) in after]
        joined = stay + (newcomers if number == 0 else [])
        group["params"] = others + [after[name][1] for name in joined]
    for name, (old, parameter) in before.items():
        state = optimizer.state.pop(parameter, None)
        if state and name in after:
            new, replacement = after[name]
            optimizer.state[replacement] = {
                key: _carried_state(key, value, parameter, old, new) for key, value in state.items()
            }


def _carried_state(key: str, value: Any, parameter: nn.Parameter, old: Entry, new: Entry) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.is_floating_point():
        return value  # a step count, say
    stretch = old.flattened(value)
    return new.shaped(_carry(old, stretch, new, _mean(stretch) if key in SECOND_MOMENTS else 0.0))


def _mean(stretch: Tensor) -> float:
    return float(stretch.double().mean()) if stretch.numel() else 0.0
