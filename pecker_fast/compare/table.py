"""A table of text, and how numbers are written in it."""

from __future__ import annotations

from dataclasses import dataclass

from pecker_fast.compare.statistics import Interval


@dataclass(frozen=True)
class Table:
    """Text, ready to be laid out.

    Attributes:
        title: What it is about.
        head: Column names.
        rows: Cells.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As GitHub lays it out."""
        lines = [self.head, tuple("---" for _ in self.head), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def text(self) -> str:
        """Columns aligned, for the terminal."""
        widths = [max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))]
        lines = (
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True))
            )
            for r in (self.head, *self.rows)
        )
        return "\n".join(line.rstrip() for line in lines)


def plain(interval: Interval | None) -> str:
    """Three digits."""
    return _mean(interval, "{:.3g}")


def share(interval: Interval | None) -> str:
    """A share as a percentage."""
    return _mean(interval, "{:.1f}%", 100)


def points(interval: Interval | None) -> str:
    """A difference of shares."""
    return _mean(interval, "{:+.1f}", 100)


def _mean(interval: Interval | None, form: str, scale: float = 1) -> str:
    """A mean and half the width of its interval."""
    if interval is None:
        return "failed"
    value = form.format(scale * interval.value)
    if interval.low is None or interval.high is None:
        return value
    half = (
        form.replace("+", "").replace("%", "").replace(".3g", ".2g").format(scale * (interval.high - interval.low) / 2)
    )
    return f"{value} ± {half}"


def times(interval: Interval | None) -> str:
    """A ratio and its bounds, which are not as far from it on both sides."""
    if interval is None:
        return "failed"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.2f}x"
    return f"{interval.value:.2f}x ({interval.low:.2f} to {interval.high:.2f})"
