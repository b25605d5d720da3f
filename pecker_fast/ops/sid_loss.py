"""The generator loss of Score identity Distillation in closed form: loss and both gradients in one pass."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pecker_fast.ops import triton_kernels
from pecker_fast.ops.dispatch import Backend, Op, library
from pecker_fast.ops.layout import is_dense, like_layout

OMEGA_MIN = 1e-5
"""Smallest denominator: the published clamp on mean |x0_true - x0|."""


def sid_loss(
    epsilon: Tensor,
    epsilon_true: Tensor,
    epsilon_fake: Tensor,
    sigma: Tensor,
    alpha: float = 1.2,
    *,
    backend: str | None = None,
) -> Tensor:
    """SiD generator loss of every sample (Zhou et al. 2024, arXiv 2404.04057), differentiable in both predictions.

    With x0_k = (x_t - b eps_k) / a the published form is sum((x0_true - x0_fake) * ((x0_true - x0) - alpha (x0_true -
    x0_fake))) / mean|x0_true - x0|. Written in the predictions x0 cancels. In plain torch, per sample:
    ``d = epsilon_fake - epsilon_true; r = epsilon - epsilon_true``
    ``omega = (sigma * r.abs().mean()).clamp(min=1e-5).detach()``
    ``loss = sigma**2 * (d * (r - alpha * d)).sum() / omega``
    so that all of the generator's gradient flows through the two networks' inputs.

    The "triton" backend takes half precision too, also mixed with float32, and computes in float32 (in float64 if one
    of the tensors is that); results have epsilon's dtype. Samples of up to 16384 values are read once, larger
    ones twice. Every run gives the same bits.

    Args:
        epsilon: Noise that was added, (batch, ...), float32 or float64.
        epsilon_true: Prediction of the true score, same shape.
        epsilon_fake: Prediction of the fake score, same shape.
        sigma: b / a at each sample's timestep, (batch,).
        alpha: SiD's alpha.
        backend: Name of a backend, or None for the best one.

    Returns:
        Loss of each sample, (batch,).

    Raises:
        ValueError: Shapes or devices differ, no dimension besides the batch, or a tensor that is not of a float dtype.
    """
    tensors = {"epsilon": epsilon, "epsilon_true": epsilon_true, "epsilon_fake": epsilon_fake, "sigma": sigma}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.device != epsilon.device:
            raise ValueError(
                f"sid_loss: expected tensors of a float dtype on {epsilon.device} (that of epsilon), "
                f"got {name} as {tensor.dtype} on {tensor.device}"
            )
    if epsilon.dim() < 2:
        raise ValueError(f"sid_loss: expected epsilon of shape (batch, ...), got {tuple(epsilon.shape)}")
    if not epsilon.shape == epsilon_true.shape == epsilon_fake.shape:
        raise ValueError(
            f"sid_loss: expected three tensors of one shape, got epsilon {tuple(epsilon.shape)}, "
            f"epsilon_true {tuple(epsilon_true.shape)}, epsilon_fake {tuple(epsilon_fake.shape)}"
        )
    if sigma.shape != epsilon.shape[:1]:
        raise ValueError(f"sid_loss: expected sigma of shape {tuple(epsilon.shape[:1])}, got {tuple(sigma.shape)}")
    loss: Tensor = _SidLoss.apply(epsilon, epsilon_true, epsilon_fake, sigma, alpha, backend)
    return loss


def sid_loss_reference(
    epsilon: Tensor, epsilon_true: Tensor, epsilon_fake: Tensor, sigma: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch twin: per-sample loss, and its gradients with respect to both predictions."""
    shape = (-1, *[1] * (epsilon.dim() - 1))
    d = epsilon_fake - epsilon_true
    r = epsilon - epsilon_true
    omega = (sigma * r.flatten(1).abs().mean(1)).clamp(min=OMEGA_MIN)
    scale = (sigma.square() / omega).view(shape)
    loss = (scale * d * (r - alpha * d)).flatten(1).sum(1)
    return loss, -scale * (r + (1 - 2 * alpha) * d), scale * (r - 2 * alpha * d)


class _SidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        epsilon: Tensor,
        epsilon_true: Tensor,
        epsilon_fake: Tensor,
        sigma: Tensor,
        alpha: float,
        backend: str | None,
    ) -> Tensor:
        loss, grad_true, grad_fake = torch.ops.pecker_fast.sid_loss(
            epsilon, epsilon_true, epsilon_fake, sigma, alpha, backend
        )
        ctx.save_for_backward(grad_true, grad_fake)
        return cast(Tensor, loss)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_true, grad_fake = ctx.saved_tensors
        grad_loss = grad_loss.view(-1, *[1] * (grad_true.dim() - 1))
        return None, grad_loss * grad_true, grad_loss * grad_fake, None, None, None


def _triton(
    epsilon: Tensor, epsilon_true: Tensor, epsilon_fake: Tensor, sigma: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not is_dense(epsilon) or not is_dense(epsilon[:1]):  # samples one after the other
        loss, *grads = _triton(epsilon.contiguous(), epsilon_true, epsilon_fake, sigma, alpha)
        grad_true, grad_fake = (torch.empty_like(epsilon).copy_(grad) for grad in grads)
        return loss, grad_true, grad_fake
    loss, grad_true, grad_fake = epsilon.new_zeros(len(epsilon)), torch.empty_like(epsilon), torch.empty_like(epsilon)
    if epsilon.numel():
        inputs = epsilon, like_layout(epsilon_true, epsilon), like_layout(epsilon_fake, epsilon)
        outputs = loss, (grad_true, grad_fake)
        triton_kernels.load("sid_loss").sid_loss_(inputs, sigma.contiguous(), *outputs, alpha, OMEGA_MIN)
    return loss, grad_true, grad_fake


_OP = Op(
    "sid_loss",
    {
        "reference": Backend(sid_loss_reference),
        "triton": Backend(_triton, devices=triton_kernels.DEVICES, why_not=triton_kernels.why_not),
    },
    prefer={"cuda": ("triton",)},
)

library.define(
    "sid_loss(Tensor epsilon, Tensor epsilon_true, Tensor epsilon_fake, Tensor sigma, float alpha, str? backend)"
    " -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(library, "sid_loss", "CompositeExplicitAutograd")
def _run(
    epsilon: Tensor, epsilon_true: Tensor, epsilon_fake: Tensor, sigma: Tensor, alpha: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    loss, grad_true, grad_fake = _OP.run(
        _OP.choose(epsilon.device, backend), epsilon, epsilon_true, epsilon_fake, sigma, alpha
    )
    return loss, grad_true, grad_fake


@torch.library.register_fake("pecker_fast::sid_loss")
def _fake(
    epsilon: Tensor, epsilon_true: Tensor, epsilon_fake: Tensor, sigma: Tensor, alpha: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    return epsilon.new_empty(epsilon.shape[0]), torch.empty_like(epsilon), torch.empty_like(epsilon)
