"""Which files and folders are of which split, by the names that people and the Hugging Face Hub give them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pecker_fast.data.files import natural
from pecker_fast.data.pictures import is_picture
from pecker_fast.errors import FileFormatError

NAMED = ("train", "test", "validation")
"""The splits, in the order in which "all" has them."""
_WORDS = {
    "train": ("training", "train"),
    "test": ("testing", "test", "evaluation", "eval"),
    "validation": ("validation", "valid", "val", "dev"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
# In a file's name the word stands alone or begins it: train-00000-of-00002, my_val.v2, testA; not contest or valley.
_IN_NAME = re.compile(rf"(?:^|[^a-zA-Z])(?i:({'|'.join(_SPLIT_OF)}))(?![a-z])")


def wanted(split: str) -> Sequence[str]:
    """The splits that one means: itself, or all of them."""
    return NAMED if split == "all" else (split,)


def of_split(root: Path, files: list[Path], split: str) -> list[Path]:
    """Files whose name, or else whose folder below ``root``, says the split; if none says any, all are "train"."""
    own = {file: _split_of_file(root, file) for file in files}
    if not any(own.values()):
        return files if split in ("train", "all") else []
    return [file for name in wanted(split) for file in files if own[file] == name]


def parquet_files(root: Path, split: str) -> list[Path]:
    """Parquet files of a folder, or of a clone of a data set of the Hub, where they lie deeper.

    Raises:
        FileFormatError: A clone has several configurations.
    """
    return of_split(root, natural(root.glob("*.parquet")) or _files_of_clone(root), split)


def class_roots(root: Path, split: str) -> list[Path]:
    """Folders of class folders: those that have a split's name, as the split says, or ``root`` itself.

    Raises:
        FileFormatError: Two folders are of one split.
    """
    root = _unwrapped(root)
    folders = subfolders(root)
    splits = split_folders(folders)
    if not splits:
        return [root] if folders and split in ("train", "all") else []
    for folder, name in splits.items():
        twins = [other.name for other, its in splits.items() if its == name]
        if len(twins) > 1:
            raise FileFormatError(
                f"{root}: {' and '.join(twins)} are both of split {name!r}; rename or remove one, or name {folder}"
            )
    return [folder for name in wanted(split) for folder, its in splits.items() if its == name]


def left_out(root: Path) -> list[str]:
    """Names of what lies beside the folders of splits or classes and may have been meant: folders, and pictures."""
    root = _unwrapped(root)
    folders = subfolders(root)
    splits = split_folders(folders)
    beside = [folder.name for folder in folders if splits and folder not in splits]
    count = sum(is_picture(entry) for entry in root.iterdir())
    return [*beside, *([f"pictures ({count})"] if count else [])]


def split_folders(folders: Sequence[Path]) -> dict[Path, str]:
    """Folder -> its split, of folders side by side; none if the names of splits are names of classes there."""
    named = {folder: _SPLIT_OF[name] for folder in folders if (name := folder.name.casefold()) in _SPLIT_OF}
    # Beside others such a name may be a class, of vehicles say, whose pictures lie in it.
    return {folder: split for folder, split in named.items() if len(named) == len(folders) or subfolders(folder)}


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder in natural order, without hidden ones and what macOS packs along."""
    return natural(entry for entry in folder.iterdir() if entry.is_dir() and not hidden(entry))


def hidden(entry: Path) -> bool:
    """Whether nobody put it there on purpose."""
    return entry.name.startswith(".") or entry.name == "__MACOSX"


def _unwrapped(root: Path) -> Path:
    """``root``, or the one folder below it that holds everything, as archives and clones have it."""
    while len(folders := subfolders(root)) == 1:
        (only,) = folders
        if split_folders(folders) or _holds_pictures(root) or _holds_pictures(only) or not subfolders(only):
            break
        root = only
    return root


def _files_of_clone(root: Path) -> list[Path]:
    """Parquet files at any depth; ``data/`` and folders of splits are no configurations."""
    below = [folder for top in subfolders(root) for folder in (top, *subfolders(top))]
    if any(map(_holds_pictures, below)):
        return []  # class folders, perhaps with a table beside them
    configurations: dict[Path, list[Path]] = {}
    for file in sorted(root.rglob("*.parquet")):
        folders = file.relative_to(root).parent.parts
        if not any(hidden(Path(name)) for name in folders):
            kept = [name for name in folders if name.casefold() not in _SPLIT_OF]
            configurations.setdefault(root.joinpath(*kept), []).append(file)
    if len(configurations) > 1:
        names = [folder.relative_to(root).as_posix() for folder in configurations]
        raise FileFormatError(
            f"{root}: holds {len(names)} configurations, {', '.join(names)[:200]}; name the folder of one of them, "
            f"{root / names[0]} for instance"
        )
    return [file for files in configurations.values() for file in natural(files)]


def _holds_pictures(folder: Path) -> bool:
    return any(is_picture(entry) for entry in folder.iterdir())


def _split_of_file(root: Path, file: Path) -> str | None:
    found = _IN_NAME.search(file.name)
    if found:
        return _SPLIT_OF[found[1].lower()]
    folders = (name.casefold() for name in reversed(file.relative_to(root).parent.parts))
    return next((_SPLIT_OF[name] for name in folders if name in _SPLIT_OF), None)
