"""Memory is counted rather than measured: the bytes that autograd keeps between forward and backward, each storage
once, plus 20 bytes per parameter, 16 for its weight, gradient and AdamW's two averages and 4 for its average (EMA). The
batches are for GPUs of 24 / 40 / 80 GB, 2 GB of which are left for work space and data.
"""

import math

from volo.models.memory import BYTES_PER_PARAMETER

GPUS = (24, 40, 80)  # GB
_LEFT_FREE = 2e9


def batches(bytes_per_image: float, parameters: int) -> str:
    """Return the largest batch that fits each of the GPUs."""
    room = [gpu * 1e9 - _LEFT_FREE - parameters * BYTES_PER_PARAMETER for gpu in GPUS]
    return " / ".join(str(max(0, math.floor(left / bytes_per_image))) for left in room)
