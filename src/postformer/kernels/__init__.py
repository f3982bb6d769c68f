"""Pure tensor functions of the sequence memories, on torch alone.

Each has a token-by-token reference that is obviously right and, where one exists, a parallel form that gives the same
numbers; `use` chooses between them for everything inside a `with` block.

gdr: matrix memory with decay, erase and write. scan, max_plus_scan, selective_scan, fft_convolution: elementwise
memories. kalman_gains, precision, ridge_solve: second-order memories. sequential: any step function. attention: a list
of keys and values.
"""

from .attention import attend, attention, recall
from .gdr import gdr
from .scan import fft_convolution, max_plus_scan, scan
from .scan.diagonal import diagonal_system
from .scan.selective import selective_scan
from .sequential import sequential
from .settings import Settings, current, use
from .solve import kalman_gains, precision, ridge_solve

__all__ = [
    "Settings",
    "attend",
    "attention",
    "current",
    "diagonal_system",
    "fft_convolution",
    "gdr",
    "kalman_gains",
    "max_plus_scan",
    "precision",
    "recall",
    "ridge_solve",
    "scan",
    "selective_scan",
    "sequential",
    "use",
]
