"""An inner loss of one's own for deep memories: quadratic for small errors, linear for large ones, smooth between.

pip install -e examples/log-cosh && postformer verify examples/log-cosh/log-cosh.yaml
"""

import math

import torch.nn.functional as F

from postformer.memory.deep_losses import loss


@loss("log-cosh")
def log_cosh(prediction, target):
    """sum log cosh r: [..., d], [..., d] -> [...]; written so that large r do not overflow."""
    r = prediction - target
    return (r + F.softplus(-2 * r) - math.log(2)).sum(-1)
