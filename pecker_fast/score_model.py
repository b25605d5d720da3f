"""What the distiller asks of a network: the noise in ``x_t``, given a timestep and a condition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn


class ScoreModel(Protocol):
    """A network that predicts noise."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Noise in ``x_t`` (batch, channels, height, width) at timesteps ``t`` (batch,), of ``x_t``'s shape."""
        ...


Predict: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
"""(network, x_t, t, condition) -> noise: how one kind of network is called."""


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
        f"wrap another network in a module that takes (x_t, t, condition) and returns the noise"
    )


def _plain(model: nn.Module, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
    return _checked(model, x_t, model(x_t, t, condition))


def _diffusers_class_conditional(model: nn.Module, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
    return _checked(model, x_t, model(x_t, t, class_labels=condition).sample)


def _checked(model: nn.Module, x_t: Tensor, epsilon: Any) -> Tensor:
    if not isinstance(epsilon, Tensor) or epsilon.shape != x_t.shape:
        got = tuple(epsilon.shape) if isinstance(epsilon, Tensor) else type(epsilon).__name__
        raise ValueError(f"{type(model).__name__}: expected noise of shape {tuple(x_t.shape)}, got {got}")
    return epsilon


def _is_diffusers(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("diffusers.") for kind in type(model).__mro__)
