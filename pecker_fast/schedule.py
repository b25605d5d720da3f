"""Noise schedules of discrete-time diffusion: ``x_t = alpha(t) x_0 + std(t) epsilon``.

``alpha = sqrt(alpha_bar)``, ``std = sqrt(1 - alpha_bar)`` and ``sigma = std / alpha``, with ``alpha_bar`` the
cumulative product of ``1 - beta`` (Ho et al. 2020). Everything is derived from one float64 table.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

_MAX_TIMESTEPS = 1_000_000  # far above any real schedule; a damaged file must not ask for all of the memory


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A table of ``alpha_bar`` and what follows from it.

    The methods take a timestep in one of two forms: an ``int`` (one level for the whole batch) or a (batch,)
    integer tensor (a level per sample). Tensors of coefficients come back broadcastable to the tensor that
    they will multiply, in its dtype and on its device.

    Attributes:
        alphas_cumprod: (T,) float64 on the CPU, strictly decreasing within (0, 1).
        recipe: How to build the table again, as plain JSON values; empty if only the table itself tells.
    """

    alphas_cumprod: Tensor
    recipe: Mapping[str, Any] = field(default_factory=dict)
    _tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the table once, so that no method has to.

        Raises:
            ValueError: The table has another shape or dtype, or is not strictly decreasing within (0, 1).
        """
        table = self.alphas_cumprod
        if table.ndim != 1 or len(table) == 0 or table.dtype != torch.float64 or table.device.type != "cpu":
            raise ValueError(
                "alphas_cumprod must be a non-empty 1-d float64 tensor on the CPU, "
                f"got {table.dtype} of shape {tuple(table.shape)} on {table.device}"
            )
        if bool((table == 0).any()):
            raise ValueError(
                f"alphas_cumprod must decrease strictly within (0, 1), and is 0 at timestep "
                f"{int((table == 0).int().argmax())}: a schedule of zero terminal SNR, whose last x_t holds nothing of "
                f"the image"
            )
        inside = bool((table > 0).all() and (table < 1).all())
        if not inside or not bool((table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease strictly within (0, 1); check the betas")

    @classmethod
    def linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> "NoiseSchedule":
        """Betas on a straight line: the DDPM schedule."""
        _check_betas(num_train_timesteps, beta_start, beta_end)
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64, device="cpu")
        return cls((1 - betas).cumprod(0), _recipe("linear", num_train_timesteps, beta_start, beta_end))

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> "NoiseSchedule":
        """Square roots of the betas on a straight line: the schedule of Stable Diffusion."""
        _check_betas(num_train_timesteps, beta_start, beta_end)
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64, device="cpu")
        recipe = _recipe("scaled_linear", num_train_timesteps, beta_start, beta_end)
        return cls((1 - roots**2).cumprod(0), recipe)

    @classmethod
    def from_diffusers(cls, scheduler: Any, predicts: Collection[str] = ("epsilon",)) -> "NoiseSchedule":
        """Take over the table of a diffusers scheduler whose network predicts the noise.

        Args:
            scheduler: With ``alphas_cumprod``.
            predicts: Prediction types that the caller can turn into noise, as ``TextConditional`` does.

        Raises:
            TypeError: The object has no ``alphas_cumprod``.
            ValueError: Its network predicts something else, or the table is none that can be trained with, such as
                one of zero terminal SNR.
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(table, Tensor):
            raise TypeError(
                f"expected a diffusers scheduler with alphas_cumprod, got {type(scheduler).__name__}; "
                "use DDPMScheduler or DDIMScheduler"
            )
        config = getattr(scheduler, "config", None)
        prediction = getattr(config, "prediction_type", "epsilon")
        if prediction not in predicts:
            raise ValueError(
                f"{type(scheduler).__name__} has prediction_type={prediction!r}, expected "
                f"{' or '.join(map(repr, predicts))}; wrap the network so that it predicts the noise"
            )
        try:
            return cls(table.detach().cpu().double())
        except ValueError as error:
            if not getattr(config, "rescale_betas_zero_snr", False):
                raise
            raise ValueError(
                f"{type(scheduler).__name__} has rescale_betas_zero_snr, for zero terminal SNR: {error}. With Stable "
                f"Diffusion's betas EulerDiscreteScheduler keeps the last value above 0: save the pipeline with it, "
                f"EulerDiscreteScheduler.from_config(pipeline.scheduler.config)"
            ) from error

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps T; valid timesteps are 0 to T - 1."""
        return len(self.alphas_cumprod)

    @overload
    def alpha(self, t: int) -> float: ...
    @overload
    def alpha(self, t: Tensor, like: Tensor) -> Tensor: ...
    def alpha(self, t: int | Tensor, like: Tensor | None = None) -> float | Tensor:
        """Signal coefficient ``sqrt(alpha_bar_t)``.

        Args:
            t: A timestep, or (batch,) timesteps of any integer dtype.
            like: For a tensor ``t``: the (batch, ...) tensor that the result will multiply.

        Returns:
            A float, or a (batch, 1, ..., 1) tensor with the dtype and device of ``like``.
        """
        return self._coefficient("alpha", t, like)

    @overload
    def std(self, t: int) -> float: ...
    @overload
    def std(self, t: Tensor, like: Tensor) -> Tensor: ...
    def std(self, t: int | Tensor, like: Tensor | None = None) -> float | Tensor:
        """Noise coefficient ``sqrt(1 - alpha_bar_t)``; arguments and result as in `alpha`."""
        return self._coefficient("std", t, like)

    @overload
    def sigma(self, t: int) -> float: ...
    @overload
    def sigma(self, t: Tensor, like: Tensor) -> Tensor: ...
    def sigma(self, t: int | Tensor, like: Tensor | None = None) -> float | Tensor:
        """Noise-to-signal ratio ``std / alpha``; arguments and result as in `alpha`."""
        return self._coefficient("sigma", t, like)

    def add_noise(self, x0: Tensor, epsilon: Tensor, t: int | Tensor) -> Tensor:
        """Return ``x_t = alpha x_0 + std epsilon``; ``x0`` and ``epsilon`` (batch, ...) of one shape."""
        if isinstance(t, int):
            return self.alpha(t) * x0 + self.std(t) * epsilon
        return self.alpha(t, x0) * x0 + self.std(t, x0) * epsilon

    def predict_x0(self, x_t: Tensor, epsilon: Tensor, t: int | Tensor) -> Tensor:
        """Return ``x_0 = (x_t - std epsilon) / alpha``, the inverse of `add_noise` for known noise."""
        if isinstance(t, int):
            return (x_t - self.std(t) * epsilon) / self.alpha(t)
        return (x_t - self.std(t, x_t) * epsilon) / self.alpha(t, x_t)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values from which `from_dict` builds exactly this schedule."""
        return dict(self.recipe) or {"kind": "table", "alphas_cumprod": self.alphas_cumprod.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NoiseSchedule":
        """Build the schedule that `to_dict` described.

        Raises:
            ValueError: The kind is unknown, or values are missing, unexpected or out of range.
        """
        arguments = dict(values)
        kind = arguments.pop("kind", None)
        try:
            if kind == "linear":
                return cls.linear(**arguments)
            if kind == "scaled_linear":
                return cls.scaled_linear(**arguments)
            if kind == "table":
                return cls(torch.tensor(arguments["alphas_cumprod"], dtype=torch.float64, device="cpu"))
        except (TypeError, KeyError) as error:
            raise ValueError(f"schedule of kind {kind!r} has missing or foreign values: {error}") from error
        raise ValueError(f"unknown schedule kind {kind!r}; expected 'linear', 'scaled_linear' or 'table'")

    def _coefficient(self, name: str, t: int | Tensor, like: Tensor | None) -> float | Tensor:
        if isinstance(t, int):
            if not 0 <= t < self.num_train_timesteps:
                raise ValueError(f"timestep must lie in [0, {self.num_train_timesteps - 1}], got {t}")
            return float(self._table(name)[t])
        if like is None:
            raise TypeError(f"{name}(t) with a tensor of timesteps also needs like=, the tensor to multiply")
        if t.ndim != 1 or len(t) != len(like):
            raise ValueError(f"timesteps must have shape ({len(like)},) like the batch, got {tuple(t.shape)}")
        # Rounded once, from float64 to the target dtype; cached, so that no step waits for a copy.
        key = (name, like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self._table(name).to(like.dtype).to(like.device)
        return self._tables[key][t].view(-1, *[1] * (like.ndim - 1))

    def _table(self, name: str) -> Tensor:
        squared_alpha = self.alphas_cumprod
        if name == "alpha":
            return squared_alpha.sqrt()
        if name == "std":
            return (1 - squared_alpha).sqrt()
        return (1 / squared_alpha - 1).sqrt()


def _recipe(kind: str, steps: int, beta_start: float, beta_end: float) -> dict[str, Any]:
    return {"kind": kind, "num_train_timesteps": steps, "beta_start": beta_start, "beta_end": beta_end}


def _check_betas(steps: int, beta_start: float, beta_end: float) -> None:
    if not 1 <= steps <= _MAX_TIMESTEPS:
        raise ValueError(f"num_train_timesteps must lie in [1, {_MAX_TIMESTEPS}], got {steps}")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"expected 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
