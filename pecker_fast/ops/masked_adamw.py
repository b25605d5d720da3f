"""One optimizer step for every active weight of a model, and their way into the dense weights, in one pass."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from pecker_fast import native
from pecker_fast.ops.accumulate_saliency import Accumulate, accumulate_saliency_reference_
from pecker_fast.ops.dispatch import Backend, Op, library
from pecker_fast.scatter import ScatterTable, native_table


def masked_adamw_(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_value: float = math.inf,
    ema: Tensor | None = None,
    ema_decay: float = 0.0,
    saliency: Tensor | None = None,
    saliency_kind: Accumulate = "abs",
    scatter: ScatterTable | None = None,
    backend: str | None = None,
) -> None:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) on a flat buffer of active weights, in place.

    In plain torch, with t = ``step``::

        saliency += f(grad)                                 # as in accumulate_saliency_
        g = grad.clamp(-clip_value, clip_value)
        value *= 1 - lr * weight_decay
        exp_avg += (1 - beta1) * (g - exp_avg)              # g itself where there is no first moment: beta1 = 0
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
        value -= lr / (1 - beta1**t) * (exp_avg / (exp_avg_sq.sqrt() / (1 - beta2**t) ** 0.5 + eps))
        ema += (1 - ema_decay) * (value - ema)
        scatter.scatter_(value)

    The same order of float32 operations in every backend: on the CPU they give the same bits.

    Args:
        value: Active weights, float32 (or float64, by the reference alone) (n,), contiguous. Changed.
        grad: Their gradient, like ``value``.
        exp_avg: First moment, like ``value``, or None with ``beta1 == 0``. Changed.
        exp_avg_sq: Second moment, like ``value``. Changed.
        step: Number of this step, from 1.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        clip_value: Gradients are clipped to this magnitude; NaN stays NaN.
        ema: Running average of the weights, like ``value``, or None. Changed.
        ema_decay: Its decay.
        saliency: Running saliency of the gradient as it comes, like ``value``, or None. Changed.
        saliency_kind: "signed_sum", "abs" or "square".
        scatter: Where the new values go in the dense weights; None leaves those alone. Their tensors are changed.
        backend: Name of a backend, or None for the best one.

    Raises:
        ValueError: Buffers of another shape, dtype, device or layout, ``step`` < 1, no first moment with beta1 > 0,
            or an unknown ``saliency_kind``.
    """
    buffers = {"value": value, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    buffers |= {"ema": ema, "saliency": saliency}
    for name, buffer in buffers.items():
        if buffer is not None:
            _check_buffer(name, buffer, value)
    if exp_avg is None and beta1 != 0:
        raise ValueError(f"masked_adamw_: exp_avg is None, which needs beta1 = 0, got beta1 = {beta1}")
    if step < 1:
        raise ValueError(f"masked_adamw_: step counts from 1, got {step}")
    if saliency_kind not in get_args(Accumulate):
        kinds = ", ".join(get_args(Accumulate))
        raise ValueError(f"masked_adamw_: saliency_kind must be one of {kinds}, got {saliency_kind!r}")
    if scatter is not None and scatter.numel != value.numel():
        raise ValueError(f"masked_adamw_: scatter is for {scatter.numel} weights, value has {value.numel()}")
    # The kernels are float32; masters of a float64 model train by the reference.
    name = _OP.choose(value.device, "reference" if value.dtype == torch.float64 else backend)
    table = [] if scatter is None or scatter.is_empty or name == "reference" else scatter.tensors()
    hyper = (step, lr, beta1, beta2, eps, weight_decay, clip_value, ema_decay, saliency_kind)
    torch.ops.pecker_fast.masked_adamw_(value, grad, exp_avg, exp_avg_sq, ema, saliency, table, *hyper, name)
    if name == "reference" and scatter is not None:
        scatter.scatter_reference_(value)


def masked_adamw_reference_(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    saliency: Tensor | None,
    table: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip_value: float,
    ema_decay: float,
    saliency_kind: str,
) -> None:
    """Plain-torch twin of ``masked_adamw_``, without the scatter.

    Products and sums are separate calls, because torch's combined ones round once where the kernels round twice; the
    root goes through double, because torch's float root on the CPU is not always the nearest float.
    """
    if saliency is not None:
        accumulate_saliency_reference_(saliency, grad, saliency_kind, None, None)
    g = grad.clamp(-clip_value, clip_value)
    value.mul_(1 - lr * weight_decay)
    if exp_avg is not None:
        exp_avg.add_((g - exp_avg).mul_(1 - beta1))
    exp_avg_sq.mul_(beta2).add_(g.square().mul_(1 - beta2))
    denominator = exp_avg_sq.double().sqrt().to(exp_avg_sq.dtype).div_(math.sqrt(1 - beta2**step)).add_(eps)
    momentum = g if exp_avg is None else exp_avg
    value.sub_((momentum / denominator).mul_(lr / (1 - beta1**step)))
    if ema is not None:
        ema.add_((value - ema).mul_(1 - ema_decay))


def _cpu(*arguments: Any) -> None:
    native.load().masked_adamw_cpu(**_native_arguments(*arguments), threads=torch.get_num_threads())


def _cuda(value: Tensor, *rest: Any) -> None:
    with torch.cuda.device(value.device):
        stream = torch.cuda.current_stream().cuda_stream
        native.load().masked_adamw_cuda(**_native_arguments(value, *rest), stream=stream)


def _native_arguments(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    saliency: Tensor | None,
    table: list[Tensor],
    *hyper: Any,
) -> dict[str, Any]:
    """What the native module takes: addresses, sizes and numbers by name."""
    buffers = {"value": value, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    buffers |= {"ema": ema, "saliency": saliency}
    addresses = {name: 0 if buffer is None else buffer.data_ptr() for name, buffer in buffers.items()}
    names = ("step", "lr", "beta1", "beta2", "eps", "weight_decay", "clip_value", "ema_decay", "saliency_kind")
    numbers = dict(zip(names, hyper, strict=True))
    numbers["saliency_kind"] = get_args(Accumulate).index(numbers["saliency_kind"])
    return {**addresses, "numel": value.numel(), **native_table(table), **numbers}


def _check_buffer(name: str, buffer: Tensor, value: Tensor) -> None:
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    expected = f"{dtype} ({value.numel()},), contiguous, on {value.device}"
    if buffer.dtype != dtype or buffer.shape != (value.numel(),):
        got = f"{buffer.dtype} {tuple(buffer.shape)}"
    elif buffer.device != value.device or not buffer.is_contiguous():
        got = f"{'contiguous' if buffer.is_contiguous() else 'strided'} on {buffer.device}"
    else:
        return
    raise ValueError(f"masked_adamw_: {name}: expected {expected}, got {got}. Does the state belong to another mask?")


_OP = Op(
    "masked_adamw_",
    {
        "reference": Backend(masked_adamw_reference_),
        "cpu": Backend(_cpu, devices=("cpu",), why_not=native.why_not),
        "cuda": Backend(_cuda, devices=("cuda",), why_not=native.why_not_cuda),
    },
    prefer={"cpu": ("cpu",), "cuda": ("cuda",)},
)

library.define(
    "masked_adamw_(Tensor(a!) value, Tensor grad, Tensor(b!)? exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? ema, "
    "Tensor(e!)? saliency, Tensor[] table, int step, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, float clip_value, float ema_decay, str saliency_kind, str backend) -> ()"
)


@torch.library.impl(library, "masked_adamw_", "CompositeExplicitAutograd")
def _run(*args: Any) -> None:
    _OP.run(args[-1], *args[:-1])


@torch.library.register_fake("pecker_fast::masked_adamw_")
def _fake(*args: Any) -> None:
    return None
