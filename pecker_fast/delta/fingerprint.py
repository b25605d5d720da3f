"""Fingerprints of weights that add up: of all of them = of some blocks + of the rest.

Every 32-bit word of a weight is hashed together with its position and the weight's name, and the hashes are summed
modulo 2**64. Because the sum can be split, what a delta does to the fingerprint of a whole model is one number,
``after - before`` of the blocks that it touches. They tell a wrong base or damage, not an adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pecker_fast.blocks import ParameterMask

MODULUS = 2**64
_CHUNKS = {"cpu": 1 << 16}  # words at a time: what stays in a core's cache
_CHUNK = 1 << 22
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - MODULUS), (27, 0x94D049BB133111EB - MODULUS), (31, 1))
_SHOW_AFTER = 2.0  # seconds of work before a progress bar is worth its line


class Fingerprints(NamedTuple):
    """What a delta knows about its base: the blocks it touches, before and after, and everything else."""

    before: int
    after: int
    rest: int


def layout(tensor: Tensor) -> str:
    """Kind and shape of a tensor as text: "float32 (64, 3, 3, 3)"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def flat_bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers, flattened in C order whatever its memory layout; a copy where it must be."""
    flat = tensor.detach().reshape(-1).contiguous()
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return flat.view(kinds.get(flat.element_size(), torch.int64))


def fingerprint(name: str, tensor: Tensor, positions: Tensor | None = None) -> int:
    """Fingerprint of one weight, or of its elements at ``positions``.

    Plain torch: ``sum(mix(key(name) ^ (position << 32 | word)))`` modulo 2**64 over its 32-bit words, where ``mix``
    is the finalizer of splitmix64 and ``position`` counts words in C order (of elements that are narrower, elements).

    Args:
        name: Of the weight; part of the hash, as are dtype and shape.
        tensor: The weight, any dtype, layout and device.
        positions: int64 (n,), in the flattened weight; None takes all.

    Returns:
        An integer in [0, 2**64).
    """
    bits = flat_bits(tensor)
    if positions is not None:
        positions = positions.to(bits.device)
        bits = bits[positions]
    key = int.from_bytes(hashlib.sha256(f"{name}\0{layout(tensor)}".encode()).digest()[:8], "little", signed=True)
    return _hash_sum(key, bits, positions) % MODULUS


def fingerprint_blocks(state: Mapping[str, Tensor], parameters: Mapping[str, ParameterMask]) -> int:
    """Fingerprint of the active blocks of every masked weight together."""
    return sum(fingerprint(name, state[name], mask.index()) for name, mask in parameters.items()) % MODULUS


def fingerprint_all(state: Mapping[str, Tensor], progress: bool = True) -> int:
    """Fingerprint of all tensors together; a bar appears only where it takes seconds."""
    bar = tqdm(state.items(), "fingerprint", leave=False, disable=not progress, delay=_SHOW_AFTER)
    return sum(fingerprint(name, tensor) for name, tensor in bar) % MODULUS


def _hash_sum(key: int, bits: Tensor, positions: Tensor | None) -> int:
    per_element = max(1, bits.element_size() // 4)
    words = bits.view(torch.int32) if per_element > 1 else bits
    if positions is not None and per_element > 1:
        positions = (positions[:, None] * per_element + torch.arange(per_element, device=bits.device)).flatten()
    unsigned = 2 ** (8 * words.element_size()) - 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    chunk = _CHUNKS.get(bits.device.type, _CHUNK)
    for start in range(0, len(words), chunk):
        x = words[start : start + chunk].to(torch.int64).bitwise_and_(unsigned)
        if positions is None:
            where = torch.arange(start, start + len(x), device=bits.device)
        else:
            where = positions[start : start + chunk]
        total += _mix(x.bitwise_xor_(where << 32).bitwise_xor_(key)).sum()
    return int(total)


def _mix(x: Tensor) -> Tensor:
    """Splitmix64's finalizer, in place; torch shifts int64 with the sign, so that the copies of it are cut off."""
    for shift, factor in _ROUNDS:
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    return x
