"""Checkpoints that Score Forgetting Distillation, Selective Amnesia and SalUn write, as a `DDPMUNet`.

They are lists: ``[model, optimizer, step]`` with the running average as a fourth entry where there is one, and after a
distillation ``[fake score, its optimizer, generator, its optimizer, step, running average of the generator]``, of which
early snapshots keep only the generator's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pecker_fast.errors import FileFormatError
from pecker_fast.foreign_weights import check_network
from pecker_fast.models.ddpm import DDPMUNet
from pecker_fast.models.published_names import build, infer_architecture, to_own_names
from pecker_fast.torch_file import describe, read_torch, weights_of

Which: TypeAlias = Literal["ema", "model", "generator", "fake_score"]

_PRETRAINED: dict[str, int] = {"model": 0, "ema": 3}
_DISTILLED: dict[str, int] = {"fake_score": 0, "generator": 2, "ema": 5}
_STEP = {3: 2, 4: 2, 6: 4}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """One network of a published checkpoint.

    Attributes:
        model: In eval mode on the CPU, in the dtype that it was saved in.
        which: Which network of the list it is.
        one_step: Whether it is a generator, which draws in one step; else it predicts noise at any timestep.
        step: Training steps that the checkpoint says it had; None where it does not.
    """

    model: DDPMUNet
    which: Which
    one_step: bool
    step: int | None


def load_published(
    path: str | os.PathLike[str],
    which: Which = "ema",
    *,
    image_size: int | None = None,
    norm_groups: int = 32,
    dropout: float = 0.1,
) -> PublishedCheckpoint:
    """Read one network of a checkpoint of SFD, SA or SalUn; no code in the file is run.

    The architecture follows from names and shapes, and each of them is checked. The plain-torch equivalent is
    ``torch.load(path, weights_only=True)[index]`` with the names of wrappers (``module.``) cut off.

    Args:
        path: The file, such as ``ckpt.pth``.
        which: "ema", the running average; "model" of a trained DDPM; "generator" or "fake_score" of a distillation.
        image_size: Height of the images; needed where not exactly one level has attention (taken to be 16 x 16).
        norm_groups: Groups of the group norms; 32 in all published networks.
        dropout: Dropout for further training; 0.1 in all published networks.

    Returns:
        The network and what the list says of it. The null class is the last row of its embedding table, of zeros if
        the checkpoint has none.

    Raises:
        FileFormatError: The file is damaged or foreign, has no such network, or a weight is missing, of another shape,
            not floating-point, or not finite.
        ValueError: ``which`` is none of these, or ``image_size`` is needed or wrong.
    """
    if which not in ("ema", "model", "generator", "fake_score"):
        raise ValueError(f"which: expected ema, model, generator or fake_score, got {which!r}")
    values = read_torch(path)
    if not isinstance(values, list) or len(values) not in _STEP:
        raise FileFormatError(
            f"{path}: expected a list of 3 or 4 entries (a trained DDPM) or of 6 (a distillation), "
            f"got {describe(values)}"
        )
    distilled = len(values) == 6
    index = (_DISTILLED if distilled else _PRETRAINED).get(which)
    if index is None or index >= len(values) or values[index] is None:
        present = [name for name, at in _entries(values) if at < len(values) and values[at] is not None]
        raise FileFormatError(f"{path}: holds no {which}; it has {' and '.join(present) or 'no network'}")
    where = f"{path}: {which}"
    weights = weights_of(where, values[index])
    architecture = infer_architecture(where, weights, image_size=image_size, norm_groups=norm_groups, dropout=dropout)
    own = to_own_names(where, weights)
    model = build(where, own, architecture)
    check_network(where, own)
    model.load_state_dict({name: tensor.clone() for name, tensor in own.items()}, assign=True)
    step = values[_STEP[len(values)]]
    one_step = distilled and which != "fake_score"
    return PublishedCheckpoint(model.eval(), which, one_step, step if type(step) is int else None)


def _entries(values: list[object]) -> list[tuple[str, int]]:
    return list((_DISTILLED if len(values) == 6 else _PRETRAINED).items())
