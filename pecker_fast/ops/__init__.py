"""The operations that make a mask pay, one file each: public function, plain-torch reference, table of backends.

Ops know tensors and blocks; they know nothing of modules or optimizers.
"""

from pecker_fast.ops.accumulate_saliency import accumulate_saliency_
from pecker_fast.ops.compact_active import compact_active
from pecker_fast.ops.dispatch import OPS, backends, use_backend
from pecker_fast.ops.masked_adamw import masked_adamw_
from pecker_fast.ops.masked_weight_grad import masked_weight_grad
from pecker_fast.ops.select_threshold import select_threshold
from pecker_fast.ops.sid_loss import sid_loss
from pecker_fast.ops.weight_grad_epilogues import accumulate_weight_grad_, score_weight_grad_

__all__ = [
    "OPS",
    "accumulate_saliency_",
    "accumulate_weight_grad_",
    "backends",
    "compact_active",
    "masked_adamw_",
    "masked_weight_grad",
    "score_weight_grad_",
    "select_threshold",
    "sid_loss",
    "use_backend",
]
