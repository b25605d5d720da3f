"""A source tree in front of an installed package: what is imported may be another build than the one that was meant."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def warn_if_it_hides_a_build(package: Path) -> None:
    """Warn where ``package``, in a source tree without native module, is imported in place of one that has it."""
    if hidden := hidden_build(package):
        warnings.warn(
            f"pecker_fast is imported from the source tree {package.parent}, whose native module is not built, in "
            f"place of the installed one that has it: {hidden}. The slow plain-torch kernels are used. Run "
            f"`pip install -e .` in the tree, or start Python elsewhere",
            stacklevel=3,
        )


def hidden_build(package: Path, search: Sequence[str] | None = None) -> Path | None:
    """The native module of an installed pecker_fast that this one hides, or None if it has its own or there is none.

    Args:
        package: Folder of the pecker_fast that is imported.
        search: Where to look for installed ones; None is ``sys.path``.
    """
    if _native_modules(package):
        return None
    installed = importlib.metadata.distributions(name="pecker_fast", path=list(sys.path if search is None else search))
    others = (folder.resolve() for distribution in installed for folder in _packages(distribution))
    return next((built for other in others if other != package.resolve() for built in _native_modules(other)), None)


def _native_modules(package: Path) -> list[Path]:
    names = (package / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return [name for name in names if name.is_file()]


def _packages(distribution: importlib.metadata.Distribution) -> Iterator[Path]:
    """Where a distribution keeps the package: beside its own files, or, editable, in the checkout it was made from."""
    yield Path(str(distribution.locate_file("pecker_fast")))
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        checkout = Path(url2pathname(urlsplit(origin["url"]).path)) if origin["dir_info"]["editable"] else None
    except (ValueError, KeyError, TypeError):  # not from a folder, or not editable
        return
    if checkout is not None:
        yield checkout / "pecker_fast"
