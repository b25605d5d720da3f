"""Weights in several safetensors files of a bounded size, with the index file that diffusers and Hugging Face read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast.checkpoint import read_json, read_safetensors, write_json, write_safetensors
from pecker_fast.errors import FileFormatError

INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
_PIECE = "diffusion_pytorch_model-{:05}-of-{:05}.safetensors"
_PIECES = re.compile(r"diffusion_pytorch_model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_HEAD, _ENTRY = 256, 192
"""Bytes of a file, and of each tensor's entry in it, that are not numbers: at most."""


def divide(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Tensors in their order, in as few consecutive groups as fit into files of ``max_bytes``.

    Raises:
        ValueError: One tensor alone is too large.
    """
    groups: list[dict[str, Tensor]] = [{}]
    used = _HEAD
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() + len(name) + _ENTRY
        if _HEAD + size > max_bytes:
            raise ValueError(
                f"max_shard_size: expected at least {_HEAD + size} bytes, for {name} alone, got {max_bytes}"
            )
        if used + size > max_bytes:
            groups.append({})
            used = _HEAD
        groups[-1][name] = tensor
        used += size
    return groups


def rounded(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights with floating-point ones in another dtype.

    Raises:
        ValueError: One is beyond its range.
    """
    found = {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()}
    for name, weight in weights.items():
        if not torch.equal(weight.isfinite(), found[name].isfinite()):
            raise ValueError(f"dtype: {name} goes up to {float(weight.abs().max()):.3g}, beyond what {dtype} can hold")
    return found


def write_shards(folder: Path, groups: list[dict[str, Tensor]], header: Mapping[str, str]) -> None:
    """Write one file a group and the index, into an existing folder.

    Raises:
        FileFormatError: A file cannot be written.
    """
    files = [_PIECE.format(number, len(groups)) for number in range(1, len(groups) + 1)]
    for file, group in zip(files, groups, strict=True):
        write_safetensors(folder / file, group, header)
    index = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": _bytes(*groups)}, "weight_map": index})


def pieces(folder: Path) -> dict[str, set[str]]:
    """Files of weights that the index of ``folder`` lists, each with the names of its tensors.

    Raises:
        FileFormatError: The index is missing or damaged, or names a file elsewhere.
    """
    path = folder / INDEX_NAME
    return _listed(path, read_json(path).get("weight_map"))


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Read all tensors that the index of ``folder`` lists.

    Raises:
        FileFormatError: The index or a file is missing or damaged, they contradict each other, or the index names
            a file elsewhere.
    """
    path = folder / INDEX_NAME
    index = read_json(path)
    tensors: dict[str, Tensor] = {}
    listed = _listed(path, index.get("weight_map"))
    for file, names in listed.items():
        found, _ = read_safetensors(folder / file)
        if differing := sorted(found.keys() ^ names):
            raise FileFormatError(
                f"{folder / file}: does not hold what {INDEX_NAME} lists ({len(differing)} tensors differ, first: "
                f"{differing[0]}); take all files from one place"
            )
        tensors |= found
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != _bytes(tensors):
        raise FileFormatError(f"{path}: total_size is {total!r}, its files hold {_bytes(tensors)} bytes")
    return tensors


def _listed(path: Path, weight_map: Any) -> dict[str, set[str]]:
    """File -> names of its tensors."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(f"{path}: weight_map is missing or empty; expected the file of every tensor")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _PIECES.fullmatch(file):
            raise FileFormatError(f"{path}: {name} is said to be in {file!r:.80}, expected {_PIECE.format(1, 2)} or so")
        listed.setdefault(file, set()).add(name)
    return listed


def _bytes(*groups: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())
