"""Attempts to bring back what a model was made to forget."""

from pecker_fast.attacks.probing import probe
from pecker_fast.attacks.relearning import RelearningResult, relearn

__all__ = ["RelearningResult", "probe", "relearn"]
