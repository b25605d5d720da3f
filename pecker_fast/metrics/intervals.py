"""How sure one can be of a mean over few runs: Student's interval, with no scipy at run time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pecker_fast.errors import NonFiniteError

_TINY = 1e-300


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean of independent values and its confidence interval by Student's t.

    ``mean +- t s / sqrt(n)``, with s of divisor ``n - 1`` and t of ``n - 1`` degrees of freedom. It is exact for
    normal values, and for a handful of seeds much wider than the normal interval: rightly so.

    Args:
        values: One value a run, at least one.
        level: Confidence, in (0, 1).

    Returns:
        Mean, lower and upper bound; the bounds are None for a single value, which says nothing about its spread.

    Raises:
        ValueError: There is no value, or the level is out of range.
        NonFiniteError: A value is NaN or infinite.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("values are empty; a mean needs at least one")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if not all(map(math.isfinite, numbers)):
        raise NonFiniteError(f"values hold NaN or infinite entries: {numbers}; leave out the runs that failed")
    count = len(numbers)
    mean = math.fsum(numbers) / count
    if count == 1:
        return mean, None, None
    variance = math.fsum((number - mean) ** 2 for number in numbers) / (count - 1)
    radius = student_t_quantile(0.5 + level / 2, count - 1) * math.sqrt(variance / count)
    return mean, mean - radius, mean + radius


def student_t_quantile(p: float, degrees: int) -> float:
    """The value that Student's t with ``degrees`` degrees of freedom stays below with probability ``p``.

    Equals ``scipy.stats.t.ppf(p, degrees)``.

    Raises:
        ValueError: ``p`` is not in (0, 1), or there are no degrees of freedom.
    """
    if not 0.0 < p < 1.0 or degrees < 1:
        raise ValueError(f"expected p in (0, 1) and degrees of at least 1, got {p} and {degrees}")
    if p < 0.5:
        return -student_t_quantile(1.0 - p, degrees)
    outside = 2.0 * (1.0 - p)
    high = 1.0
    while _two_sided_tail(high, degrees) > outside:
        high *= 2.0
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _two_sided_tail(middle, degrees) > outside else (low, middle)
    return low


def _two_sided_tail(t: float, degrees: int) -> float:
    """Probability that ``|T| > t``."""
    # Both arguments: one of them alone loses its digits near 1.
    return _incomplete_beta(degrees / (degrees + t * t), t * t / (degrees + t * t), degrees / 2, 0.5)


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """Regularized incomplete beta function ``I_x(a, b)``, with ``rest = 1 - x``."""
    if x > (a + 1) / (a + b + 2):  # where its continued fraction converges slowly
        return 1.0 - _incomplete_beta(rest, x, b, a)
    if x == 0.0:
        return 0.0
    log_front = a * math.log(x) + b * math.log(rest) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / (a * _continued_fraction(x, a, b))


def _continued_fraction(x: float, a: float, b: float) -> float:
    """``1 + d_1 / (1 + d_2 / (1 + ...))`` of the incomplete beta function (NIST DLMF 8.17.22), by Lentz's method."""
    value, c, d = 1.0, 1.0, 0.0
    step, change = 0, math.inf
    while abs(change - 1.0) > 1e-15:
        step += 1
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / _nonzero(1.0 + term * d)
        c = _nonzero(1.0 + term / c)
        change = c * d
        value *= change
    return value


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
