"""Samplers: `generate(model, prompt, policy) -> tokens, trace`, with one hook that may insert forced tokens."""

from postformer.sampling.autoregressive import Generation, Piece, Trace, generate, left_pad, stream
from postformer.sampling.policy import Policy

__all__ = ["Generation", "Piece", "Policy", "Trace", "generate", "left_pad", "stream"]
