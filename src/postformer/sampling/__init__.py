"""Samplers: `generate(model, prompt, policy) -> tokens, trace`, with one hook that may insert forced tokens.

Prefixes can be forked and saved; in a Batch rows join and leave at any time.
"""

from postformer.sampling.autoregressive import Generation, Piece, Trace, generate, left_pad, stream
from postformer.sampling.batch import Batch, Row
from postformer.sampling.policy import Policy
from postformer.sampling.prefix import Prefix, prefill
from postformer.sampling.stopping import StopText

__all__ = ["Batch", "Generation", "Piece", "Policy", "Prefix", "Row", "StopText", "Trace", "generate", "left_pad",
           "prefill", "stream"]
