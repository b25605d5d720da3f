"""Where a method starts: the model as it is, or the same architecture with initial weights."""

from __future__ import annotations

import torch
from torch import nn

from pecker_fast.apply import dense_copy
from pecker_fast.baselines.config import BaselineConfig
from pecker_fast.models import DDPMUNet
from pecker_fast.pretrain import seeded


def starting_network(model: nn.Module, config: BaselineConfig, fresh: nn.Module | None) -> nn.Module:
    """A dense copy of ``model``; for "retrain" with the weights of ``fresh``, or initial ones by ``config.seed``.

    Raises:
        ValueError: A fresh network for another method, one of another architecture, or a model that cannot be built
            again.
    """
    share = config.share_frozen_weights and config.method != "retrain"  # which loads other weights
    network = dense_copy(model, share=share).requires_grad_(True)
    if config.method != "retrain":
        if fresh is not None:
            raise ValueError(f"fresh: only 'retrain' starts from another network, the method is {config.method!r}")
        return network
    weights = (_initialised(model, config.seed) if fresh is None else dense_copy(fresh)).state_dict()
    if {name: tensor.shape for name, tensor in weights.items()} != {
        n: w.shape for n, w in network.state_dict().items()
    }:
        raise ValueError("fresh: expected the model's weights by name and shape, got another architecture")
    network.load_state_dict(weights)  # which keeps the model's device, dtype and memory order
    return network


def _initialised(model: nn.Module, seed: int) -> nn.Module:
    if type(model) is not DDPMUNet:
        raise ValueError(
            f"Baseline: 'retrain' cannot build {type(model).__name__} again, only DDPMUNet; give a network with "
            f"initial weights as fresh="
        )
    with seeded(seed, torch.device("cpu")):
        return DDPMUNet(**model.config)
