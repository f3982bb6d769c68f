"""Parts that memories and blocks share: norms, rotary positions, short convolution and token shift."""
