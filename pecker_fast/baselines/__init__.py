"""Other methods of class unlearning, each by its published update rule, in one harness: docs/baselines.md."""

from pecker_fast.baselines.config import METHODS, BaselineConfig, salun, salun_mask_config
from pecker_fast.baselines.trainer import Baseline

__all__ = ["METHODS", "Baseline", "BaselineConfig", "salun", "salun_mask_config"]
