"""Regions of a UNet: the way down, the middle and the way up, by the names of their weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

Region: TypeAlias = Literal["all", "encoder", "middle", "decoder"] | tuple[str, ...]
"""The whole model, a part of a UNet, or all weights whose names begin with one of these, as ("up.0.", "norm_out.")."""

PREFIXES: dict[str, tuple[str, ...]] = {
    "encoder": ("conv_in.", "down.", "down_blocks."),
    "middle": ("mid.", "mid_block."),
    "decoder": ("up.", "up_blocks.", "norm_out.", "conv_norm_out.", "conv_out."),
}
"""Of ``DDPMUNet`` and of diffusers' UNets. Their embeddings, which serve every part, belong to none of them."""


def in_region(names: Iterable[str], region: Region) -> frozenset[str]:
    """Those names of weights that lie in a region.

    In plain Python: ``{name for name in names if name.startswith(prefixes)}``.

    Args:
        names: Names of a model's weights.
        region: "all", a part of a UNet, or prefixes of names.

    Raises:
        ValueError: ``region`` is none of these, no weight lies in it, or one of its prefixes begins no name.
    """
    check_region(region)
    names = tuple(names)
    if region == "all":
        return frozenset(names)
    wanted = PREFIXES[region] if isinstance(region, str) else region
    found = {prefix: [name for name in names if name.startswith(prefix)] for prefix in wanted}
    missing = [prefix for prefix in wanted if not found[prefix]]
    if isinstance(region, tuple) and missing:
        raise ValueError(f"region: no weight's name begins with {missing[0]!r}; {_has(names)}")
    if len(missing) == len(wanted):
        raise ValueError(f"region: no weight lies in the {region}; {_has(names)}")
    return frozenset(name for members in found.values() for name in members)


def check_region(region: object) -> None:
    """Refuse anything that is not a region of any model.

    Raises:
        ValueError: It is neither "all", "encoder", "middle" or "decoder" nor a tuple of prefixes.
    """
    named = isinstance(region, str) and region in ("all", *PREFIXES)
    prefixes = isinstance(region, tuple) and region and all(isinstance(prefix, str) and prefix for prefix in region)
    if not (named or prefixes):
        raise ValueError(
            f"region: expected 'all', {', '.join(map(repr, PREFIXES))} or a tuple of prefixes of weight names, as "
            f"('up.0.', 'norm_out.'), got {region!r}"
        )


def _has(names: tuple[str, ...]) -> str:
    """What could have been asked for instead."""
    regions = [region for region, prefixes in PREFIXES.items() if any(name.startswith(prefixes) for name in names)]
    begin = list(dict.fromkeys("".join(name.partition(".")[:2]) for name in names))
    shown = ", ".join(begin[:8]) + (", ..." if len(begin) > 8 else "")
    return f"this model has {', '.join(regions) or 'no region with a name'}, and names that begin with {shown}"
