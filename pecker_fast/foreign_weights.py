"""Weights of other people's files: names without the wrappers of a training loop, and numbers that can be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pecker_fast.errors import FileFormatError

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that torch.compile, FSDP and activation checkpointing put in anywhere; no layer is called so."""
MODULE = "module"
"""What (Distributed)DataParallel and AveragedModel put before all names; within a name it may be a layer's own."""
_COUNTER = "n_averaged"
"""Of AveragedModel, beside the weights."""
_PLAIN = {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"}
_PLAIN |= {"float64", "float32", "float16", "bfloat16", "int64", "int32", "bool"}
"""Dtypes of weights and buffers as safetensors and torch call them; others hold quantized or packed numbers."""


def unwrapped(where: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the names that the network itself has, whatever wrappers it was saved in, in whatever order.

    Args:
        where: What to call them in messages.
        weights: Name -> anything.

    Raises:
        FileFormatError: Two names become one.
    """
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in weights}
    prefix = f"{MODULE}."
    while (inner := {name for name, own in names.items() if own != _COUNTER}) and all(
        names[name].startswith(prefix) for name in inner
    ):
        names = {name: names[name].removeprefix(prefix) for name in inner}
    own = {name: weights[given] for given, name in names.items()}
    if len(own) < len(names):
        first = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise FileFormatError(f"{where}: holds {first} twice, with and without the name of a wrapper; save it again")
    return own


def check_names(where: str, names: Iterable[str]) -> None:
    """Refuse names of a wrapped network where a library other than ours reads them too, and would not find its own.

    Raises:
        FileFormatError: They are; the first is named.
    """
    given = dict.fromkeys(names, 0)
    own = unwrapped(where, given)
    if wrapped := next((name for name in given if name not in own), None):
        raise FileFormatError(
            f"{where}: {wrapped} has the name of a wrapper in it (torch.compile, FSDP or data parallelism), which "
            f"diffusers does not find; save the network within the wrapper: unwrapped.save_pretrained(folder), with "
            f"unwrapped = model._orig_mod or model.module"
        )


def check_dtypes(where: str, dtypes: Mapping[str, str | torch.dtype]) -> None:
    """Refuse quantized weights: no gradient fits them, and a delta is of the bits that a model really has.

    Args:
        where: What to call them in messages.
        dtypes: Name -> dtype, as safetensors' headers or torch call it.

    Raises:
        FileFormatError: There are some; the first is named.
    """
    packed = [name for name, dtype in dtypes.items() if str(dtype).removeprefix("torch.") not in _PLAIN]
    if packed:
        raise FileFormatError(
            f"{where}: {packed[0]} is stored as {dtypes[packed[0]]}, as {len(packed)} of {len(dtypes)} tensors are: "
            f"quantized; expected float32, float16 or bfloat16. Take the model's original weights (of plain 8-bit "
            f"floats without scales also from_pretrained(folder, torch_dtype=torch.float16).save_pretrained(new)), "
            f"and quantize the result"
        )


def check_finite(where: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are NaN or infinite: whatever is trained or drawn from them is too.

    Raises:
        FileFormatError: Some are; the first tensor is named, with how many of its values.
    """
    for name, tensor in weights:
        values = tensor.float() if tensor.element_size() == 1 else tensor  # torch has few functions of 8-bit floats
        if tensor.is_floating_point() and not _all_finite(values):
            bad = int((~values.isfinite()).sum())
            raise FileFormatError(
                f"{where}: {name} has {bad} of {tensor.numel()} values NaN or infinite; the file is damaged, or what "
                f"trained it diverged: take another copy"
            )


def check_weights(where: str, weights: Mapping[str, Tensor]) -> None:
    """Refuse what `check_dtypes` and `check_finite` refuse.

    Raises:
        FileFormatError: As they do.
    """
    check_dtypes(where, {name: tensor.dtype for name, tensor in weights.items()})
    check_finite(where, weights.items())


def check_network(where: str, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not floating-point numbers of one dtype, and what `check_weights` refuses.

    Raises:
        FileFormatError: They are not.
    """
    check_weights(where, weights)
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise FileFormatError(f"{where}: expected weights of one floating-point dtype, got {sorted(map(str, dtypes))}")


def check_files(files: Iterable[Path]) -> None:
    """Refuse safetensors files that diffusers and transformers would load in silence, and draw noise or nothing from.

    Those with a wrapper's names, with packed integers, or with values that are NaN or infinite. 8-bit floats are read
    as the numbers that they are.

    Raises:
        FileFormatError: One is such, or cannot be read.
    """
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                names = list(stored.keys())
                dtypes = {name: stored.get_slice(name).get_dtype() for name in names}
                check_dtypes(str(file), {name: kind for name, kind in dtypes.items() if not kind.startswith("F8")})
                check_names(str(file), names)
                check_finite(str(file), ((name, stored.get_tensor(name)) for name in names))
        except (OSError, SafetensorError) as error:
            raise FileFormatError(f"{file}: truncated or not a safetensors file ({error})") from error


def _all_finite(tensor: Tensor) -> bool:
    """By smallest and largest value, which NaN passes on to: nothing of the tensor's size is made for it."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())
