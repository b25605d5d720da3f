"""Files and folders that are either complete or absent: JSON and safetensors only, nothing is unpickled.

What is read is checked, and refused with a `FileFormatError` that names the file; a folder that is written
appears under its name only when all of it is on the disk.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pecker_fast.errors import FileFormatError
from pecker_fast.git_lfs import refuse_pointer
from pecker_fast.leftovers import Unfinished, clear, make_file, merge, older_of
from pecker_fast.tensor_file import bytes_of, write_tensors

StrPath = str | os.PathLike[str]


@contextmanager
def atomic_folder(path: StrPath) -> Iterator[Path]:
    """Fill a folder aside and rename it into place once it is complete.

    The folder that is yielded lies beside ``path``. When the block ends normally, it is flushed to the disk
    and becomes ``path``; an older folder of that name is replaced, and entries that the new one does not have
    are moved over, so that nothing else is lost. When the block fails, what it wrote is removed and ``path``
    stays as it was. What a killed run left there is put away by the next one (see `pecker_fast.leftovers`).

    Whatever wrote or copied the files, who may read and write them is what the process's umask says.

    Args:
        path: The folder to write; parents are created.

    Yields:
        An empty folder to write into.

    Raises:
        FileFormatError: ``path`` is a file, or its parent cannot be written.
    """
    target = Path(os.path.abspath(path))
    if target.exists() and not target.is_dir():
        raise FileFormatError(f"{target}: is a file, but a folder is to be written; choose another name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Unfinished(target, os.mkdir)
    except OSError as error:
        raise FileFormatError(
            f"{target}: cannot write into {target.parent} ({error.strerror}); choose another folder"
        ) from error
    try:
        clear(target.parent)
        clear(target)
        yield unfinished.path
        try:
            _publish(unfinished.path, target)
        except OSError as error:
            raise FileFormatError(f"{target}: cannot be completed ({error}); is the disk full?") from error
    finally:
        unfinished.close()


@contextmanager
def atomic_file(path: StrPath) -> Iterator[Path]:
    """Fill a file aside, flush it and rename it into place once it is complete; on failure nothing is left behind.

    What a killed run left beside it is put away. The file has the mode that the process's umask gives.

    Args:
        path: The file to write.

    Yields:
        The name of an empty file to write into, in the same folder.

    Raises:
        FileFormatError: The file cannot be put in place.
    """
    target = Path(os.path.abspath(path))
    try:
        unfinished = Unfinished(target, make_file)
    except OSError as error:
        raise FileFormatError(f"{target}: cannot be written ({error.strerror}); choose another name") from error
    try:
        clear(target.parent)
        yield unfinished.path
        try:
            _flush(unfinished.path)
            os.replace(unfinished.path, target)
            _flush(target.parent)
        except OSError as error:
            raise FileFormatError(f"{target}: cannot be written ({error.strerror}); choose another name") from error
    finally:
        unfinished.close()


def write_json(path: StrPath, values: Mapping[str, Any]) -> None:
    """Write one JSON object, indented; floats survive exactly, any mapping is an object.

    Raises:
        FileFormatError: The file cannot be written.
        ValueError: A value is NaN or infinite, which JSON cannot hold.
    """
    text = json.dumps(values, indent=2, allow_nan=False, default=_object) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be written ({error.strerror})") from error


def _object(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def read_json(path: StrPath) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        FileFormatError: The file is missing or unreadable, is not JSON, or holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: truncated or not JSON ({error})") from error
    if not isinstance(values, dict):
        raise FileFormatError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_safetensors(path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any layout and device, and a header of strings; the same content gives the same bytes.

    Tensors that share memory are written once each: on reading they are independent.

    Raises:
        FileFormatError: The file cannot be written.
        ValueError: A tensor has no values of its own, or is of a dtype that the format does not have.
    """
    try:
        with open(path, "wb") as file:
            write_tensors(file, tensors, metadata or {})
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be written ({error})") from error


def read_safetensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a file, on the CPU, and the strings of its header.

    Raises:
        FileFormatError: The file is missing, truncated, or not safetensors.
    """
    if not Path(path).is_file():
        raise FileFormatError(f"{path}: no such file")
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            # A clone owns its memory; the tensor itself would be a window into the file, which may change.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"{path}: truncated or not a safetensors file ({error})") from error


def rewrite_safetensors(source: StrPath, target: StrPath, tensors: Mapping[str, Tensor]) -> None:
    """Copy a file with other numbers in it; header, order and alignment keep every byte, whoever wrote them.

    Args:
        source: A file that `read_safetensors` read.
        target: The file to write.
        tensors: Its tensors, in their dtypes and shapes.

    Raises:
        FileFormatError: A file cannot be read or written.
        ValueError: A tensor is not of the file, or of another size.
    """
    try:
        shutil.copyfile(source, target)
        with open(target, "r+b") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(begin - 8))
            for name, tensor in tensors.items():
                start, end = header[name]["data_offsets"] if name in header else (0, -1)
                data = bytes_of(tensor)
                if len(data) != end - start:
                    raise ValueError(f"{source}: {name}: expected {end - start} bytes, got {len(data)}")
                file.seek(begin + start)
                file.write(data.data)
    except OSError as error:
        raise FileFormatError(f"{target}: cannot be written ({error.strerror})") from error


def _publish(unfinished: Path, target: Path) -> None:
    """Settle ``unfinished`` and rename it to ``target``, setting an older folder aside meanwhile."""
    _settle(unfinished)
    if not target.exists():
        os.rename(unfinished, target)
    else:
        older = older_of(unfinished, target)
        os.rename(target, older)
        try:
            os.rename(unfinished, target)
        except OSError:
            os.rename(older, target)
            raise
        merge(older, target)
    _flush(target.parent)


def _settle(folder: Path) -> None:
    """Flush all of it, with the rights that the folder itself was made with: libraries give files others."""
    allowed = stat.S_IMODE(folder.stat().st_mode)
    for entry in [path for path in folder.rglob("*") if not path.is_symlink()]:
        mode, rights = stat.S_IMODE(entry.stat().st_mode), 0o777 if entry.is_dir() else 0o666
        if (mode ^ allowed) & rights:
            entry.chmod((mode & ~rights) | (allowed & rights))
        _flush(entry)
    _flush(folder)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders; it writes their names through
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
