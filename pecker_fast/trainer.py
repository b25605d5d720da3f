"""Masked training in a stock ``transformers.Trainer``, by one callback. Importing this imports transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pecker_fast.active import ActiveParameters
from pecker_fast.apply import apply_mask
from pecker_fast.checkpoint import read_json, write_json
from pecker_fast.mask import BlockMask

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("pecker_fast.trainer needs transformers: pip install 'transformers[torch]'") from error

MASK_FILE, WAYS_FILE = "mask.safetensors", "weight_grad_ways_{}.json"
"""What a checkpoint folder has besides the files of the Trainer: the mask, and of every process on a GPU how it
computes weight gradients, which was measured."""


class MaskCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not looked at: it may be missing
    """Masks the Trainer's model before the Trainer makes its optimizer, which then trains the active weights alone.

    What it does is ``apply_mask(trainer.model, mask)``. Checkpoints have the keys and shapes of the dense model, and
    the mask beside them; ``resume_from_checkpoint`` continues from them.

    Args:
        mask: The mask, or a function that makes it from the model, such as
            ``lambda model: BlockMask.random(model, 0.1)``.
        unmaskable: As in ``apply_mask``.
        remove: Make the model an ordinary dense one again when training ends.

    Attributes:
        active: The store of the active weights, as soon as the Trainer is made.

    Raises:
        TypeError: ``mask`` is neither.
        ValueError: The Trainer was given an optimizer, uses FSDP or DeepSpeed, or the mask does not fit its model.
    """

    def __init__(
        self,
        mask: BlockMask | Callable[[nn.Module], BlockMask],
        *,
        unmaskable: Literal["frozen", "dense"] = "frozen",
        remove: bool = False,
    ) -> None:
        if not (isinstance(mask, BlockMask) or callable(mask)):
            raise TypeError(
                f"MaskCallback: mask: expected a BlockMask or a function of the model that makes one, got "
                f"{type(mask).__name__}"
            )
        self.mask = mask
        self.unmaskable = unmaskable
        self.remove = remove
        self.active: ActiveParameters | None = None

    def on_init_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Mask the model."""
        if model is None:
            raise ValueError("MaskCallback: the Trainer has no model; give it one as Trainer(model=...)")
        if optimizer is not None:
            raise ValueError(
                "MaskCallback: the Trainer was given an optimizer, made before the mask; leave optimizers= out, or "
                "drop the callback, call apply_mask(model, mask), and make the optimizer on active.parameters()"
            )
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ValueError("MaskCallback: masked models do not work with FSDP or DeepSpeed; use DDP (torchrun alone)")
        mask = self.mask if isinstance(self.mask, BlockMask) else self.mask(model)
        self.active = apply_mask(model, mask, unmaskable=self.unmaskable)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Refuse to train a model that is not masked, or with another mask than the one of the checkpoint."""
        if self.active is None or model is not self.active.model:
            raise RuntimeError(
                "MaskCallback: the Trainer is about to train a model that is not masked. Give the callback to "
                "Trainer(callbacks=[...]) and the model as Trainer(model=...): model_init makes a new one"
            )
        path = _checkpoint(args, state) / MASK_FILE
        if state.global_step and path.is_file() and BlockMask.load(path) != self.active.mask:
            raise ValueError(
                f"MaskCallback: the checkpoint was trained with another mask; resume with "
                f"MaskCallback(BlockMask.load({str(path)!r}))"
            )
        ways = path.with_name(WAYS_FILE.format(args.process_index))
        if state.global_step and ways.is_file():
            self.active.use_measured_ways(read_json(ways))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the mask beside a checkpoint, and what this process measured."""
        folder = _checkpoint(args, state)
        if self.active is None or not folder.is_dir():
            return
        if state.is_world_process_zero:
            self.active.mask.save(folder / MASK_FILE)
        if ways := self.active.measured_ways():
            write_json(folder / WAYS_FILE.format(args.process_index), ways)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the mask, if that was asked for."""
        if self.remove and self.active is not None:
            self.active.remove()
            self.active = None


def _checkpoint(args: Any, state: Any) -> Path:
    """Where the Trainer keeps the checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
