"""The folder of a delta: what is in it, and that nothing in it was changed since it was written.

``pecker_delta.safetensors`` holds the mask ("mask": one bit a block) and the XOR of old and new bits ("xor": bytes),
``pecker_config.json`` everything else: checksum and size of the first, and a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pecker_fast.checkpoint import (
    StrPath,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from pecker_fast.errors import FileFormatError
from pecker_fast.output_folder import claim

CONFIG_NAME = "pecker_config.json"
PAYLOAD_NAME = "pecker_delta.safetensors"
FORMAT = "pecker_fast.delta"
VERSION = 1

_README = """# A delta of a model's weights

Made by pecker_fast: the XOR of the bits of the weights before and after a
masked training, for the weights under the mask alone. It is applied to a copy of the base model, and taken back:

    pecker-fast delta apply  --model BASE   --delta . --output_dir EDITED
    pecker-fast delta revert --model EDITED --delta . --output_dir BASE
    pecker-fast delta info   --delta .

`pecker_config.json` says what it needs; nothing in this folder is executed when it is read.
"""


def write(
    folder: StrPath,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    overwrite: bool,
) -> None:
    """Write the folder, complete or not at all.

    Raises:
        FileFormatError: It cannot be written, has files of the user's in the way, or, without ``overwrite``, a delta.
    """
    with claim(folder, "Delta.save", (PAYLOAD_NAME, CONFIG_NAME, "README.md"), replace=overwrite) as unfinished:
        payload = unfinished / PAYLOAD_NAME
        write_safetensors(payload, tensors, header)
        file = {"file": PAYLOAD_NAME, "bytes": payload.stat().st_size, "sha256": _sha256_of_file(payload)}
        whole = {"format": FORMAT, "version": VERSION, **config, "payload": file}
        write_json(unfinished / CONFIG_NAME, whole | {"sha256": _sha256_of_json(whole)})
        (unfinished / "README.md").write_text(_README, encoding="utf-8")


def read_config(folder: StrPath) -> dict[str, Any]:
    """Read and check ``pecker_config.json``.

    Raises:
        FileFormatError: It is missing, damaged, of something else, or of another version.
    """
    if not Path(folder).is_dir():
        raise FileFormatError(f"{folder}: no such folder; expected a delta, a folder with {CONFIG_NAME}")
    path = Path(folder) / CONFIG_NAME
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise FileFormatError(f"{path}: expected a delta (format {FORMAT!r}), got format {config.get('format')!r}")
    if config.get("version") != VERSION:
        raise FileFormatError(
            f"{path}: version is {config.get('version')!r}, expected {VERSION}; if it is newer, upgrade pecker_fast"
        )
    if config.pop("sha256", None) != _sha256_of_json(config):
        raise FileFormatError(f"{path}: damaged: its checksum does not match its content; get the delta again")
    return config


def read(folder: StrPath) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Read the folder: config, tensors, and the header of the tensors' file.

    Raises:
        FileFormatError: A file is missing, damaged, of something else, or of another version.
    """
    config = read_config(folder)
    expected, path = config.get("payload"), Path(folder) / PAYLOAD_NAME
    if not isinstance(expected, dict) or not path.is_file():
        raise FileFormatError(f"{path}: no such file; get the delta again")
    if path.stat().st_size != expected.get("bytes"):
        raise FileFormatError(f"{path}: truncated: {path.stat().st_size} bytes, expected {expected.get('bytes')}")
    if _sha256_of_file(path) != expected.get("sha256"):
        raise FileFormatError(f"{path}: damaged: its SHA-256 is not the one in {CONFIG_NAME}; get the delta again")
    return config, *read_safetensors(path)


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_json(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
