"""The files of a diffusers pipeline folder, copied and changed as files: no component is loaded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from pecker_fast.checkpoint import read_json
from pecker_fast.errors import FileFormatError
from pecker_fast.written import NAME as RECORD

INDEX = "model_index.json"
SCHEDULER = Path("scheduler") / "scheduler_config.json"
TEXTS = (".json", ".md", ".txt")
"""What goes along with weights. Other copies of the weights must not: they would be the old ones."""

_ENTRY = r'("scheduler"\s*:\s*\[\s*)"([^"]*)"(\s*,\s*)"([^"]*)"'


def is_pipeline(folder: Path) -> bool:
    """Whether a folder says that it is a pipeline."""
    return (folder / INDEX).is_file()


def check_pipeline(folder: Path) -> None:
    """Refuse what is no pipeline with a UNet2DConditionModel.

    Raises:
        FileFormatError: It is none; what is missing is named.
    """
    if not is_pipeline(folder):
        raise FileFormatError(f"{folder}: has no {INDEX}; expected a pipeline that diffusers saved")
    entry = read_json(folder / INDEX).get("unet")
    kind = entry[-1] if isinstance(entry, list) and entry else entry
    if kind != "UNet2DConditionModel":
        raise FileFormatError(f"{folder / INDEX}: expected a unet of class UNet2DConditionModel, got {kind!r}")
    for file in (folder / "unet" / "config.json", folder / SCHEDULER):
        if not file.is_file():
            raise FileFormatError(f"{file}: no such file; the pipeline is not complete")


def components(pipeline: Path) -> list[str]:
    """The folders that the index names.

    Raises:
        FileFormatError: The index cannot be read.
    """
    names = [name for name, value in read_json(pipeline / INDEX).items() if isinstance(value, list)]
    return [name for name in names if name.isidentifier() and (pipeline / name).is_dir()]


def texts(folder: Path) -> list[str]:
    """Names of the settings and texts beside weights, and licences; not the record of who wrote them."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.name != RECORD)
    return [file.name for file in files if file.suffix in TEXTS or file.name.startswith("LICENSE")]


def copy_components(pipeline: Path, target: Path, without: Collection[str]) -> None:
    """Copy the folders that the index names, byte for byte, into an existing folder.

    Raises:
        FileFormatError: A file cannot be read or written.
    """
    for name in components(pipeline):
        if name not in without:
            try:
                copy_folder(pipeline / name, target / name)
            except OSError as error:
                raise FileFormatError(f"{target / name}: cannot be copied ({error}); is the disk full?") from error


def copy_folder(source: Path, target: Path) -> None:
    """Copy what a folder holds into a new one, byte for byte, that belongs to whoever copies it.

    A cache of the Hugging Face Hub is read-only and full of symbolic links: links become files, and modes are those of
    new files, so that the copy can be changed and removed.

    Raises:
        OSError: A file cannot be read or written.
    """
    target.mkdir()
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            copy_folder(entry, target / entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)


def copy_texts(source: Path, target: Path, without: Collection[str] = ()) -> None:
    """Copy the settings and texts beside weights, and licences, into an existing folder.

    Raises:
        FileFormatError: A file cannot be read or written.
    """
    for name in texts(source):
        if name not in without:
            try:
                shutil.copyfile(source / name, target / name)
            except OSError as error:
                raise FileFormatError(f"{target / name}: cannot be copied ({error.strerror})") from error


def scheduler_entry(pipeline: Path) -> tuple[str, str]:
    """Library and class of the scheduler that the index names.

    Raises:
        FileFormatError: It names none, or several.
    """
    text = _index_text(pipeline)
    found = re.findall(_ENTRY, text)
    if len(found) != 1:
        raise FileFormatError(f'{pipeline / INDEX}: expected one "scheduler": ["library", "class"], got {len(found)}')
    return found[0][1], found[0][3]


def index_with_scheduler(pipeline: Path, library: str, class_name: str) -> str:
    """The text of the index with another scheduler; nothing else in it changes, so that it can be changed back.

    Raises:
        FileFormatError: As `scheduler_entry`.
    """
    scheduler_entry(pipeline)
    return re.sub(_ENTRY, lambda entry: f'{entry[1]}"{library}"{entry[3]}"{class_name}"', _index_text(pipeline))


def _index_text(pipeline: Path) -> str:
    try:
        with (pipeline / INDEX).open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{pipeline / INDEX}: cannot be read ({error})") from error
