"""Cases for masked_adamw_ that its tests share: settings, buffers, masks, and the definition written out once more."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import masked_adamw_
from pecker_fast.scatter import ScatterTable, Target

SETTINGS = [
    {"beta1": 0.9, "weight_decay": 0.0},
    {"beta1": 0.9, "weight_decay": 0.1, "clip_value": 0.5},
    {"beta1": 0.0, "beta2": 0.99, "clip_value": 1.0, "ema_decay": 0.98},
    {"beta1": 0.0, "weight_decay": 0.01, "eps": 1e-4, "ema_decay": 0.9999},
    {"beta1": 0.9, "clip_value": 0.5, "saliency_kind": "abs"},
    {"beta1": 0.0, "clip_value": 0.5, "saliency_kind": "square"},
    {"beta1": 0.0, "ema_decay": 0.98, "saliency_kind": "signed_sum"},
    {"beta1": 0.9, "ema_decay": 0.98, "saliency_kind": "square"},
]
SALIENCY = {"signed_sum": lambda g: g, "abs": torch.abs, "square": torch.square}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
State = dict[str, Tensor | None]


def buffers(n: int, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> State:
    value = torch.randn(n, dtype=dtype)
    return {
        "value": value,
        "exp_avg": torch.randn(n, dtype=dtype) if settings["beta1"] else None,
        "exp_avg_sq": torch.rand(n, dtype=dtype),
        "ema": value.clone() if "ema_decay" in settings else None,
        "saliency": torch.rand(n, dtype=dtype) if "saliency_kind" in settings else None,
    }


def gradients(n: int, steps: int = 3) -> list[Tensor]:
    """Of all magnitudes, as the order of float operations shows best."""
    return [torch.randn(n) * 10 ** torch.randint(-12, 3, (n,)).float() for _ in range(steps)]


def run(state: State, grads: list[Tensor], settings: dict[str, Any], backend: str | None = None, **extra: Any) -> State:
    for step, grad in enumerate(grads, 1):
        numbers = {"step": step, "lr": 1e-2} | settings | extra
        if numbers.pop("on_device", False):
            numbers["step"] = torch.tensor(float(step), device=grad.device)
            numbers["lr"] = torch.tensor(numbers["lr"], dtype=torch.float64, device=grad.device)
        masked_adamw_(
            state["value"], grad, state["exp_avg"], state["exp_avg_sq"], ema=state["ema"],
            saliency=state["saliency"], backend=backend, **numbers,
        )  # fmt: skip
    return state


def truth_of(state: State, grads: list[Tensor], settings: dict[str, Any]) -> State:
    """The definition in float64, written out once more and independently of the reference."""
    w, m, v, ema, saliency = (None if b is None else b.double().clone() for b in state.values())
    s = {"beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_value": math.inf, "ema_decay": 0.0} | settings
    for step, grad in enumerate(grads, 1):
        if saliency is not None:
            saliency = saliency + SALIENCY[s["saliency_kind"]](grad.double())  # not clipped
        g = grad.double().clamp(-s["clip_value"], s["clip_value"])
        w = w * (1 - 1e-2 * s["weight_decay"])
        m = g if m is None else s["beta1"] * m + (1 - s["beta1"]) * g
        v = s["beta2"] * v + (1 - s["beta2"]) * g * g
        m_hat, v_hat = m / (1 - s["beta1"] ** step), v / (1 - s["beta2"] ** step)
        w = w - 1e-2 * m_hat / (v_hat.sqrt() + s["eps"])
        ema = None if ema is None else s["ema_decay"] * ema + (1 - s["ema_decay"]) * w
        m = None if state["exp_avg"] is None else m
    return {"value": w, "exp_avg": m, "exp_avg_sq": v, "ema": ema, "saliency": saliency}


def clone(state: State, device: str = "cpu") -> State:
    return {name: None if b is None else b.clone().to(device) for name, b in state.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but that any NaN is as good as another."""
    a, b = a.cpu(), b.cpu()
    if a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    return torch.equal(a.nan_to_num(0.0).view(torch.uint8), b.nan_to_num(0.0).view(torch.uint8))


def assert_same_bits(got: State, expected: State) -> None:
    for name, buffer in expected.items():
        assert (got[name] is None and buffer is None) or same_bits(got[name], buffer), name


class Model:
    """Dense weights of several dtypes, a mask of each, and their table; at density 1 one is a view of the buffer."""

    def __init__(
        self, shapes: list[tuple[int, ...]], block: Any, density: float, dtypes: list[torch.dtype], device: str = "cpu"
    ) -> None:
        self.dense: list[Tensor | None] = []
        self.masks: list[ParameterMask] = []
        for number, shape in enumerate(shapes):
            grid = BlockGrid.of(shape, block)
            order = torch.randperm(grid.num_blocks)[: round(density * grid.num_blocks)]
            self.masks.append(ParameterMask(grid, order.sort().values))
            self.dense.append(torch.randn(shape).to(dtypes[number % len(dtypes)]).to(device))
        if density == 1:
            self.dense[0] = None
        self.before = [None if d is None else d.clone() for d in self.dense]
        targets = [Target(mask, d) for mask, d in zip(self.masks, self.dense, strict=True)]
        self.table = ScatterTable(targets, torch.device(device))
        self.numel = self.table.numel

    def check(self, value: Tensor) -> None:
        """The dense weights are the values on the mask, and keep every bit elsewhere."""
        for dense, before, mask, stretch in zip(
            self.dense, self.before, self.masks, value.cpu().split([mask.numel for mask in self.masks]), strict=True
        ):
            if dense is None:
                continue
            expected = before.cpu().clone()
            expected.view(-1)[mask.index(False)] = stretch.to(dense.dtype)
            assert same_bits(dense, expected)
