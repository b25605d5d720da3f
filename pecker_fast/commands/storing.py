"""How a command's flags say that weights are stored."""

from __future__ import annotations

import argparse
from typing import Any

import torch


def storage_of(options: argparse.Namespace) -> dict[str, Any]:
    """``dtype`` and ``max_shard_size`` of `pecker_fast.models.save`."""
    dtype = None if options.save_dtype is None else getattr(torch, options.save_dtype)
    return {"dtype": dtype, "max_shard_size": options.max_shard_size}
