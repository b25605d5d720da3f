"""Masked training in a loop of your own: two changed lines, marked with # <--.

Run it: python examples/embed_masked_training.py [--max_train_steps 200]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from pecker_fast import BlockMask, apply_mask, compute_saliency


def make_data(count: int = 512) -> tuple[Tensor, Tensor]:
    """Noisy squares and crosses: something that a small network can learn in seconds."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (count,), generator=generator)
    images = 0.5 * torch.randn(count, 1, 12, 12, generator=generator)
    images[labels == 0, :, 3:9, 3:9] += 1.0
    images[labels == 1, :, 5:7, :] += 1.0
    return images, labels


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GroupNorm(8, 32),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64 * 36, 2),
    )


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def main(max_train_steps: int = 200) -> float:
    torch.manual_seed(0)
    images, labels = make_data()
    model = make_model()
    frozen_before = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    saliency = compute_saliency(model, loss_of, [(images[:128], labels[:128])], accumulate="square")
    mask = BlockMask.from_saliency(saliency, density=0.1, block="row")
    active = apply_mask(model, mask)  # <-- only the active blocks train
    optimizer = torch.optim.AdamW(active.parameters(), lr=3e-3, weight_decay=0.01)  # <-- any optimizer

    for step in range(max_train_steps):
        index = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        loss = loss_of(model, (images[index], labels[index]))
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    active.remove()  # an ordinary model again
    for name, weight in model.named_parameters():
        outside = ~mask.to_dense(name)
        assert torch.equal(weight[outside], frozen_before[name][outside]), name
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.3f} with {mask.density:.1%} of the weights trained; the others kept every bit")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=int, default=200)
    main(parser.parse_args().max_train_steps)
