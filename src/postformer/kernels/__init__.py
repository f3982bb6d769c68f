"""Pure tensor functions of the sequence memories, on torch alone. Each has a token-by-token reference and a parallel
form; `use` chooses between them for everything inside a `with` block."""

from .gdr import gdr
from .scan import fft_convolution, max_plus_scan, scan
from .settings import current, use

__all__ = ["current", "fft_convolution", "gdr", "max_plus_scan", "scan", "use"]
