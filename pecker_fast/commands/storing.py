"""How a command's flags say that weights are stored."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from pecker_fast.models.storage import WEIGHTS_NAME


def weights_name(options: argparse.Namespace) -> str:
    """The file of weights, or a pattern for several."""
    return WEIGHTS_NAME if options.max_shard_size is None else f"{Path(WEIGHTS_NAME).stem}*"


def storage_of(options: argparse.Namespace) -> dict[str, Any]:
    """``dtype`` and ``max_shard_size`` of `pecker_fast.models.save`."""
    dtype = None if options.save_dtype is None else getattr(torch, options.save_dtype)
    return {"dtype": dtype, "max_shard_size": options.max_shard_size}
