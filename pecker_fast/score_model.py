"""What the distiller asks of a network: the noise in ``x_t``, given a timestep and a condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from pecker_fast.schedule import NoiseSchedule
from pecker_fast.settings import one_of

PREDICTION_TYPES = ("epsilon", "v_prediction")
"""What a text-conditional network may predict; both are turned into noise."""


class ScoreModel(Protocol):
    """A network that predicts noise."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Noise in ``x_t`` (batch, channels, height, width) at timesteps ``t`` (batch,), of ``x_t``'s shape."""
        ...


Predict: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
"""(network, x_t, t, condition) -> noise: how one kind of network is called.

The network computes in its own dtype; the noise comes back in that of ``x_t``.
"""


def predictor(model: nn.Module) -> Predict:
    """How to call ``model`` and its copies: our DDPMUNet, a diffusers UNet2DModel, or any (x_t, t, condition) -> noise.

    Raises:
        TypeError: A diffusers network that is not class-conditional.
    """
    if not _is_diffusers(model):
        return _plain
    if type(model).__name__ == "UNet2DModel" and getattr(model, "class_embedding", None) is not None:
        return _diffusers_class_conditional
    raise TypeError(
        f"diffusers' {type(model).__name__}: expected a class-conditional UNet2DModel (num_class_embeds set); "
        f"say how a UNet2DConditionModel is asked by predict=TextConditional(...), or wrap another network in a module "
        f"that takes (x_t, t, condition) and returns the noise"
    )


@dataclass(frozen=True, eq=False)
class TextConditional:
    """How a text-to-image network, diffusers' ``UNet2DConditionModel``, is asked: a prompt is a class.

    All prompts are embedded once; a label is a row of that table. ``network(x_t, t, encoder_hidden_states=
    embeddings[labels]).sample`` is the noise, or the velocity ``v = a epsilon - b x_0`` (Salimans & Ho 2022, arXiv
    2202.00512), of which ``epsilon = a v + b x_t``. The row after the last label that is drawn is the null prompt of
    guidance, as label ``num_classes`` is no class elsewhere.

    Args:
        embeddings: (rows, tokens, width) of a text encoder, on the networks' device.
        prediction_type: Of ``PREDICTION_TYPES``: what the network predicts, as its scheduler's config says.
        schedule: The noise schedule; only a velocity needs it.
        added: More tables by name, (rows, ...) each, whose rows go to the network as ``added_cond_kwargs``: those of
            Stable Diffusion XL are ``text_embeds`` and ``time_ids``.

    Raises:
        ValueError: Embeddings of another shape or of integers, a table of another length, another prediction type, or
            a velocity without schedule.
    """

    embeddings: Tensor
    prediction_type: str = "epsilon"
    schedule: NoiseSchedule | None = None
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check it once, so that no step has to."""
        if self.embeddings.ndim != 3 or not self.embeddings.is_floating_point():
            raise ValueError(
                f"TextConditional: expected embeddings (rows, tokens, width) of a float dtype, got "
                f"{self.embeddings.dtype} {tuple(self.embeddings.shape)}"
            )
        for name, table in self.added.items():
            if len(table) != len(self.embeddings):
                raise ValueError(
                    f"TextConditional: added[{name!r}]: expected {len(self.embeddings)} rows, as the embeddings have, "
                    f"got {len(table)}"
                )
        one_of("TextConditional.prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.prediction_type == "v_prediction" and self.schedule is None:
            raise ValueError("TextConditional: a velocity is turned into noise by the schedule; give schedule= too")

    def __call__(self, network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noise in ``x_t`` (batch, ...) at timesteps ``t`` (batch,) for prompts ``labels`` (batch,), in its dtype."""
        own = x_t.to(_dtype(network))
        prompts = self.embeddings[labels].to(own.dtype)
        output = _checked(network, x_t, network(own, t, encoder_hidden_states=prompts, **self._more(labels)).sample)
        if self.schedule is None or self.prediction_type == "epsilon":
            return output
        return self.schedule.add_noise(output, x_t, t)  # a v + b x_t

    def _more(self, labels: Tensor) -> dict[str, Any]:
        if not self.added:
            return {}
        return {"added_cond_kwargs": {name: table[labels] for name, table in self.added.items()}}


def _plain(model: nn.Module, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
    return _checked(model, x_t, model(x_t.to(_dtype(model)), t, condition))


def _diffusers_class_conditional(model: nn.Module, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
    return _checked(model, x_t, model(x_t.to(_dtype(model)), t, class_labels=condition).sample)


def _checked(model: nn.Module, x_t: Tensor, epsilon: Any) -> Tensor:
    if not isinstance(epsilon, Tensor) or epsilon.shape != x_t.shape:
        got = tuple(epsilon.shape) if isinstance(epsilon, Tensor) else type(epsilon).__name__
        raise ValueError(f"{type(model).__name__}: expected noise of shape {tuple(x_t.shape)}, got {got}")
    return epsilon.to(x_t.dtype)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _is_diffusers(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("diffusers.") for kind in type(model).__mro__)
