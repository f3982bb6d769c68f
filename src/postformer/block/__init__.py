"""Blocks: feed-forwards, channel mixing, depth, and the runner of residual sublayers."""
