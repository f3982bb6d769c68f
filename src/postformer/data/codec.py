"""Bytes as tokens: the codec whose loss is bits per byte with no further accounting.

Token i is the byte i; text is UTF-8. There are no special tokens: document boundaries travel beside the tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

VOCAB = 256
"""Number of token ids."""


def encode(text: str | bytes) -> Tensor:
    """Text (as UTF-8) or raw bytes -> [T] int64 tokens in 0..255."""
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).astype(np.int64))


def decode_bytes(tokens: Tensor) -> bytes:
    """[T] tokens -> the bytes they stand for.

    Raises ValueError for a tensor that is not one row or holds an id outside 0..255.
    """
    if tokens.ndim != 1:
        raise ValueError(f"decode takes one row of tokens [T], not a shape {tuple(tokens.shape)}; pass tokens[i]")
    if tokens.is_floating_point():
        raise ValueError(f"decode takes integer tokens, not {tokens.dtype}; take logits.argmax(-1) first")
    ids = tokens.detach().cpu().numpy()
    if ids.size and (ids.min() < 0 or ids.max() >= VOCAB):
        raise ValueError(f"token ids {ids.min()}..{ids.max()} are not all bytes (0..255); was another codec used?")
    return ids.astype(np.uint8).tobytes()


def decode(tokens: Tensor, errors: str = "replace") -> str:
    """[T] tokens -> text.

    `errors` is what to do about bytes that are not UTF-8 (a sample may stop inside a character): "replace" writes
    U+FFFD, "surrogateescape" gives text that `encode` turns back into the same bytes, "strict" raises
    UnicodeDecodeError.
    """
    return decode_bytes(tokens).decode("utf-8", errors)
