"""Error budgets: a kernel may be no further from float64 truth than plain torch in the same dtype is."""

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-13}


def assert_within_budget(got: Tensor, truth: Tensor, plain: Tensor, scale: float | None = None) -> None:
    """``|got - truth| <= FACTOR * |plain - truth| + FLOOR * scale``, as a maximum over all elements.

    ``scale`` is the largest magnitude of the truth, or of what it is a sum of, where that may cancel.
    """
    truth = truth.double()
    if scale is None:
        scale = float(truth.abs().max()) if truth.numel() else 0.0
    error = float((got.double() - truth).abs().max()) if truth.numel() else 0.0
    allowed = FACTOR * float((plain.double() - truth).abs().max()) if truth.numel() else 0.0
    allowed += FLOOR[plain.dtype] * scale
    assert error <= allowed, f"error {error:.3g} above budget {allowed:.3g} at scale {scale:.3g}"
