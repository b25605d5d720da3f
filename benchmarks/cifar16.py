"""CIFAR-10 made small enough for a CPU: some of its classes at 16 x 16, as npz files that ``load_dataset`` reads.

python benchmarks/cifar16.py CIFAR10_DIR OUT [CLASS...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pecker_fast.data import ImageData, load_dataset, write_npz

CLASSES = ("airplane", "automobile", "frog", "horse")
"""Of ten, so that a small network can tell them apart and draw them."""


def main(source: str, out: str, *names: str) -> None:
    """Write OUT/train.npz and OUT/test.npz."""
    chosen, folder = names or CLASSES, Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        data = load_dataset(source, image_size=16, split=split)  # type: ignore[arg-type]
        labels = [data.class_names.index(name) for name in chosen]
        kept = torch.isin(data.labels, torch.tensor(labels))
        place = torch.full((len(data.class_names),), -1)
        place[torch.tensor(labels)] = torch.arange(len(labels))
        write_npz(ImageData(data.images[kept], place[data.labels[kept]], tuple(chosen)), folder / f"{split}.npz")
        print(f"{folder / f'{split}.npz'}: {int(kept.sum())} images of {', '.join(chosen)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
