"""Files and folders that are either complete or absent: JSON and safetensors only, nothing is unpickled.

What is read is checked, and refused with a `FileFormatError` that names the file; a folder that is written
appears under its name only when all of it is on the disk.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pecker_fast.errors import FileFormatError

StrPath = str | os.PathLike[str]


@contextmanager
def atomic_folder(path: StrPath) -> Iterator[Path]:
    """Fill a folder aside and rename it into place once it is complete.

    The folder that is yielded lies beside ``path``. When the block ends normally, it is flushed to the disk
    and becomes ``path``; an older folder of that name is replaced, and entries that the new one does not have
    are moved over, so that nothing else is lost. When the block fails, what it wrote is removed and ``path``
    stays as it was. Killed between the two renames of a replacement, the older folder remains as
    ``.<name>.old-*``.

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
    unfinished = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
    except OSError as error:
        raise FileFormatError(
            f"{target}: cannot write into {target.parent} ({error.strerror}); choose another folder"
        ) from error
    try:
        yield unfinished
        try:
            _publish(unfinished, target)
        except OSError as error:
            raise FileFormatError(f"{target}: cannot be completed ({error}); is the disk full?") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def atomic_file(path: StrPath) -> Iterator[Path]:
    """Fill a file aside and rename it into place once it is complete; on failure nothing is left behind.

    Args:
        path: The file to write.

    Yields:
        The name to write to, in the same folder.

    Raises:
        FileFormatError: The file cannot be put in place.
    """
    target = Path(os.path.abspath(path))
    unfinished = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        yield unfinished
        try:
            os.replace(unfinished, target)
        except OSError as error:
            raise FileFormatError(f"{target}: cannot be written ({error.strerror}); choose another name") from error
    finally:
        if unfinished.is_file():
            unfinished.unlink()


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
    """Write tensors of any layout and device, and a header of strings.

    Tensors that share memory are written once each: on reading they are independent.

    Raises:
        FileFormatError: The file cannot be written.
    """
    # safetensors refuses other layouts, such as channels-last, and shared memory.
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in own.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            own[name] = tensor.clone()
        seen.add(storage)
    try:
        save_file(own, path, metadata=dict(metadata) if metadata else None)
        # safetensors lets only the owner read what it writes; be as open as the folder is.
        os.chmod(path, os.stat(Path(path).parent).st_mode & 0o666)
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"{path}: cannot be written ({error})") from error


def read_safetensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a file, on the CPU, and the strings of its header.

    Raises:
        FileFormatError: The file is missing, truncated, or not safetensors.
    """
    if not Path(path).is_file():
        raise FileFormatError(f"{path}: no such file")
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
                data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                if len(data) != end - start:
                    raise ValueError(f"{source}: {name}: expected {end - start} bytes, got {len(data)}")
                file.seek(begin + start)
                file.write(data.data)
    except OSError as error:
        raise FileFormatError(f"{target}: cannot be written ({error.strerror})") from error


def _publish(unfinished: Path, target: Path) -> None:
    """Flush ``unfinished`` and rename it to ``target``, setting an older folder aside meanwhile."""
    for entry in [*unfinished.rglob("*"), unfinished]:
        _flush(entry)
    if not target.exists():
        os.rename(unfinished, target)
    else:
        older = target.with_name(f".{target.name}.old-{uuid.uuid4().hex}")
        os.rename(target, older)
        try:
            os.rename(unfinished, target)
        except OSError:
            os.rename(older, target)
            raise
        for entry in older.iterdir():
            if not os.path.lexists(target / entry.name):
                os.rename(entry, target / entry.name)
        shutil.rmtree(older)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders; it writes their names through
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
