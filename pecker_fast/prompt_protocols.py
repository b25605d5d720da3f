"""Evaluation protocols, prompts times seeds, as YAML files: those of the package, and anybody's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pecker_fast import config_file
from pecker_fast.checkpoint import StrPath
from pecker_fast.errors import FileFormatError
from pecker_fast.prompt_files import EvaluationPrompt, check_prompt
from pecker_fast.prompt_text import tidy

FOLDER = Path(__file__).parent / "concepts" / "protocols"
PLACE = "{concept}"
_REQUIRED = ("name", "source", "templates", "seeds")
_KNOWN = (*_REQUIRED, "concept", "neighbours", "guidance_scale", "num_inference_steps")
_MAX_SEEDS = 10_000


@dataclass(frozen=True)
class Protocol:
    """Templates and seeds.

    Attributes:
        name: What it is called.
        source: Whose evaluation it has the shape of, and whose words these are.
        templates: Texts with ``{concept}``.
        seeds: Of the noise; each template is drawn with each.
        concept: What takes the place of ``{concept}`` if nothing else is said.
        neighbours: Related concepts, if it knows any for every concept.
        guidance_scale: Of classifier-free guidance; None leaves it to the model.
        num_inference_steps: Of the sampler; None leaves it to the model.
        sha256: Of the file.
    """

    name: str
    source: str
    templates: tuple[str, ...]
    seeds: tuple[int, ...]
    concept: str | None
    neighbours: tuple[str, ...]
    guidance_scale: float | None
    num_inference_steps: int | None
    sha256: str

    def prompts(self, concept: str, label: int | None = None) -> tuple[EvaluationPrompt, ...]:
        """Every template with every seed, template after template: ``len(templates) * len(seeds)`` of them.

        Raises:
            ValueError: The concept is empty.
        """
        concept = tidy(concept)
        if not concept:
            raise ValueError("concept: expected a text, got an empty one")
        texts = [template.replace(PLACE, concept) for template in self.templates]
        return tuple(
            EvaluationPrompt(text, seed, self.guidance_scale, concept, label) for text in texts for seed in self.seeds
        )


def protocol_names() -> tuple[str, ...]:
    """Protocols that the package brings along."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def read_protocol(name: StrPath) -> Protocol:
    """Read one of the package's protocols by its name, or any by the path of its YAML file.

    Raises:
        FileFormatError: There is none, or the file is malformed.
    """
    path = Path(name)
    if path.suffix != ".yaml":
        if str(name) not in protocol_names():
            raise FileFormatError(f"{name}: expected one of {', '.join(protocol_names())}, or a .yaml file")
        path = FOLDER / f"{name}.yaml"
    values = config_file.read(path)
    _check_keys(path, values)
    protocol = Protocol(
        name=check_prompt(f"{path}: name", values["name"]),
        source=check_prompt(f"{path}: source", values["source"]),
        templates=_texts(path, "templates", values["templates"]),
        seeds=_seeds(path, values["seeds"]),
        concept=None if "concept" not in values else check_prompt(f"{path}: concept", values["concept"]),
        neighbours=_texts(path, "neighbours", values.get("neighbours", [])),
        guidance_scale=_number(path, values, "guidance_scale", float, 0.0),
        num_inference_steps=_number(path, values, "num_inference_steps", int, 1),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    _check_templates(path, protocol)
    return protocol


def _check_keys(path: Path, values: Mapping[str, Any]) -> None:
    for key in _REQUIRED:
        if key not in values:
            raise FileFormatError(f"{path}: expected the key {key}")
    for key in values:
        if key not in _KNOWN:
            raise FileFormatError(f"{path}: unknown key {key[:60]!r}; expected {', '.join(_KNOWN)}")


def _check_templates(path: Path, protocol: Protocol) -> None:
    if not protocol.templates:
        raise FileFormatError(f"{path}: templates: expected at least one text")
    for template in protocol.templates:
        if PLACE not in template:
            raise FileFormatError(f"{path}: templates: expected {PLACE} in each, got {template[:60]!r}")


def _texts(path: Path, key: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise FileFormatError(f"{path}: {key}: expected a list of texts, got {type(values).__name__}")
    return tuple(check_prompt(f"{path}: {key}[{index}]", value) for index, value in enumerate(values))


def _seeds(path: Path, value: object) -> tuple[int, ...]:
    """N says 0 to N - 1."""
    if type(value) is int and 1 <= value <= _MAX_SEEDS:
        return tuple(range(value))
    if isinstance(value, list) and value and all(type(seed) is int and 0 <= seed < 2**63 for seed in value):
        return tuple(value)
    raise FileFormatError(
        f"{path}: seeds: expected how many (at most {_MAX_SEEDS}), or a list of integers from 0, got {str(value)[:60]}"
    )


def _number(path: Path, values: Mapping[str, Any], key: str, kind: type, least: float) -> Any:
    if key not in values:
        return None
    value = values[key]
    if type(value) not in (int, kind) or not least <= value <= 1000:
        raise FileFormatError(f"{path}: {key}: expected a number from {least} to 1000, got {str(value)[:60]}")
    return kind(value)
