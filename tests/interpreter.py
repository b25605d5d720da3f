"""Triton 3.6 interprets loop bounds as arrays, of which numpy from 2.4 on makes no index."""

from typing import Any


def repair() -> None:
    """Make ``range(tensor)`` work in interpreted kernels."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
