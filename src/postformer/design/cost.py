"""Cost: parameters, floating-point operations and state bytes of a design, computed without building it.

FLOPs follow the convention of PyTorch's counter: two per multiply-add of a matrix product on the token-by-token
reference path; elementwise work is not counted. State bytes are per sequence, KV lists included, in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


def visible_keys(tokens: int, context: int, window: int | None) -> int:
    """Sum over the next `tokens` tokens of the number of keys each sees: min(t + 1, window), t counted from context."""
    first, last = context + 1, context + tokens
    if window is None or last <= window:
        return (first + last) * tokens // 2
    if first >= window:
        return window * tokens
    return (first + window) * (window - first + 1) // 2 + window * (last - window)


@dataclass(frozen=True)
class Cost:
    """params: count. flops_per_token and flops_per_key: 2 per multiply-add. state: bytes per sequence."""

    params: int = 0
    flops_per_token: float = 0.0
    flops_per_key: tuple[tuple[float, int | None], ...] = ()
    """(FLOPs per token and visible key, window or None)"""
    state: int = 0
    state_per_token: tuple[tuple[int, int | None], ...] = ()
    """(bytes per token kept, window or None)"""
    state_per_share: tuple[tuple[int, float], ...] = ()
    """(bytes per token kept, the share of tokens that are kept)"""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.flops_per_token + other.flops_per_token,
            self.flops_per_key + other.flops_per_key,
            self.state + other.state,
            self.state_per_token + other.state_per_token,
            self.state_per_share + other.state_per_share,
        )

    def __radd__(self, other: int) -> Cost:
        return self if other == 0 else NotImplemented

    def shared(self) -> Cost:
        """The cost of one more use of parameters that are counted elsewhere."""
        return replace(self, params=0)

    def flops(self, tokens: int = 1, context: int = 0) -> float:
        """Forward FLOPs of `tokens` tokens of one sequence that follow `context` earlier ones."""
        per_key = sum(f * visible_keys(tokens, context, window) for f, window in self.flops_per_key)
        return self.flops_per_token * tokens + per_key

    def state_bytes(self, context: int) -> int:
        """Bytes of state that one sequence carries after `context` tokens."""
        kept = sum(b * (context if window is None else min(context, window)) for b, window in self.state_per_token)
        return self.state + kept + sum(b * math.floor(share * context) for b, share in self.state_per_share)


def linear(d_in: int, d_out: int, bias: bool = False) -> Cost:
    """A dense linear map."""
    return Cost(params=d_in * d_out + (d_out if bias else 0), flops_per_token=2.0 * d_in * d_out)
