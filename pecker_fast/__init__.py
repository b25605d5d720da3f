"""pecker_fast: make a diffusion model forget, training only the weights that carry the forgotten thing.

``MaskedDistiller`` erases a class from a diffusion model (PECKER, arXiv 2604.05634); ``apply_mask`` and ``MaskedAdamW``
bring masked training to any other loop. Importing this loads torch and nothing else that is heavy.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pecker_fast.source_tree import warn_if_it_hides_a_build

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "setup.py").is_file():  # in a source tree the Triton kernels live in ../kernels
    __path__.append(str(_checkout))
    warn_if_it_hides_a_build(Path(__file__).parent)

from pecker_fast.active import ActiveParameters  # noqa: E402
from pecker_fast.apply import apply_mask  # noqa: E402
from pecker_fast.block_scores import BlockScores  # noqa: E402
from pecker_fast.blocks import BlockGrid, ParameterMask  # noqa: E402
from pecker_fast.config import DistillConfig, GuidanceConfig  # noqa: E402
from pecker_fast.delta import Delta, export_shira  # noqa: E402
from pecker_fast.distiller import MaskedDistiller  # noqa: E402
from pecker_fast.mask import BlockMask  # noqa: E402
from pecker_fast.mask_config import MaskConfig  # noqa: E402
from pecker_fast.ops import backends, use_backend  # noqa: E402
from pecker_fast.optim import MaskedAdamW  # noqa: E402
from pecker_fast.refresh import MaskRefresher, change_mask, linear_density  # noqa: E402
from pecker_fast.saliency import Saliency, compute_saliency  # noqa: E402
from pecker_fast.schedule import NoiseSchedule  # noqa: E402
from pecker_fast.score_model import TextConditional  # noqa: E402
from pecker_fast.scoring import score_blocks  # noqa: E402
from pecker_fast.stop_rule import StopRule  # noqa: E402
from pecker_fast.stopping import StopCheck, Verdict  # noqa: E402
from pecker_fast.weight_costs import weight_gradient_flops  # noqa: E402

if TYPE_CHECKING:
    from pecker_fast.baselines import Baseline, BaselineConfig, salun, salun_mask_config

__all__ = [
    "ActiveParameters",
    "Baseline",
    "BaselineConfig",
    "BlockGrid",
    "BlockMask",
    "BlockScores",
    "Delta",
    "DistillConfig",
    "GuidanceConfig",
    "MaskConfig",
    "MaskRefresher",
    "MaskedAdamW",
    "MaskedDistiller",
    "NoiseSchedule",
    "ParameterMask",
    "Saliency",
    "StopCheck",
    "StopRule",
    "TextConditional",
    "Verdict",
    "apply_mask",
    "backends",
    "change_mask",
    "compute_saliency",
    "export_shira",
    "linear_density",
    "salun",
    "salun_mask_config",
    "score_blocks",
    "use_backend",
    "weight_gradient_flops",
]

_BASELINES = ("Baseline", "BaselineConfig", "salun", "salun_mask_config")


def __getattr__(name: str) -> Any:
    """What few need is imported when it is asked for."""
    if name in _BASELINES:
        return getattr(importlib.import_module("pecker_fast.baselines"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
