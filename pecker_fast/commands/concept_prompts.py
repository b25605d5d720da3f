"""Which prompts ``pecker-fast evaluate`` draws from a pipeline: the concept's, its neighbours', and unrelated ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pecker_fast.commands.classes import classes_at
from pecker_fast.concept_evaluation import CONCEPT, NEIGHBOURS
from pecker_fast.prompt_files import EvaluationPrompt, PromptSet, read_prompts, with_seeds
from pecker_fast.prompt_protocols import Protocol, read_protocol
from pecker_fast.prompt_text import (
    contains,
    looks_like_several,
    normal,
    replace_concepts,
    split_concepts,
    tidy,
    warn_of_one,
)

UNRELATED = "unrelated"
_SEEDS = 4


def prompt_sets(options: argparse.Namespace) -> tuple[dict[str, PromptSet], Protocol | None]:
    """The sets that the flags ask for, and the protocol if there is one.

    Raises:
        FileFormatError: A file is missing or malformed.
        ValueError: Nothing says what to draw, or no neighbours are named.
    """
    if (options.protocol is None) == (options.prompts is None):
        raise ValueError("expected either --protocol or --prompts: what is drawn of the concept")
    if options.neighbour_concepts and options.neighbour_prompts:
        raise ValueError("--neighbour_prompts: say the same as --neighbour_concepts; give one of them")
    protocol = None if options.protocol is None else read_protocol(options.protocol)
    sets = _of_protocol(options, protocol) if protocol else _of_file(options)
    if options.neighbour_prompts is not None:
        sets[NEIGHBOURS] = _seeded(_read(options.neighbour_prompts, options), _seeds(options, protocol))
    if NEIGHBOURS not in sets:
        raise ValueError(
            "--neighbour_concepts: expected related concepts, such as other people (or a file, --neighbour_prompts): "
            "what erasing did to them is always measured"
        )
    if options.unrelated_prompts is not None:
        sets[UNRELATED] = _once_each(_read(options.unrelated_prompts, options))
    return sets, protocol


def _of_protocol(options: argparse.Namespace, protocol: Protocol) -> dict[str, PromptSet]:
    concept = _concept(options) or protocol.concept
    if concept is None:
        raise ValueError(f"--concept: expected what was erased, which takes its place in the protocol {protocol.name}")
    if options.seeds is not None:
        protocol = replace(protocol, seeds=tuple(range(options.seeds)))
    found = {CONCEPT: _set(protocol, protocol.prompts(concept))}
    neighbours = _neighbours(options) or protocol.neighbours
    if neighbours and options.neighbour_prompts is None:
        _check_neighbours(concept, neighbours)
        labels = _labels(options, neighbours)
        drawn = (protocol.prompts(name, label) for name, label in zip(neighbours, labels, strict=True))
        found[NEIGHBOURS] = _set(protocol, [prompt for prompts in drawn for prompt in prompts])
    return found


def _of_file(options: argparse.Namespace) -> dict[str, PromptSet]:
    read = _read(options.prompts, options)
    seeds = _seeds(options, None)
    found = {CONCEPT: _seeded(read, seeds)}
    neighbours = _neighbours(options)
    if neighbours:
        concept = _concept(options)
        if not concept:
            raise ValueError("--concept: expected the words of --prompts that --neighbour_concepts take the place of")
        _check_neighbours(concept, neighbours)
        labels = _labels(options, neighbours)
        drawn = [
            _put(prompt, options.prompts, concept, name, label)
            for name, label in zip(neighbours, labels, strict=True)
            for prompt in read.prompts
        ]
        found[NEIGHBOURS] = _seeded(replace(read, prompts=tuple(drawn)), seeds)
    return found


def _concept(options: argparse.Namespace) -> str | None:
    """What ``--concept`` says; a list of concepts is drawn as one, and a warning says so."""
    if options.concept is not None and looks_like_several(options.concept):
        warn_of_one("--concept", options.concept, "several, which --erase_concept separates by ';', are evaluated each")
    return None if options.concept is None else tidy(options.concept)


def _neighbours(options: argparse.Namespace) -> tuple[str, ...]:
    """Each of ``--neighbour_concepts``: of several texts, or of one with ``;`` between them."""
    given = options.neighbour_concepts or ()
    return tuple(name for text in given for name in split_concepts("--neighbour_concepts", text))


def _put(prompt: EvaluationPrompt, file: Path, concept: str, name: str, label: int | None) -> EvaluationPrompt:
    """The prompt with a neighbour in the concept's place, whatever the case of its letters."""
    if not contains(prompt.text, concept):
        raise ValueError(
            f"--neighbour_concepts: the prompt {prompt.text!r} of {file} does not contain the concept "
            f"{concept!r}; give --neighbour_prompts instead"
        )
    return replace(prompt, text=replace_concepts(prompt.text, {concept: name}), concept=name, label=label)


def _check_neighbours(concept: str, neighbours: Sequence[str]) -> None:
    names = [normal(name) for name in neighbours]
    if len(set(names)) < len(names) or normal(concept) in names:
        raise ValueError(
            f"--neighbour_concepts: expected different ones, and not the concept itself, got {', '.join(neighbours)}"
        )


def _labels(options: argparse.Namespace, neighbours: Sequence[str]) -> Sequence[int | None]:
    if options.neighbour_classes is None or options.judge is None:  # which --neighbour_classes belongs to
        return [None] * len(neighbours)
    if len(options.neighbour_classes) != len(neighbours):
        raise ValueError(
            f"--neighbour_classes: expected one for each of {len(neighbours)} neighbour concepts, "
            f"got {len(options.neighbour_classes)}"
        )
    return classes_at(options.judge).find("--neighbour_classes", options.neighbour_classes)


def _read(file: Path, options: argparse.Namespace) -> PromptSet:
    return read_prompts(file, limit=options.max_prompts)


def _seeds(options: argparse.Namespace, protocol: Protocol | None) -> Sequence[int]:
    if options.seeds is not None:
        return range(options.seeds)
    return range(_SEEDS) if protocol is None else protocol.seeds


def _set(protocol: Protocol, prompts: Sequence[EvaluationPrompt]) -> PromptSet:
    return PromptSet(tuple(prompts), f"protocol {protocol.name}", protocol.sha256)


def _seeded(read: PromptSet, seeds: Sequence[int]) -> PromptSet:
    return replace(read, prompts=with_seeds(read.prompts, seeds))


def _once_each(read: PromptSet) -> PromptSet:
    """Prompt i with seed i: thousands of captions with one noise would all have its composition."""
    seeded = (
        prompt if prompt.seed is not None else replace(prompt, seed=index) for index, prompt in enumerate(read.prompts)
    )
    return replace(read, prompts=tuple(seeded))
