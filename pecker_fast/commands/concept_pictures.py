"""What ``pecker-fast evaluate`` keeps of a pipeline's images: a grid of the first ones, and each as PNG if asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pecker_fast.commands.files import write_images
from pecker_fast.detectors import Pixels
from pecker_fast.prompt_files import PromptSet

GRID = "before_after.png"
_COLUMNS = 8


class ConceptPictures:
    """Takes images as they are drawn.

    The grid has two rows a set, before above after (one row without an original), of up to eight prompts evenly spaced.
    """

    def __init__(self, folder: Path, prompt_sets: Mapping[str, PromptSet], save_images: bool) -> None:
        """Plan the grid, and make the folders that images go to.

        Args:
            folder: Where everything goes.
            prompt_sets: In the order in which they are drawn.
            save_images: Whether each image is written, as ``images/before/concept-00012.png``.
        """
        self._folder, self._save = folder, save_images
        counts = {name: len(chosen.prompts) for name, chosen in prompt_sets.items()}
        self._names = [f"{name}-{index:05d}.png" for name, count in counts.items() for index in range(count)]
        self._rows: list[list[int]] = []
        start = 0
        for count in counts.values():
            self._rows.append((start + np.linspace(0, count - 1, min(_COLUMNS, count)).astype(int)).tolist())
            start += count
        self._kept: dict[str, dict[int, Pixels]] = {}

    def add(self, side: str, positions: list[int], images: Pixels) -> None:
        """Keep what the grid shows, and write what is to be written."""
        wanted = {position for row in self._rows for position in row}
        kept = self._kept.setdefault(side, {})
        kept |= {position: image for position, image in zip(positions, images, strict=True) if position in wanted}
        if self._save:
            from PIL import Image  # diffusers brings it along

            folder = self._folder / "images" / side
            folder.mkdir(parents=True, exist_ok=True)
            for position, image in zip(positions, images, strict=True):
                Image.fromarray(image).save(folder / self._names[position])

    def write(self) -> None:
        """Write the grid.

        Raises:
            FileFormatError: It cannot be written.
        """
        sides = [side for side in ("before", "after") if side in self._kept]
        columns = max(map(len, self._rows))
        shown: list[Pixels] = []
        for row in self._rows:
            for side in sides:
                found = [self._kept[side][position] for position in row]
                shown += found + [np.full_like(found[0], 255)] * (columns - len(row))
        images = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float() / 127.5 - 1
        write_images(self._folder / GRID, images, torch.zeros(len(shown), device="cpu"), columns)
