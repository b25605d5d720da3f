"""One optimizer step for every active weight of a model, and their way into the dense weights, in one pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from pecker_fast import native
from pecker_fast.ops import triton_kernels
from pecker_fast.ops.accumulate_saliency import Accumulate, accumulate_saliency_reference_
from pecker_fast.ops.dispatch import Backend, Op, library
from pecker_fast.scatter import ScatterTable, native_table

CONSTANTS = 12
"""Floats of csrc/masked_adamw.h's AdamwConstants, with the padding: 48 bytes."""


def masked_adamw_(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
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

    The same order of float32 operations in every backend, so that they give the same bits. ``step`` and ``lr`` may be
    tensors, which are read where they are: nothing waits for the device, and a captured CUDA graph finds at every
    replay what they hold then (all other numbers stay those of the capture). What follows from them is computed there
    in double and rounded to float32, which all but always hides in which last bits a GPU's power differs.

    Args:
        value: Active weights, float32 (or float64, by the reference alone) (n,), contiguous. Changed.
        grad: Their gradient, like ``value``.
        exp_avg: First moment, like ``value``, or None with ``beta1 == 0``. Changed.
        exp_avg_sq: Second moment, like ``value``. Changed.
        step: Number of this step, from 1; or a tensor of it, float32 () on ``value``'s device.
        lr: Learning rate; or a tensor of it, float32 or float64 () on ``value``'s device.
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
        ValueError: Buffers, tensors of numbers or a table of another shape, dtype, device or layout, ``step`` < 1 (a
            tensor on a GPU is not looked at), no first moment with beta1 > 0, an unknown ``saliency_kind``, or more
            than 2**31 - 1 tiles of 1024 weights. Nothing is changed.
    """
    buffers = {"value": value, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    buffers |= {"ema": ema, "saliency": saliency}
    for name, buffer in buffers.items():
        if buffer is not None:
            _check_buffer(name, buffer, value)
    if exp_avg is None and beta1 != 0:
        raise ValueError(f"masked_adamw_: exp_avg is None, which needs beta1 = 0, got beta1 = {beta1}")
    _check_number("step", step, value, (torch.float32,))
    _check_number("lr", lr, value, (torch.float32, torch.float64))
    if not (isinstance(step, Tensor) and step.is_cuda) and step < 1:
        raise ValueError(f"masked_adamw_: step counts from 1, got {step}")
    if saliency_kind not in get_args(Accumulate):
        kinds = ", ".join(get_args(Accumulate))
        raise ValueError(f"masked_adamw_: saliency_kind must be one of {kinds}, got {saliency_kind!r}")
    if scatter is not None and scatter.numel != value.numel():
        raise ValueError(f"masked_adamw_: scatter is for {scatter.numel} weights, value has {value.numel()}")
    if scatter is not None and scatter.device != value.device:
        raise ValueError(f"masked_adamw_: scatter is on {scatter.device}, value on {value.device}")
    # The kernels are float32; masters of a float64 model train by the reference.
    name = _OP.choose(value.device, "reference" if value.dtype == torch.float64 else backend)
    table: tuple[list[Tensor], int] = ([], 0)
    if scatter is not None and not scatter.is_empty and name != "reference":
        table = scatter.tensors(), scatter.dtypes
    step_tensor, step = (step, 1) if isinstance(step, Tensor) else (None, step)
    lr_tensor, lr = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    hyper = (step_tensor, lr_tensor, step, lr, beta1, beta2, eps, weight_decay, clip_value, ema_decay, saliency_kind)
    torch.ops.pecker_fast.masked_adamw_(value, grad, exp_avg, exp_avg_sq, ema, saliency, *table, *hyper, name)
    if name == "reference" and scatter is not None:
        scatter.scatter_reference_(value)


class Step(NamedTuple):
    """The arguments of one step, in the order of the op's schema; ``masked_adamw_`` says what they are.

    Where ``step_tensor`` or ``lr_tensor`` is given, ``step`` or ``lr`` says nothing.
    """

    value: Tensor
    grad: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor
    ema: Tensor | None
    saliency: Tensor | None
    table: list[Tensor]
    table_dtypes: int
    step_tensor: Tensor | None
    lr_tensor: Tensor | None
    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_value: float
    ema_decay: float
    saliency_kind: str

    @property
    def buffers(self) -> dict[str, Tensor | None]:
        """The flat buffers by name."""
        names = ("value", "grad", "exp_avg", "exp_avg_sq", "ema", "saliency")
        return {name: getattr(self, name) for name in names}

    @property
    def on_device(self) -> bool:
        """Whether a number is in a tensor, to be read when the step runs."""
        return self.step_tensor is not None or self.lr_tensor is not None

    def of_this_step(self) -> tuple[Any, Any, Any]:
        """What changes from step to step: 1 - lr * weight_decay, lr / (1 - beta1^t), sqrt(1 - beta2^t).

        Numbers, or float64 tensors () where they depend on a tensor: in double, because 1 - beta2^t loses all its
        digits in float when beta2 is near 1.
        """
        t: Any = self.step if self.step_tensor is None else self.step_tensor.double()
        lr: Any = self.lr if self.lr_tensor is None else self.lr_tensor.double()
        bias2 = 1 - self.beta2**t
        bias2_sqrt = bias2.sqrt() if isinstance(bias2, Tensor) else math.sqrt(bias2)
        return 1 - lr * self.weight_decay, lr / (1 - self.beta1**t), bias2_sqrt


def masked_adamw_reference_(s: Step) -> None:
    """Plain-torch twin of ``masked_adamw_``, without the scatter.

    Products and sums are separate calls, because torch's combined ones round once where the kernels round twice; the
    root goes through double, because torch's float root on the CPU is not always the nearest float.
    """
    decay, step_size, bias2_sqrt = s.of_this_step()
    if s.saliency is not None:
        accumulate_saliency_reference_(s.saliency, s.grad, s.saliency_kind, None, None)
    g = s.grad.clamp(-s.clip_value, s.clip_value)
    s.value.mul_(decay)
    if s.exp_avg is not None:
        s.exp_avg.add_((g - s.exp_avg).mul_(1 - s.beta1))
    s.exp_avg_sq.mul_(s.beta2).add_(g.square().mul_(1 - s.beta2))
    denominator = s.exp_avg_sq.double().sqrt().to(s.exp_avg_sq.dtype).div_(bias2_sqrt).add_(s.eps)
    momentum = g if s.exp_avg is None else s.exp_avg
    s.value.sub_((momentum / denominator).mul_(step_size))
    if s.ema is not None:
        s.ema.add_((s.value - s.ema).mul_(1 - s.ema_decay))


def _cpu(s: Step) -> None:
    if s.step_tensor is not None:
        s = s._replace(step=int(s.step_tensor))
    if s.lr_tensor is not None:
        s = s._replace(lr=float(s.lr_tensor))
    native.load().masked_adamw_cpu(**_native_arguments(s), threads=torch.get_num_threads())


def _cuda(s: Step) -> None:
    tensors: dict[str, Any] = {}
    if s.on_device:
        constants = s.value.new_empty(CONSTANTS)
        tensors["constants"] = constants.data_ptr()
    if s.step_tensor is not None:
        tensors["step_tensor"] = s.step_tensor.data_ptr()
    if s.lr_tensor is not None:
        tensors |= {"lr_tensor": s.lr_tensor.data_ptr(), "lr_is_double": s.lr_tensor.dtype == torch.float64}
    with torch.cuda.device(s.value.device):
        stream = torch.cuda.current_stream().cuda_stream
        native.load().masked_adamw_cuda(**_native_arguments(s), **tensors, stream=stream)


def _triton(s: Step) -> None:
    of_this_step: Any = s.of_this_step()
    if s.on_device:
        of_this_step = torch.stack([s.value.new_full((), n) if isinstance(n, float) else n for n in of_this_step])
    triton_kernels.load("masked_adamw").masked_adamw_(
        **s.buffers, table=s.table, table_dtypes=s.table_dtypes, of_this_step=of_this_step, beta1=s.beta1,
        beta2=s.beta2, eps=s.eps, clip_value=s.clip_value, ema_decay=s.ema_decay, saliency_kind=s.saliency_kind,
    )  # fmt: skip


def _native_arguments(s: Step) -> dict[str, Any]:
    """What the native module takes: addresses, sizes and numbers by name."""
    addresses = {name: 0 if buffer is None else buffer.data_ptr() for name, buffer in s.buffers.items()}
    names = ("step", "lr", "beta1", "beta2", "eps", "weight_decay", "clip_value", "ema_decay")
    numbers = {name: getattr(s, name) for name in names}
    kind = get_args(Accumulate).index(s.saliency_kind)
    return {**addresses, "numel": s.value.numel(), **native_table(s.table), **numbers, "saliency_kind": kind}


def _check_number(name: str, number: float | Tensor, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(number, Tensor):
        return
    if number.dtype not in dtypes or number.shape != () or number.device != value.device:
        raise ValueError(
            f"masked_adamw_: {name}: expected a number, or a tensor of {' or '.join(map(str, dtypes))} () on "
            f"{value.device}, got {number.dtype} {tuple(number.shape)} on {number.device}"
        )


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
        "triton": Backend(_triton, devices=triton_kernels.DEVICES, why_not=triton_kernels.why_not),
        "cuda": Backend(_cuda, devices=("cuda",), why_not=native.why_not_cuda),
    },
    prefer={"cpu": ("cpu",), "cuda": ("cuda", "triton")},
)

library.define(
    "masked_adamw_(Tensor(a!) value, Tensor grad, Tensor(b!)? exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? ema, "
    "Tensor(e!)? saliency, Tensor[] table, int table_dtypes, Tensor? step_tensor, Tensor? lr_tensor, int step, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, float clip_value, float ema_decay, "
    "str saliency_kind, str backend) -> ()"
)


@torch.library.impl(library, "masked_adamw_", "CompositeExplicitAutograd")
def _run(*args: Any) -> None:
    _OP.run(args[-1], Step(*args[:-1]))


@torch.library.register_fake("pecker_fast::masked_adamw_")
def _fake(*args: Any) -> None:
    return None
