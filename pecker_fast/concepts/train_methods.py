"""Parts of a text-to-image UNet by their names in the literature (ESD, Gandikota et al. 2023, arXiv 2303.07345)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

from pecker_fast.regions import Region
from pecker_fast.settings import one_of

TrainMethod: TypeAlias = Literal["full", "xattn", "noxattn", "selfattn"]
TRAIN_METHODS: tuple[TrainMethod, ...] = get_args(TrainMethod)
_NOT_NOXATTN = ("conv_norm_out.", "conv_out.", "time_embedding.")


def region_of(method: TrainMethod, names: Iterable[str]) -> Region:
    """The region of a mask that a name stands for.

    Args:
        method: "xattn" (cross-attention: attn2), "selfattn" (attn1), "noxattn" (all but cross-attention, and but the
            output layers and the time embedding, as ESD's code leaves them out; the added embedding of Stable
            Diffusion XL is in it) or "full".
        names: Names of the UNet's weights.

    Returns:
        "all", or prefixes of modules.

    Raises:
        ValueError: No such method, or the UNet has no such part.
    """
    one_of("train_method", method, TRAIN_METHODS)
    if method == "full":
        return "all"
    modules = dict.fromkeys(name.rpartition(".")[0] + "." for name in names)
    found = tuple(module for module in modules if _in(method, module))
    if not found:
        raise ValueError(f"train_method {method!r}: this UNet has no such weights; take 'full'")
    return found


def _in(method: TrainMethod, module: str) -> bool:
    if method == "noxattn":
        return ".attn2." not in module and not module.startswith(_NOT_NOXATTN)
    return (".attn2." if method == "xattn" else ".attn1.") in module
