"""MaskedAdamW: gathers nothing, calls one op."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor

from pecker_fast.active import ActiveParameters
from pecker_fast.distributed import RANK, WORLD_SIZE, Shard, check_shard, group_or_default
from pecker_fast.ops.accumulate_saliency import Accumulate
from pecker_fast.ops.masked_adamw import masked_adamw_
from pecker_fast.scatter import ScatterTable
from pecker_fast.step_parts import StepPart, step_parts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MASK = "mask"
"""What the optimizer's state dict says of the mask."""


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for the active weights of a masked model, in one pass.

    One call reads and writes the flat buffers of the store and puts the new values into the dense weights; weights
    outside the mask are neither read nor written. With ``betas[0] == 0`` there is no first moment. With every block
    active the steps are those of ``torch.optim.AdamW``.

    It is an ordinary optimizer to everything around it: LR schedulers, ``GradScaler``, ``state_dict``, Accelerate.

    Args:
        active: The store that ``apply_mask`` returned.
        lr: Learning rate; or a float32 or float64 tensor () of it, on the weights' device where ``capturable``.
        betas: Decay of the first and the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay, of active weights only.
        clip_value: Gradients are clipped to this magnitude, element by element; None does not clip.
        ema_decay: Keep a running average ``ema += (1 - ema_decay) * (value - ema)``; see ``active.ema_weights()``.
        saliency: Add up the gradients of all steps, before clipping, as "signed_sum", "abs" or "square"; see
            ``saliency()``. None does not.
        backend: Name of a backend, or None for the best one.
        shard_group: Keep on every rank of these processes only its share of the state (ZeRO stage 1, arXiv 1910.02054):
            a step updates that share and gathers the new weights, with the weights and bits of a step that is not
            sharded. The gradients must be averaged already, by DDP or ``active.all_reduce_()``. None does not shard.
        capturable: As in ``torch.optim``: the steps are counted in a float32 tensor on the weights' device, so that a
            step can be captured in a CUDA graph, after one that is not. A learning rate that is to change between
            replays must be a tensor; all other settings are those of the capture.

    Raises:
        ValueError: A number is out of range.
        TypeError: ``active`` is not a store.
        RuntimeError: The ranks of ``shard_group`` have different masks; on every rank.
    """

    scatters_itself = True

    def __init__(
        self,
        active: ActiveParameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        clip_value: float | None = None,
        ema_decay: float | None = None,
        saliency: Accumulate | None = None,
        backend: str | None = None,
        shard_group: ProcessGroup | None = None,
        capturable: bool = False,
    ) -> None:
        if not isinstance(active, ActiveParameters):
            raise TypeError(
                f"MaskedAdamW: expected the ActiveParameters that apply_mask(model, mask) returns, got "
                f"{type(active).__name__}; for plain parameters use torch.optim.AdamW"
            )
        for name, number in {"lr": lr, "eps": eps, "weight_decay": weight_decay, "clip_value": clip_value}.items():
            if number is not None and not number >= 0:
                raise ValueError(f"MaskedAdamW: {name}: expected a number >= 0, got {number}")
        for name, decay in {"betas[0]": betas[0], "betas[1]": betas[1], "ema_decay": ema_decay}.items():
            if decay is not None and not 0 <= decay < 1:
                raise ValueError(f"MaskedAdamW: {name}: expected a number in [0, 1), got {decay}")
        if saliency not in (None, *get_args(Accumulate)):
            kinds = ", ".join(get_args(Accumulate))
            raise ValueError(f"MaskedAdamW: saliency: expected one of {kinds} or None, got {saliency!r}")
        self.active = active
        self.mask = active.mask
        self.backend = backend
        self.shard: Shard | None = None
        if shard_group is not None:
            active.check_same_mask(shard_group)
            self.shard = Shard.of(active.numel, group_or_default(shard_group))
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_value": clip_value,
            "ema_decay": ema_decay,
            "saliency": saliency,
            "capturable": capturable,
        }
        super().__init__(active.parameters(), defaults)
        active.followers.add(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: there is one group, the whole store.

        Raises:
            ValueError: Always, once the optimizer is made.
        """
        if self.param_groups:
            raise ValueError(
                "MaskedAdamW: cannot add a group; it steps the whole store and nothing else. Give other parameters to "
                "an optimizer of their own, or active.parameters() in groups to torch.optim.AdamW"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # As torch's, and the store: a deep copy of model and optimizer together steps the copied model.
        own = {"active": self.active, "mask": self.mask, "backend": self.backend, "shard": self.shard}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("capturable", False)  # saved before there was the setting
        self.active.followers.add(self)

    @torch._disable_dynamo  # type: ignore[attr-defined] # as torch.optim does it: torch.compiler.disable would import the compiler right away
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every active weight, from its ``grad``.

        Raises:
            RuntimeError: An active weight has never had a gradient, or a CUDA graph is being captured and the optimizer
                is not ``capturable``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active, group = self.active, self.param_groups[0]
        if self.mask is not active.mask:
            raise RuntimeError("MaskedAdamW: the mask was changed without this optimizer; give it to change_mask too")
        if active.values.is_cuda and not group["capturable"] and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "MaskedAdamW: a CUDA graph would repeat the step of this one number; make it with capturable=True"
            )
        active.bind_()
        active.adopt_()
        state, skipped = self._state(), active.check_gradients()
        if len(skipped) == len(active.entries):
            return loss
        state["step"] += 1
        parts = self._parts(state, skipped)
        fused = self.shard is None and len(parts) == 1
        for part in parts:
            self._update(part, state, active.scatter_table() if fused else None)
        if self.shard is not None:
            self.shard.gather_(active.values)
        if not fused:
            active.scatter_table().scatter_(active.values)
        active.bump_versions()
        active.remember_()
        return loss

    def _update(self, part: StepPart, state: dict[str, Any], scatter: ScatterTable | None) -> None:
        """One stretch of the buffer, and of the state, by one step."""
        active, group, there, here = self.active, self.param_groups[0], part.there, part.here
        clip_value, ema_decay = group["clip_value"], group["ema_decay"]
        ema = _cut(active.ema, here)
        if part.skipped:  # its average goes on
            if ema is not None:
                ema.add_((active.values[there] - ema).mul_(1 - ema_decay))
            return
        masked_adamw_(
            active.values[there],
            active.grads[there],
            _cut(state.get("exp_avg"), here),
            state["exp_avg_sq"][here],
            step=state["step"] - part.missed if part.missed else state["step"],
            lr=_rate(group),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            clip_value=math.inf if clip_value is None else clip_value,
            ema=ema,
            ema_decay=ema_decay or 0.0,
            saliency=_cut(state.get("saliency"), here),
            saliency_kind=group["saliency"] or "abs",
            scatter=scatter,
            backend=self.backend,
        )

    def _parts(self, state: dict[str, Any], skipped: Sequence[str]) -> list[StepPart]:
        """The buffer in stretches of parameters that have had equally many steps: nearly always one.

        Parameters without a gradient are passed over, as ``torch.optim.AdamW`` does, and their bias corrections count
        the steps that they took. ``state["missed"]`` says how many they did not.
        """
        missed: dict[str, int] = state.get("missed", {})
        for name in skipped:
            missed[name] = missed.get(name, 0) + 1
        if missed:
            state["missed"] = missed
            parts = step_parts(self.active.entries, missed, set(skipped))
        else:
            parts = [StepPart(whole := slice(0, self.active.numel), whole)]
        if self.shard is None:
            return parts
        return [cut for part in parts for stretch in self.shard.stretches if (cut := part.within(*stretch))]

    def _state(self) -> dict[str, Any]:
        """Flat state for the whole store, kept under its first parameter so that ``state_dict`` works as it is."""
        state = cast(dict[str, Any], self.state[self.param_groups[0]["params"][0]])
        group, values = self.param_groups[0], self.active.values
        if not state:
            own = values if self.shard is None else self.shard.part_of(values)
            state["step"] = 0  # of the store; ["missed"] has what single parameters did not take
            if self.shard is not None:
                state |= {RANK: self.shard.rank, WORLD_SIZE: self.shard.world_size}
            if group["betas"][0]:
                state["exp_avg"] = torch.zeros_like(own)
            state["exp_avg_sq"] = torch.zeros_like(own)
            if group["ema_decay"] is not None:
                state["ema"] = own.clone()
            if group["saliency"] is not None:
                state["saliency"] = torch.zeros_like(own)
        for name, buffer in state.items():
            if isinstance(buffer, Tensor) and buffer.device != values.device:
                state[name] = buffer.to(values.device)  # the model moved after the first step
        if isinstance(state["step"], Tensor) != group["capturable"]:
            number = int(state["step"])
            state["step"] = values.new_full((), number, dtype=torch.float32) if group["capturable"] else number
        self.active.ema, self.active.ema_shard = state.get("ema"), self.shard
        return state

    def saliency(self) -> dict[str, Tensor]:
        """Saliency of every active weight so far, a by-product of the steps: what ``BlockMask.from_saliency`` takes.

        With state in shards every rank must call it.

        Returns:
            Name -> saliency >= 0 of the weight's shape, zero outside the mask. Signed sums come as magnitudes.

        Raises:
            RuntimeError: None is kept, or there was no step yet.
        """
        flat = self.state[self.param_groups[0]["params"][0]].get("saliency")
        if flat is None:
            raise RuntimeError("MaskedAdamW: no saliency is kept; make it with saliency=, and step once")
        whole = flat.abs() if self.shard is None else self.shard.gather(flat.abs())
        return {name: self.active.to_dense(whole, name) for name in self.active.names}

    def follow_mask(self, carried: Callable[[str, Tensor], Tensor]) -> None:
        """After a change of the mask: take the new parameters and lay the state out anew, as ``change_mask`` does.

        With state in shards every rank must call it.

        Args:
            carried: (name of a flat buffer of the state, buffer) -> the same for the new mask.
        """
        group, old = self.param_groups[0], self.shard
        new = None if old is None else Shard.of(self.active.numel, old.group)
        state = self.state.pop(group["params"][0], {})
        for name, buffer in state.items():
            if isinstance(buffer, Tensor) and name != "step":
                moved = carried(name, buffer if old is None else old.gather(buffer))
                state[name] = moved if new is None else new.part_of(moved)
        group["params"], self.shard, self.mask = self.active.parameters(), new, self.active.mask
        if "missed" in state:
            state["missed"] = {name: n for name, n in state["missed"].items() if name in self.active.names}
        if state:
            self.state[group["params"][0]] = state
            self._state()

    def reorder_state_(self, reorder_: Callable[[Tensor], None]) -> None:
        """After a change of memory order: put the state into it, in place.

        With state in shards every rank must call it.

        Args:
            reorder_: Does so with a flat buffer of the whole store.
        """
        for name, buffer in self.state.get(self.param_groups[0]["params"][0], {}).items():
            if isinstance(buffer, Tensor) and name != "step":
                whole = buffer if self.shard is None else self.shard.gather(buffer)
                reorder_(whole)
                if self.shard is not None:
                    buffer.copy_(self.shard.part_of(whole))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and under "mask" a fingerprint of how the flat state is laid out."""
        return super().state_dict() | {MASK: self.active.fingerprint().hex()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: It belongs to another mask, or to another shard; nothing is changed.
        """
        self.active.bind_()  # the fingerprint is that of the weights as they lie now
        numel = self.active.numel if self.shard is None else self.shard.part_numel
        for saved in state_dict["state"].values():
            check_shard(saved, self.shard)
            if len(saved["exp_avg_sq"]) != numel:
                raise ValueError(
                    f"MaskedAdamW: the state is for {len(saved['exp_avg_sq'])} active weights, this mask has "
                    f"{numel}; load the mask it was saved with"
                )
        if state_dict.get(MASK, own := self.active.fingerprint().hex()) != own:
            raise ValueError(
                f"MaskedAdamW: the state is for {numel} active weights, as many as here, but of other blocks, or in "
                f"another dtype or memory order; load the mask it was saved with, into a model as it was then"
            )
        super().load_state_dict(state_dict)
        if state_dict["state"]:
            self._state()


def _rate(group: dict[str, Any]) -> float | Tensor:
    """The learning rate of this step: read now where that waits for nothing and no graph is meant to follow it."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) and (group["capturable"] or lr.device.type != "cpu") else float(lr)


def _cut(buffer: Tensor | None, stretch: slice) -> Tensor | None:
    return None if buffer is None else buffer[stretch]
