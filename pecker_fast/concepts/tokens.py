"""What a pipeline's tokenizers make of prompts: how long they are, and which of them are one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pecker_fast.errors import FileFormatError

MISSING = "pipelines need transformers, which is not installed; run: pip install pecker_fast[diffusers]"
_LONGEST = 100_000  # tokens; tokenizers without a limit of their own have 1e30


def read_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer of a folder, of the class that the pipeline's index names.

    Raises:
        FileFormatError: It cannot be read.
        ImportError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(MISSING) from error
    kind = getattr(transformers, name, None)
    if kind is None or "Tokenizer" not in name:
        raise FileFormatError(f"{folder}: this transformers has no tokenizer {name!r}")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{folder}: cannot be read ({error})") from error


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """Of each prompt, whole, with what begins and ends it."""
    return [tuple(tokenizer(prompt, truncation=False).input_ids) for prompt in prompts]


def check_lengths(folder: Path, tokenizer: Any, prompts: Sequence[str]) -> None:
    """Refuse prompts that the tokenizer of a folder would cut.

    Raises:
        FileFormatError: Nothing says how long a prompt may be.
        ValueError: A prompt is too long; it is named, with its tokens and the limit.
    """
    limit, special = tokenizer.model_max_length, len(tokenizer("").input_ids)
    if limit > _LONGEST:
        raise FileFormatError(
            f"{folder}: has no model_max_length, so that nothing says how long a prompt may be; "
            f"set it in tokenizer_config.json, for Stable Diffusion to 77"
        )
    for prompt, ids in zip(prompts, token_ids(tokenizer, prompts), strict=True):
        if len(ids) > limit:
            raise ValueError(
                f"prompt {_short(prompt)!r} has {len(ids) - special} tokens, the tokenizer of {folder.parent} takes "
                f"{limit - special}; shorten it: nothing is cut silently"
            )


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 100 else prompt[:97] + "..."
