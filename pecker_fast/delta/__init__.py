"""What a masked training changed, as a small reversible file: ``Delta``, and which of them a model carries."""

from pecker_fast.delta.delta import Delta
from pecker_fast.delta.ledger import Ledger
from pecker_fast.delta.shira import export_shira

__all__ = ["Delta", "Ledger", "export_shira"]
