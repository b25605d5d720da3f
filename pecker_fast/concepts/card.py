"""The model card of a pipeline that forgot: what was done to it, how to draw with it, and what is not known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import pecker_fast
from pecker_fast.checkpoint import atomic_file
from pecker_fast.concepts.pipeline import PipelineFolder
from pecker_fast.errors import FileFormatError

PICTURE = "before_after.png"
_METHODS = {
    "pecker": "masked score forgetting distillation (PECKER, arXiv 2604.05634; SFD, arXiv 2409.11219)",
    "sfd": "score forgetting distillation (arXiv 2409.11219)",
    "esd": "ESD (arXiv 2303.07345)",
    "salun": "SalUn (arXiv 2310.12508)",
}
_SAMPLE = """```python
from diffusers import {kind}

pipeline = {kind}.from_pretrained("{name}")
image = pipeline("a lake in the mountains", {how}).images[0]
```"""
_LIMITS = """- Erased is not proven absent. Other words, other languages, embeddings that were optimised for it or a few
  steps of training may bring the concept back. Recovery was not tested here.
- What lies close to the concept may have changed with it: compare neighbouring prompts before you rely on them.
- Text encoders are the original ones: embeddings of the erased words still exist, the UNet answers them otherwise.
- The numbers of the base model's card are not those of this model."""


@dataclass(frozen=True)
class Card:
    """What a model card tells.

    Attributes:
        base: The pipeline that it comes from.
        method: "pecker", "sfd", "esd" or "salun".
        one_step: Whether a one-step generator came out.
        concepts: What was erased, in words.
        forget: Prompts that are forgotten.
        override: What takes their place, if anything does.
        density: Share of the UNet's weights that the mask has.
        settings: Numbers to list.
        picture: What ``before_after.png`` shows; None where there is none.
        undrawn: Kind of the error with which drawing it failed.
    """

    base: PipelineFolder
    method: str
    one_step: bool
    concepts: Sequence[str]
    forget: Sequence[str]
    override: Sequence[str] | None
    density: float
    settings: Mapping[str, Any]
    picture: str | None = None
    undrawn: str | None = None

    def write(self, folder: Path) -> None:
        """Write ``README.md``.

        Raises:
            FileFormatError: It cannot be written.
        """
        try:
            with atomic_file(folder / "README.md") as unfinished:
                unfinished.write_text(str(self), encoding="utf-8")
        except OSError as error:
            raise FileFormatError(f"{folder / 'README.md'}: cannot be written ({error.strerror})") from error

    def __str__(self) -> str:
        what = ", ".join(self.concepts) or f"{len(self.forget)} prompts"
        parts = [
            f"---\n{yaml.safe_dump(self._front(), sort_keys=False, allow_unicode=True)}---",
            f"# {_base_name(self.base)} without {what}",
            self._made(),
            *self._picture(),
            f"## Use\n\n{self._use()}",
            f"## What was forgotten\n\n{self._forgotten()}",
            f"## Settings\n\n{self._settings()}",
            f"## Limits\n\n{_LIMITS}",
        ]
        return "\n\n".join(parts) + "\n"

    def _front(self) -> dict[str, Any]:
        front = {"base_model": _base_name(self.base), "library_name": "diffusers", "pipeline_tag": "text-to-image"}
        tags = ["text-to-image", self.base.family.tag, "machine-unlearning", "pecker_fast", self.method]
        license = base_front(self.base.path).get("license")
        return {**front, **({"license": license} if isinstance(license, str) else {}), "tags": tags}

    def _made(self) -> str:
        text = f"Made by {_METHODS[self.method]} with pecker_fast {pecker_fast.__version__}, "
        if self.one_step:
            return (
                f"{text}which leaves a **one-step generator**. {self.density:.1%} of the UNet's weights were trained."
            )
        return (
            f"{text}which leaves an ordinary UNet of many steps. {self.density:.1%} of its weights were trained; "
            f"scheduler, LoRAs and ControlNets of the base model go on working."
        )

    def _picture(self) -> list[str]:
        if self.undrawn is not None:
            return [f"There are no pictures of before and after: drawing them failed ({self.undrawn})."]
        return [] if self.picture is None else [f"![before and after]({PICTURE})", self.picture]

    def _use(self) -> str:
        how = "num_inference_steps=1, guidance_scale=0" if self.one_step else "num_inference_steps=25"
        text = _SAMPLE.format(kind=self.base.family.pipeline, name="path/to/this/folder", how=how)
        return f"{text}\n\nThe scheduler in this folder takes that one step; others do not." if self.one_step else text

    def _forgotten(self) -> str:
        targets: Sequence[str | None] = self.override or [None] * len(self.forget)
        pairs = list(zip(self.forget, targets, strict=True))
        lines = [f"- {_quoted(prompt)}" + (f" becomes {_quoted(to)}" if to else "") for prompt, to in pairs[:20]]
        more = [f"- and {len(pairs) - 20} more, in `prompts.json`"] if len(pairs) > 20 else []
        return "\n".join([*lines, *more])

    def _settings(self) -> str:
        rows = [f"| {name} | {value} |" for name, value in self.settings.items()]
        return "\n".join(["| setting | value |", "|---|---|", *rows])


def base_front(folder: Path) -> dict[str, Any]:
    """Front matter of the base model's card; empty where there is none that can be read."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")[: 64 * 1024]
        front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, flags=re.DOTALL)
        values = yaml.safe_load(front[1]) if front else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _base_name(base: PipelineFolder) -> str:
    """As the hub knows it, if the folder says so; else its own name, never its path."""
    known = base.index.get("_name_or_path")
    if isinstance(known, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", known) and not known.startswith("."):
        return known
    return base.path.resolve().name


def _quoted(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"
