"""Saliency: how much each weight of a model matters to a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.blocks import Block, BlockGrid, ParameterMask
from pecker_fast.errors import NonFiniteError
from pecker_fast.mask_config import AccumulateKind
from pecker_fast.maskable import STORE, survey
from pecker_fast.ops.accumulate_saliency import accumulate_saliency_


class Saliency(dict[str, Tensor]):
    """Name -> saliency of every maskable weight, with what a mask needs to know besides.

    Attributes:
        total: Weights of the whole model, also those that cannot be masked.
        embeddings: Names of weights that are cut by rows whatever the block.
        squared: Whether the values are sums of squared gradients; their root is then the magnitude.
        gradients: The gradients' saliency where the values themselves are something else, such as a ratio.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        total: int | None = None,
        embeddings: frozenset[str] = frozenset(),
        squared: bool = False,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(values)
        self.total = total if total is not None else sum(value.numel() for value in values.values())
        self.embeddings = embeddings
        self.squared = squared
        self.gradients = gradients

    def check(self) -> None:
        """Refuse saliency that ranks nothing.

        Raises:
            NonFiniteError: It has NaN or infinite values.
            ValueError: It is empty, or the same everywhere.
        """
        if sum(value.numel() for value in self.values()) == 0:
            raise ValueError("saliency: expected at least one weight, got none")
        for name, value in self.items():
            bad = int((~value.isfinite()).sum())
            if bad:
                raise NonFiniteError(
                    f"saliency[{name!r}]: {bad} of {value.numel()} values are NaN or infinite, so they rank nothing; "
                    f"look for a diverged loss in the saliency pass"
                )
        ranges = [value.aminmax() for value in self.values() if value.numel()]
        low, high = min(float(r.min) for r in ranges), max(float(r.max) for r in ranges)
        if low == high:
            raise ValueError(
                f"saliency: every value is {low:g}, so no weight ranks above another; "
                f"does the loss depend on the model's weights? For a mask without information use BlockMask.random"
            )

    def grids(self, block: Block) -> dict[str, BlockGrid]:
        """Every weight cut as ``block`` asks."""
        return {
            name: BlockGrid.of(tuple(value.shape), block, by_row=name in self.embeddings)
            for name, value in self.items()
        }

    def mass(self, parameters: Mapping[str, ParameterMask]) -> float:
        """Share of the summed gradient magnitude that lies on the active weights."""
        active = everything = 0.0
        for name, value in (self if self.gradients is None else self.gradients).items():
            magnitude = value.sqrt() if self.squared else value.abs()
            everything += float(magnitude.double().sum())
            active += float(parameters[name].gather(magnitude).double().sum())
        return active / everything if everything else 0.0


def compute_saliency(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    accumulate: AccumulateKind = "signed_sum",
    *,
    clip_norm: float | None = None,
) -> Saliency:
    """Saliency of every maskable weight of ``model`` for a loss, summed over batches.

    "signed_sum" is ``|sum_b grad_b|`` (SalUn, Fan et al. 2024, arXiv 2310.12508; PECKER's choice is not published),
    "abs" is ``sum_b |grad_b|``, "square" is ``sum_b grad_b**2``.

    The model comes back untouched: weights, gradients, ``requires_grad`` flags, training modes. It is run in eval mode.

    Args:
        model: Any module.
        loss_fn: (model, batch) -> scalar loss.
        batches: What ``loss_fn`` takes, at least one.
        accumulate: "signed_sum", "abs" or "square".
        clip_norm: Clip the gradient of every batch to this norm over all weights before it is added, as SalUn does, so
            that no batch outweighs the others: ``torch.nn.utils.clip_grad_norm_``. None does not clip.

    Returns:
        Name -> float32 saliency >= 0 of the weight's shape, on the weight's device.

    Raises:
        ValueError: No batches, a loss that is not a scalar, an unknown ``accumulate``, no maskable weight, or a model
            that is masked.
        NonFiniteError: The loss of a batch is NaN or infinite.
    """
    if STORE in vars(model):
        raise ValueError("compute_saliency: the model is masked; remove the mask first, or use score_blocks")
    found = survey(model)
    weights = {name: parameter for name, parameter in model.named_parameters() if name in found.maskable}
    totals = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    count = 0
    with _every_weight_wanted(model, list(weights.values())):
        for batch in batches:
            loss = loss_fn(model, batch)
            _check_loss(loss, count)
            grads: Sequence[Tensor | None] = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            if clip_norm is not None:
                grads = _clipped(grads, clip_norm)
            for total, grad in zip(totals.values(), grads, strict=True):
                if grad is not None:
                    accumulate_saliency_(total, grad, accumulate)
            count += 1
    if not count:
        raise ValueError("compute_saliency: expected at least one batch, got none")
    if accumulate == "signed_sum":
        for total in totals.values():
            total.abs_()
    return Saliency(totals, found.total, found.embeddings, squared=accumulate == "square")


def _clipped(grads: Sequence[Tensor | None], max_norm: float) -> list[Tensor | None]:
    """The gradients, scaled so that their norm together is at most ``max_norm``, as torch does it."""
    norm = nn.utils.get_total_norm([grad for grad in grads if grad is not None])
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [None if grad is None else grad * scale for grad in grads]


def _check_loss(loss: Tensor, batch: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"compute_saliency: loss_fn must return a scalar tensor, got {got} for batch {batch}")
    if not math.isfinite(float(loss.detach())):
        raise NonFiniteError(f"compute_saliency: the loss of batch {batch} is {float(loss.detach())}")


@contextmanager
def _every_weight_wanted(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for ``weights`` alone and eval mode, for a while."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    wanted = {id(weight) for weight in weights}
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
